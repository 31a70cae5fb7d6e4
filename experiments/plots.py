"""Figures of the report: arrays in, one inline SVG a panel out.

Panels are small, so that a page can lay them side by side on a desk and under each other on a phone at the same
size of letters. Matplotlib draws them with colours that stand for CSS variables (`STYLE_SHEET`), which are put in
afterwards: the page's light and dark colours reach into the figures, and text stays text.
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

# Told apart by people with protanopia and deuteranopia too (CIELAB distance of any two at least 15), and at least
# 3 : 1 against the page. Where a colour serves two methods, the dashes tell them apart.
LIGHT = ("#8c8c8c", "#c68300", "#0b5f4a", "#743f9c", "#4499cb", "#6b4216", "#b8420f", "#2c57d0")
DARK = ("#d0d0d0", "#f0cf4a", "#4fdf9a", "#a878b8", "#86c8f5", "#a9795c", "#ee7a3a", "#5f7df0")
SOLID, DASHED, DOTTED, MIXED = "solid", (0, (4, 2)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6))
DASHES = (SOLID, DASHED, DOTTED, MIXED)
STYLES = {
    "ce": (0, SOLID), "balanced_softmax": (5, SOLID), "logit_adjusted": (5, DASHED), "kd": (1, SOLID),
    "wsl": (1, DASHED), "dkd": (2, SOLID), "reviewkd": (2, DASHED), "bkd": (4, SOLID), "dive": (4, DASHED),
    "ltkd": (6, SOLID), "ltkd_bs": (3, SOLID), "bikd": (7, SOLID), "bikd over ltkd": (7, DASHED),
    "bikd over ltkd_bs": (7, MIXED),
}  # fmt: skip
MANY = 30  # classes, from which on curves are smoothed
PANEL, DESK, PHONE = 300, 950, 350  # widths in CSS pixels
INK, QUIET, GRID, FIRST = "#010101", "#020202", "#030303", 0x10
_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11, "axes.titlesize": 12,
    "axes.titlelocation": "left", "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK,
    "axes.titlecolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "axes.labelsize": 10.5, "lines.linewidth": 1.8, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip


def _variables(colours, ink, quiet, grid, page):
    named = " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))
    return f"--ink: {ink}; --quiet: {quiet}; --grid: {grid}; --page: {page}; {named}"


STYLE_SHEET = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT, "#1d1d1b", "#63625e", "#e3e0d9", "#fdfcfa")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, "#e6e4df", "#a3a19b", "#35363a", "#17181a")} }} }}
"""


def styles(methods):
    """Returns {label: (colour index, dashes)}: the name decides the colour, dashes tell its rows apart."""
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
        entries.append(f'<span><svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>{html.escape(label)}</span>')
    return f'<p class="key">{"".join(entries)}</p>'


def css(index):
    """Returns a method's colour for the page."""
    return "var(--ink)" if index is None else f"var(--c{index})"


# The one way from a figure to SVG.


def figure(width=PANEL, height=190, *, left=34, right=12):
    """Returns an empty figure, in CSS pixels; the margins are fixed, so that panels align."""
    fig = Figure(figsize=(width / 72, height / 72))
    fig.subplots_adjust(left / width, 38 / height, 1 - right / width, 1 - 24 / height, hspace=0.3)
    return fig


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
    opening = f'<svg role="img" aria-label="{html.escape(described)}"'
    return re.sub(r'<svg( xmlns:xlink="[^"]*") width="[^"]*" height="[^"]*"', lambda m: opening + m[1], text, count=1)


def _lean(tag, prefix):
    """Shortens a tag, puts the CSS variables in, makes its ids unique; text between tags is left alone."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"| transform="rotate\(-?0 [^)]*\)"|font-family: [^;"]*;? ?', "", tag)
    tag = re.sub(r'( id="|xlink:href="#|clip-path="url\(#)', rf"\g<1>{prefix}", tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), tag)
    names = {INK: "ink", QUIET: "quiet", GRID: "grid"} | {colour(i): f"c{i}" for i in range(len(LIGHT))}
    tag = re.sub(r"(?<=: )#0[0-9a-f]{5}\b", lambda found: f"var(--{names[found[0]]})", tag)
    return re.sub(r"\s+", " ", tag).replace(' "', '"')


def styled(draw):
    """Turns a function that returns (figure, description) into one that returns SVG in the report's style."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(_RC):
            return svg(*draw(*args, **kwargs))

    return drawn


# Accuracy by class.


def smooth(values):
    """Averages over neighbouring classes, by a Gaussian, where there are too many to read."""
    values = np.asarray(values, float)
    if len(values) < MANY:
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
            ax.text(middle, 1.0, names[g], transform=above, ha="center", va="top", fontsize=9.5, color=QUIET)


def _plain_log(ax):
    """Labels a logarithmic axis with plain numbers; Matplotlib's own labels are formulas."""
    low, high = ax.get_ylim()
    steps = (1,) if high / low > 100 else (1, 2, 5)
    ticks = [s * 10.0**e for e in range(-8, 9) for s in steps if low <= s * 10.0**e <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


@styled
def by_class(curves, found, counts, assignment, names, *, width=DESK):
    """Draws the (smoothed) accuracy of every method by class, sorted by count, over the counts themselves."""
    fig = figure(width, 350)
    ax, strip = fig.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
    for label, values in curves.items():
        index, dashes = found[label]
        dotted = {"marker": "o", "markersize": 4} if len(values) < MANY else {}
        ax.plot(smooth(values), color=colour(index), linestyle=dashes, **dotted)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("test accuracy, %")
    _mark_groups(ax, assignment, names)
    strip.fill_between(np.arange(len(counts)), counts, 0.8, step="mid", color=QUIET, alpha=0.45, linewidth=0)
    strip.set_yscale("log")
    strip.set_title("training images (log scale)", fontsize=10.5)
    strip.set_xlabel("class, the most frequent first")
    strip.set_xlim(-0.5, len(counts) - 0.5)
    _plain_log(strip)
    what = "Smoothed test accuracy" if len(counts) >= MANY else "Test accuracy"
    return fig, f"{what} of each class, sorted by training images: {', '.join(curves)}"


@styled
def one_by_class(label, values, style, counts, assignment, names):
    """Draws one method's accuracy of every class as dots, with the smoothed curve through them."""
    fig = figure()
    ax = fig.subplots()
    x = np.arange(len(values))
    ax.plot(x, values, "o", color=colour(style[0]), markersize=3.4, markeredgewidth=0, alpha=0.55)
    ax.plot(x, smooth(values), color=colour(style[0]), linestyle=style[1])
    ax.set(ylim=(0, 115), xlim=(-1, len(values)), title=label, yticks=range(0, 101, 25))
    ticks = np.unique(np.linspace(0, len(counts) - 1, 5).round().astype(int))
    ax.set_xticks(ticks, [f"{counts[i]:g}" for i in ticks])
    ax.set_xlabel("training images of the class")
    _mark_groups(ax, assignment, names)
    return fig, f"Test accuracy of each class for {label}, against the class's number of training images"


# The teacher's bias.


@styled
def group_mass(title, mass, fair, training):
    """Draws the teacher's mass per group as bars, the fair shares as ticks, the training images' as diamonds."""
    longest = max(len(name) for name in mass)
    fig = figure(height=64 + 36 * len(mass), left=min(110, 14 + 6 * longest), right=38)
    ax = fig.subplots()
    names, rows = list(mass), range(len(mass))
    ax.barh(rows, [mass[name] for name in names], height=0.56, color=QUIET, alpha=0.45)
    hollow = {"markersize": 7, "markeredgecolor": colour(7), "markerfacecolor": "none", "markeredgewidth": 1.8}
    if training != fair:
        ax.plot([training[name] for name in names], rows, "D", clip_on=False, **hollow)
    fair_at = [fair[name] for name in names]
    ax.plot(fair_at, rows, "|", color=colour(6), markersize=19, markeredgewidth=2.4, clip_on=False)
    for row, name in enumerate(names):
        ax.text(1.17, row, f"{mass[name]:.2f}", ha="right", va="center")
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), title=title, yticks=rows, yticklabels=names)
    ticks = (0, 0.25, 0.5, 0.75, 1)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    return fig, f"{title}: " + ", ".join(f"{name} {mass[name]:.2f}" for name in names)


# Training.


@styled
def lines(title, series, found, *, log=False):
    """Draws {label: (x, y)} over the epochs."""
    fig = figure()
    ax = fig.subplots()
    for label, (x, y) in series.items():
        index, dashes = found[label]
        thin = max(1, len(x) // 120)
        marker = {"marker": "o", "markersize": 4} if len(x) < 3 else {}
        ax.plot(x[::thin], y[::thin], color=colour(index), linestyle=dashes, linewidth=1.6, **marker)
    ax.set(title=title, xlabel="epoch")
    if log and all(np.min(y) > 0 for _, y in series.values()):
        ax.set_yscale("log")
        _plain_log(ax)
    else:
        ax.set_ylim(bottom=min(0.0, *(float(np.min(y)) for _, y in series.values())))
    return fig, f"{title} over the epochs: {', '.join(series)}"


# A setting's figures, as parts of a page.


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
    both = [by_class(curves, found, *shared, width=width) for width in (DESK, PHONE)]
    dots, what = "", "Means over student seeds."
    if len(counts) >= MANY:
        drawn = "".join(one_by_class(label, v, found[label], *shared) for label, v in curves.items())
        dots = f'<figure class="panels">{drawn}</figure>'
        what = f"Curves are averages over neighbouring classes; dots are classes. {what}"
    return (
        f"<h3>Accuracy by class frequency</h3>{key(curves, found)}"
        f'<figure><div class="wide">{both[0]}</div><div class="narrow">{both[1]}</div></figure>'
        f'<p class="small">{what}</p>{dots}'
    )


def _shares(run, names):
    """Returns each group's share of a run's training images and of its classes, {} where that is not recorded."""
    assignment, counts = run.get("group_assignment") or [], run.get("class_counts") or []
    if not counts or len(assignment) != len(counts):
        return {}, {}
    belongs = [[g == assigned for assigned in assignment] for g in range(len(names))]
    images = {name: float(np.dot(mask, counts) / sum(counts)) for name, mask in zip(names, belongs)}
    return images, {name: float(np.mean(mask)) for name, mask in zip(names, belongs)}


def _bias_section(setting):
    names = setting.group_names()
    run = next((run for run in setting.runs if run.get("group_assignment")), {})
    training, classes = _shares(run, names)
    panels = []
    for teacher in setting.teachers().values():
        for kind, fair in (("long_tailed", training), ("balanced", classes)):
            mass = (teacher.get("group_mass") or {}).get(kind) or {}
            if fair and set(names) <= mass.keys():
                title = f"{kind.replace('_', '-')} input"
                panels.append(group_mass(title, {name: mass[name] for name in names}, fair, training))
    if not panels:
        return ""
    return (
        '<h3>The teacher’s bias</h3><p class="small">Bars: the teacher’s mean probability mass on each group. '
        f'<span style="color: {css(6)}">❙</span> the true share of that input’s images, which an unbiased teacher '
        f'would match. <span style="color: {css(7)}">◇</span> the share of the training images.</p>'
        f'<figure class="panels">{"".join(panels)}</figure>'
    )


def heat_map(label, matrix, names):
    """Writes a matrix in percent as a table whose cells are the darker, the larger they are."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    rows = []
    for name, row in zip(names, matrix):
        shade = [f"background: color-mix(in srgb, var(--c7) {0.62 * v:.0f}%, transparent)" for v in row]
        cells = "".join(f'<td style="{style}">{v:.1f}</td>' for style, v in zip(shade, row))
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    caption = f"<figcaption>{html.escape(label)}</figcaption>"
    body = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<figure class="scroll">{caption}{body}</figure>'


def _confusion_section(setting):
    names, maps = setting.group_names(), []
    for method in _with_teacher(setting):
        matrix = _mean_of(method, "confusion")
        if matrix is not None and matrix.shape == (len(names), len(names)):
            maps.append(heat_map(method.label, matrix, names))
    if not maps:
        return ""
    return (
        '<h3>Confusion between groups</h3><p class="small">Rows: the group of the true class. Columns: the group '
        f'of the predicted class, in percent of the row.</p><div class="maps">{"".join(maps)}</div>'
    )


def curve(method, pick):
    """Averages a logged number over a method's runs: (epochs, values), empty where it was not logged."""
    by_epoch = collections.defaultdict(list)
    for run in method.runs.values():
        for entry in run.get("metrics") or []:
            found = pick(entry)
            if isinstance(found, (int, float)) and math.isfinite(found) and "epoch" in entry:
                by_epoch[entry["epoch"]].append(found)
    epochs = sorted(by_epoch)
    return np.array(epochs, float), np.array([np.mean(by_epoch[epoch]) for epoch in epochs])


def logged(curves):
    return {label: curve for label, curve in curves.items() if len(curve[0])}


def _terms_panel(method, style):
    """Draws the loss terms of one method, each with its own dashes and a key below."""
    entries = [entry for run in method.runs.values() for entry in run.get("metrics") or []]
    names = sorted({name for entry in entries for name in entry.get("terms") or {}})
    series = logged({n: curve(method, lambda e, n=n: (e.get("terms") or {}).get(n)) for n in names})
    if not series:
        return ""
    dashes = {name: (style[0], DASHES[i % len(DASHES)]) for i, name in enumerate(series)}
    return f"<div>{lines(f'loss terms, {method.label}', series, dashes, log=True)}{key(series, dashes)}</div>"


def _training_section(setting, found):
    shown = {"all classes": "all", "head": "groups.head", setting.tail().split(".")[-1]: setting.tail()}
    picks = {
        f"test accuracy, {title}, %": lambda e, column=column: tables.value(e.get("test"), column)
        for title, column in shown.items()
    }
    picks["training accuracy, %"] = lambda e: e.get("train_accuracy")
    panels = []
    for title, pick in picks.items():
        series = logged({method.label: curve(method, pick) for method in setting.methods})
        panels += [lines(title, series, found)] if series else []
    panels += [_terms_panel(method, found[method.label]) for method in setting.methods]
    if not any(panels):
        return ""
    shared = key([method.label for method in setting.methods], found)
    return f'<h3>Training</h3>{shared}<figure class="panels">{"".join(panels)}</figure>'
