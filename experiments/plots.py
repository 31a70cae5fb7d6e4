"""Figures of the report: arrays in, one inline SVG a panel out.

Panels are small, so that a page can lay them side by side on a desk and under each other on a phone at the same size of
letters. Matplotlib draws them with colours that stand for CSS variables (`STYLE_SHEET`), which are put in afterwards:
the page's light and dark colours reach into the figures, and text stays text.
"""

import collections
import functools
import hashlib
import html
import io
import math
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import tables

# Told apart by people with protanopia and deuteranopia too (CIELAB distance of any two at least 16), and at least 2.9 : 1
# against the page. A line's dashes carry the same information a second time.
LIGHT = ("#8c8c8c", "#c68300", "#0b5f4a", "#743f9c", "#4499cb", "#6b4216", "#cc4f1c", "#2c57d0")
DARK = ("#d0d0d0", "#f0cf4a", "#4fdf9a", "#a878b8", "#86c8f5", "#a9795c", "#ee7a3a", "#5f7df0")
SOLID, DASHED, DOTTED, MIXED = "solid", (0, (4, 2)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6))
DASHES = (SOLID, DASHED, DOTTED, MIXED)
STYLES = {
    "ce": (0, SOLID), "balanced_softmax": (5, SOLID), "logit_adjusted": (5, DASHED), "kd": (1, SOLID),
    "wsl": (1, DASHED), "dkd": (2, SOLID), "reviewkd": (2, DASHED), "bkd": (4, SOLID), "dive": (4, DASHED),
    "ltkd": (6, SOLID), "ltkd_bs": (3, SOLID), "bikd": (7, SOLID), "bikd over ltkd": (7, DASHED),
    "bikd over ltkd_bs": (7, MIXED),
}  # fmt: skip
INK, QUIET, GRID, FIRST = "#010101", "#020202", "#030303", 0x10
_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11, "axes.titlesize": 12,
    "axes.titlelocation": "left", "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK,
    "axes.titlecolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "axes.labelsize": 10.5, "lines.linewidth": 1.8, "xtick.major.size": 3, "ytick.major.size": 0,
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03,
}  # fmt: skip


def _variables(colours, ink, quiet, grid, page):
    named = " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))
    return f"--ink: {ink}; --quiet: {quiet}; --grid: {grid}; --page: {page}; {named}"


STYLE_SHEET = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT, "#1d1d1b", "#63625e", "#e3e0d9", "#fdfcfa")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, "#e6e4df", "#a3a19b", "#35363a", "#17181a")} }} }}
"""


def styles(methods):
    """Returns {label: (colour index, dashes)}: a colour for a method's name, dashes where a name has several rows."""
    found, seen = {}, {}
    for method in methods:
        unknown = (sum(method.name.encode()) % len(LIGHT), MIXED)
        colour, dashes = STYLES.get(method.name, unknown)
        place = seen[method.name] = seen.get(method.name, -1) + 1
        found[method.label] = (colour, DASHES[(DASHES.index(dashes) + place) % len(DASHES)])
    return found | {"teacher": (None, DOTTED)}


def colour(index):
    """Returns the stand-in for a method's colour, which `svg` turns into a CSS variable; None is the ink."""
    return INK if index is None else f"#0100{FIRST + index:02x}"


def key(labels, found):
    """Returns the key to a figure's lines as HTML."""
    entries = []
    for label in labels:
        index, dashes = found[label]
        dashed = "" if dashes == SOLID else f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in dashes[1])}"'
        line = f'<line x1="0" y1="5" x2="30" y2="5" stroke-width="3"{dashed} style="stroke: {css(index)}"/>'
        entries.append(
            f'<span><svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>{html.escape(label)}</span>'
        )
    return f'<p class="key">{"".join(entries)}</p>'


def css(index):
    """Returns a method's colour for the page."""
    return "var(--ink)" if index is None else f"var(--c{index})"


# ---- the one way from a figure to SVG -----------------------------------------------------------------------------


def figure(width=350, height=230):
    """Returns an empty figure; one unit is one CSS pixel."""
    return Figure(figsize=(width / 72, height / 72))


def svg(fig, described):
    """Writes a figure as an SVG element for an HTML page; `described` is for those who do not see it."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Ids are unique on a page: two figures with the same prefix are the same figure.
    prefix = f"f{hashlib.md5(text.encode()).hexdigest()[:8]}"
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<[^>]*>", lambda tag: _lean(tag[0], prefix), text).strip()
    width = round(fig.get_figwidth() * 72)
    opening = f'<svg role="img" aria-label="{html.escape(described)}" style="max-width: {width}px"'
    return re.sub(
        r'<svg( xmlns:xlink="[^"]*") width="[^"]*" height="[^"]*"', lambda m: opening + m[1], text, count=1
    )


def _lean(tag, prefix):
    """Shortens a tag, puts the CSS variables in, and makes its ids unique. The text between tags is left alone."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"| transform="rotate\(-?0 [^)]*\)"|font-family: [^;"]*;? ?', "", tag)
    tag = re.sub(r'( id="|xlink:href="#|clip-path="url\(#)', rf"\g<1>{prefix}", tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), tag)
    names = {INK: "ink", QUIET: "quiet", GRID: "grid"} | {colour(i): f"c{i}" for i in range(len(LIGHT))}
    tag = re.sub(r"(?<=: )#0[0-9a-f]{5}\b", lambda found: f"var(--{names[found[0]]})", tag)
    return re.sub(r"\s+", " ", tag).replace(' "', '"')


def _styled(draw):
    """Makes a function that returns (figure, description) one that returns SVG, drawn under the report's settings."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(_RC):
            return svg(*draw(*args, **kwargs))

    return drawn


# ---- accuracy per class -------------------------------------------------------------------------------------------


def smooth(values):
    """Averages over neighbouring classes (a Gaussian, 3 % of the classes wide) where there are too many to read."""
    values = np.asarray(values, float)
    if len(values) < 30:
        return values
    distance = np.subtract.outer(np.arange(len(values)), np.arange(len(values)))
    weights = np.exp(-0.5 * (distance / (0.03 * len(values))) ** 2)
    return weights @ values / weights.sum(1)


def _mark_groups(ax, assignment, names):
    """Draws the borders of the groups, and their names above; the classes are sorted by count."""
    starts = [int(np.argmax(assignment == g)) for g in range(len(names))] if len(names) else []
    for g, start in enumerate(starts):
        if start:
            ax.axvline(start - 0.5, color=QUIET, linewidth=0.8, linestyle=DOTTED)
        middle = (start + np.flatnonzero(assignment == g)[-1]) / 2
        if len(names) <= 6:
            above = ax.get_xaxis_transform()
            ax.text(middle, 0.98, names[g], transform=above, ha="center", va="top", fontsize=9.5, color=QUIET)


@_styled
def by_class(curves, found, counts, assignment, names, *, width=720):
    """Draws the (smoothed) accuracy of every method by class, sorted by count, over the counts themselves."""
    fig = figure(width, 340)
    ax, strip = fig.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
    for label, values in curves.items():
        index, dashes = found[label]
        dotted = {"marker": "o", "markersize": 4} if len(values) < 30 else {}
        ax.plot(smooth(values), color=colour(index), linestyle=dashes, **dotted)
    ax.set_ylim(0, 105)
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("test accuracy, %")
    _mark_groups(ax, assignment, names)
    strip.fill_between(np.arange(len(counts)), counts, 0.8, step="mid", color=QUIET, alpha=0.45, linewidth=0)
    strip.set_yscale("log")
    strip.set_title("training images (log scale)", fontsize=10.5)
    strip.set_xlabel("class, the most frequent first")
    strip.set_xlim(-0.5, len(counts) - 0.5)
    strip.minorticks_off()
    smoothed = "smoothed " if len(counts) >= 30 else ""
    return (
        fig,
        f"{smoothed.capitalize()}test accuracy of each class, sorted by training images: {', '.join(curves)}",
    )


@_styled
def one_by_class(label, values, style, counts, assignment, names):
    """Draws one method's accuracy of every class as dots, with the smoothed curve through them."""
    fig = figure(350, 200)
    ax = fig.subplots()
    x = np.arange(len(values))
    ax.plot(x, values, "o", color=colour(style[0]), markersize=3.4, markeredgewidth=0, alpha=0.55)
    ax.plot(x, smooth(values), color=colour(style[0]), linestyle=style[1])
    ax.set(ylim=(0, 105), xlim=(-1, len(values)), title=label, yticks=range(0, 101, 25))
    ticks = np.unique(np.linspace(0, len(counts) - 1, 5).round().astype(int))
    ax.set_xticks(ticks, [f"{counts[i]:g}" for i in ticks])
    ax.set_xlabel("training images of the class")
    _mark_groups(ax, assignment, names)
    return fig, f"Test accuracy of each class for {label}, against the class's number of training images"


# ---- the teacher's bias -------------------------------------------------------------------------------------------


@_styled
def group_mass(title, mass, marks):
    """Draws the teacher's probability mass per group as bars; `marks` are {what: ({group: share}, character)}."""
    fig = figure(350, 64 + 38 * len(mass))
    ax = fig.subplots()
    names = list(mass)
    ax.barh(range(len(names)), [mass[name] for name in names], height=0.56, color=QUIET, alpha=0.45)
    for row, name in enumerate(names):
        ax.text(1.0, row, f"{mass[name]:.2f}", ha="right", va="center")
        for shares, marker in marks.values():
            style = {"color": colour(6), "markersize": 19, "markeredgewidth": 2.4}
            if marker != "|":
                style = {
                    "markersize": 7,
                    "markeredgecolor": colour(7),
                    "markerfacecolor": "none",
                    "markeredgewidth": 1.8,
                }
            ax.plot([shares[name]], [row], marker, clip_on=False, **style)
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), title=title, xticks=np.linspace(0, 1, 5))
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    return fig, f"{title}: " + ", ".join(f"{name} {mass[name]:.2f}" for name in names)


# ---- training -----------------------------------------------------------------------------------------------------


@_styled
def lines(title, series, found, *, log=False):
    """Draws {label: (x, y)} over the epochs."""
    fig = figure(350, 200)
    ax = fig.subplots()
    for label, (x, y) in series.items():
        index, dashes = found[label]
        thin = max(1, len(x) // 120)
        marker = {"marker": "o", "markersize": 4} if len(x) < 3 else {}
        ax.plot(x[::thin], y[::thin], color=colour(index), linestyle=dashes, linewidth=1.6, **marker)
    ax.set(title=title, xlabel="epoch")
    if log and all(np.min(y) > 0 for _, y in series.values()):
        ax.set_yscale("log")
        ax.minorticks_off()
    else:
        ax.set_ylim(bottom=min(0.0, *(float(np.min(y)) for _, y in series.values())))
    return fig, f"{title} over the epochs: {', '.join(series)}"


# ---- a setting's figures, as parts of a page ----------------------------------------------------------------------


def figures(setting):
    """Returns the page's sections that hold figures; a section without data is empty."""
    found = styles(setting.methods)
    return [
        _class_section(setting, found),
        _bias_section(setting),
        _confusion_section(setting),
        _training_section(setting, found),
    ]


def _mean_of(method, key):
    """Averages an array of the test results over a method's runs; None where no run has it."""
    found = [run["test"][key] for run in method.runs.values() if run["test"].get(key)]
    same = found and len({np.shape(array) for array in found}) == 1
    return np.mean(np.array(found, float), axis=0) if same else None


def _with_teacher(setting):
    return [*setting.methods, *filter(None, [setting.teacher_method()])]


def _class_section(setting, found):
    run = next((run for run in setting.runs if run.get("class_counts")), {})
    counts = np.asarray(run.get("class_counts") or [], float)
    assignment = np.asarray(run.get("group_assignment") or [], int)
    order = np.argsort(-counts, kind="stable")
    names = setting.group_names() if len(assignment) == len(counts) else []
    curves = {method.label: _mean_of(method, "per_class") for method in _with_teacher(setting)}
    curves = {label: v[order] for label, v in curves.items() if v is not None and len(v) == len(counts)}
    if not curves:
        return ""
    shared = counts[order], assignment[order] if names else assignment, names
    both = [by_class(curves, found, *shared, width=width) for width in (720, 350)]
    dots = "".join(one_by_class(label, v, found[label], *shared) for label, v in curves.items())
    what = "Curves are averages over neighbouring classes; dots are classes. " if len(counts) >= 30 else ""
    return (
        f"<h3>Accuracy by class frequency</h3>{key(curves, found)}"
        f'<figure><div class="wide">{both[0]}</div><div class="narrow">{both[1]}</div></figure>'
        f'<p class="small">{what}Means over student seeds.</p><figure class="panels">{dots}</figure>'
    )


def _bias_section(setting):
    figures = []
    for teacher, run in {
        str(r["teacher"].get("hash")): (r["teacher"], r) for r in setting.runs if r.get("teacher")
    }.values():
        mass, names = teacher.get("group_mass") or {}, setting.group_names()
        assignment, counts = (
            np.asarray(run.get("group_assignment") or []),
            np.asarray(run.get("class_counts") or []),
        )
        if not mass or not len(assignment) == len(counts) > 0:
            continue
        share = lambda weights: {
            n: float(weights[assignment == g].sum() / weights.sum()) for g, n in enumerate(names)
        }
        training, classes = share(counts), share(np.ones(len(counts)))
        for kind, own in (("long_tailed", training), ("balanced", classes)):
            if set(names) <= (mass.get(kind) or {}).keys():
                marks = {"own": (own, "|")} | ({"training": (training, "D")} if kind == "balanced" else {})
                title = f"{kind.replace('_', '-')} input"
                figures.append(group_mass(title, {n: mass[kind][n] for n in names}, marks))
    if not figures:
        return ""
    return (
        "<h3>The teacher’s bias</h3><p class='small'>The teacher’s mean probability mass on each group (bars), and the share "
        f"of that input’s images in the group (<span style='color: {css(6)}'>❙</span>), which an unbiased "
        f"teacher would match. <span style='color: {css(7)}'>◇</span> marks the share of the training images.</p>"
        f'<figure class="panels">{"".join(figures)}</figure>'
    )


def _confusion_section(setting):
    maps = []
    for method in _with_teacher(setting):
        matrix = _mean_of(method, "confusion")
        names = setting.group_names()
        if matrix is None or matrix.shape != (len(names), len(names)):
            continue
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
        heat = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th>'
            + "".join(
                f'<td style="background: color-mix(in srgb, var(--c7) {0.62 * v:.0f}%, transparent)">{v:.1f}</td>'
                for v in row
            )
            + "</tr>"
            for name, row in zip(names, matrix)
        )
        maps.append(
            f"<figure><figcaption>{html.escape(method.label)}</figcaption><table><thead><tr><td></td>{head}</tr></thead>"
            f"<tbody>{heat}</tbody></table></figure>"
        )
    if not maps:
        return ""
    return (
        '<h3>Confusion between groups</h3><p class="small">Rows: the group of the true class. Columns: the group of the '
        f'predicted class, in percent of the row.</p><div class="scroll"><div class="maps">{"".join(maps)}</div></div>'
    )


def _curve(method, pick):
    """Averages a logged number over a method's runs: (epochs, values), empty where it was not logged."""
    by_epoch = collections.defaultdict(list)
    for run in method.runs.values():
        for entry in run.get("metrics") or []:
            found = pick(entry)
            if isinstance(found, (int, float)) and math.isfinite(found) and "epoch" in entry:
                by_epoch[entry["epoch"]].append(found)
    return np.array(sorted(by_epoch), float), np.array(
        [np.mean(by_epoch[epoch]) for epoch in sorted(by_epoch)]
    )


def _training_section(setting, found):
    tail = setting.tail()
    picks = {
        "test accuracy, all classes, %": lambda e: tables.value(e.get("test"), "all"),
        "test accuracy, head, %": lambda e: tables.value(e.get("test"), "groups.head"),
        f"test accuracy, {tail.split('.')[-1]}, %": lambda e: tables.value(e.get("test"), tail),
        "training accuracy, %": lambda e: e.get("train_accuracy"),
    }
    panels = []
    for title, pick in picks.items():
        series = {method.label: _curve(method, pick) for method in setting.methods}
        series = {label: curve for label, curve in series.items() if len(curve[0])}
        panels += [lines(title, series, found)] if series else []
    for method in setting.methods:
        entries = [entry for run in method.runs.values() for entry in run.get("metrics") or []]
        names = sorted({name for entry in entries for name in entry.get("terms") or {}})
        series = {n: _curve(method, lambda e, n=n: (e.get("terms") or {}).get(n)) for n in names}
        series = {n: curve for n, curve in series.items() if len(curve[0])}
        if series:
            dashes = {n: (found[method.label][0], DASHES[i % 4]) for i, n in enumerate(series)}
            panels.append(
                f"<div>{lines(f'loss terms, {method.label}', series, dashes, log=True)}{key(series, dashes)}</div>"
            )
    if not panels:
        return ""
    return f'<h3>Training</h3>{key([m.label for m in setting.methods], found)}<figure class="panels">{"".join(panels)}</figure>'
