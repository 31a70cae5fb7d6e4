"""Figures of the report: arrays in, one inline SVG a panel out.

Panels are small, so that a page can lay them side by side on a desk and under each other on a phone at the same
size of letters. Matplotlib draws them with colours that stand for CSS variables (`STYLE_SHEET`), which are put in
afterwards: the page's light and dark colours reach into the figures, and text stays text. What a place of a figure
means, with its numbers, is told by the browser on hovering: an invisible area with a `<title>`, no script.
"""

import collections
import functools
import hashlib
import html
import io
import math
import re
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
MARKS = {SOLID: "o", DASHED: "s", DOTTED: "^", MIXED: "D"}  # where a method is a point, in place of its dashes
MANY = 30  # classes, from which on single ones are hard to tell
PANEL, DESK, PHONE = 300, 950, 350  # widths in CSS pixels
INK, QUIET, GRID, FIRST = "#010101", "#020202", "#030303", 0x10
_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11, "axes.titlesize": 12.5,
    "axes.titlelocation": "left", "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK,
    "axes.titlecolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "xtick.labelsize": 11, "ytick.labelsize": 11,
    "axes.labelsize": 11, "lines.linewidth": 1.8, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip


def _variables(colours, **others):
    return others | {f"c{i}": colour for i, colour in enumerate(colours)}


_LIGHT = _variables(LIGHT, ink="#1d1d1b", quiet="#63625e", grid="#e3e0d9", page="#fdfcfa")
_DARK = _variables(DARK, ink="#e6e4df", quiet="#a3a19b", grid="#35363a", page="#17181a")
STYLE_SHEET = """
:root {{ color-scheme: light dark; {} }}
@media (prefers-color-scheme: dark) {{ :root {{ {} }} }}
""".format(*(" ".join(f"--{name}: {v};" for name, v in variables.items()) for variables in (_LIGHT, _DARK)))


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


def key(labels, found, *, marks=False):
    """Returns the key to a figure's lines, or to its marks, as HTML."""
    box = 'viewBox="9 -1 12 12" style="width: 12px"' if marks else 'viewBox="0 0 30 10"'
    samples = [f'<svg {box} aria-hidden="true">{_sample(found[label], marks)}</svg>' for label in labels]
    entries = "".join(f"<span>{sample}{html.escape(label)}</span>" for sample, label in zip(samples, labels))
    return f'<p class="key">{entries}</p>'


def _sample(style, marks):
    """Draws a method's line, or its mark, in a box of 30 by 10."""
    index, dashes = style
    if marks:
        shape = {"o": "M10 5a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "s": "M10.5.5h9v9h-9z", "^": "M15 0l5.5 10h-11z"}
        return f'<path d="{shape.get(MARKS[dashes], "M15-.5l5.5 5.5l-5.5 5.5l-5.5-5.5z")}" style="fill: {css(index)}"/>'
    dashed = "" if dashes == SOLID else f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in dashes[1])}"'
    return f'<path d="M0 5h30" stroke-width="3"{dashed} style="stroke: {css(index)}"/>'


def css(index):
    """Returns a method's colour for the page."""
    return "var(--ink)" if index is None else f"var(--c{index})"


# The one way from a figure to SVG.


def figure(width=PANEL, height=190, *, left=34, right=12):
    """Returns an empty figure, in CSS pixels; the margins are fixed, so that panels align."""
    fig = Figure(figsize=(width / 72, height / 72), dpi=72)
    fig.subplots_adjust(left / width, 40 / height, 1 - right / width, 1 - 25 / height, hspace=0.3)
    return fig


def panel(title, *, height=190, left=34, right=12):
    """Returns the figure and the axes of a panel, which grows by what a long title needs."""
    lines = textwrap.wrap(title, int((PANEL - left) / 7.4))
    more = 15 * max(0, len(lines) - 1)
    fig = figure(height=height + more, left=left, right=right)
    fig.subplots_adjust(top=1 - (25 + more) / (height + more))
    ax = fig.subplots()
    ax.set_title("\n".join(lines))
    return fig, ax


def areas(ax, xs, ys, texts):
    """Returns rectangles of a figure, each of which tells its text where a pointer rests on it.

    `xs` and `ys` are pairs of coordinates, or None for the axes' whole extent; the limits of the axes must be final.
    """
    xs, ys = (np.broadcast_to(v, (len(texts), 2)) for v in (xs or ax.get_xlim(), ys or ax.get_ylim()))
    corners = np.sort([_place(ax, xs[:, i], ys[:, i]) for i in range(2)], axis=0).transpose(1, 0, 2)
    paths = (f'd="M{x:.1f} {y:.1f}H{right:.1f}V{bottom:.1f}H{x:.1f}z"' for (x, y), (right, bottom) in corners)
    return [f"<path {path}><title>{html.escape(text)}</title></path>" for path, text in zip(paths, texts)]


def spots(ax, xs, ys, texts, radius=9):
    """Returns discs about points, each of which tells its text where a pointer rests on it."""
    discs = (f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"' for x, y in _place(ax, xs, ys))
    return [f"<circle {disc}><title>{html.escape(text)}</title></circle>" for disc, text in zip(discs, texts)]


def dots(ax, xs, ys, texts, index):
    """Returns small dots in a method's colour which tell their texts; they can be met a little beside them too."""
    discs = "".join(spots(ax, xs, ys, texts, radius=1.8))
    look = f'style="fill: {css(index)}; fill-opacity: 0.6" stroke="#000" stroke-opacity="0" stroke-width="5"'
    return [f'<g class="dots" {look}>{discs}</g>']


def _place(ax, xs, ys):
    """Where points of the data are in the SVG, in CSS pixels from the upper left."""
    ax.get_xlim(), ax.get_ylim()  # what Matplotlib has put off
    x, y = ax.transData.transform(np.stack([xs, ys], axis=-1)).T
    return np.stack([x, ax.figure.bbox.height - y], axis=-1)


def svg(fig, described, hovers=(), shown=None, marks=False):
    """Writes a figure as an SVG element for an HTML page.

    Args:
      fig: a figure of `figure`.
      described: for those who do not see it; what stands before its first colon names the figure's file.
      hovers: what `areas`, `spots` and `dots` returned.
      shown: {label: style} of its lines, for the key in its file; on the page a key may serve several figures.
      marks: whether these are marks rather than lines.
    """
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Ids are unique on a page: two figures with the same prefix are the same figure.
    prefix = f"f{hashlib.md5(text.encode()).hexdigest()[:8]}"
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", lambda tag: _lean(tag[0], prefix), text)).strip()
    opening = f'<svg role="img" aria-label="{html.escape(described)}"'
    text = re.sub(r'<svg( xmlns:xlink="[^"]*") width="[^"]*" height="[^"]*"', lambda m: opening + m[1], text, count=1)
    added = f'<g class="hovers" fill="none" pointer-events="all">{"".join(hovers)}</g>' if hovers else ""
    return text.removesuffix("</svg>") + added + (_file_key(fig, shown, marks) if shown else "") + "</svg>"


def _file_key(fig, shown, marks):
    """The key in a figure's file, below the figure; `on_page` takes it away."""
    width, height = fig.get_size_inches() * 72
    x, y, right, parts = 8, height + 14, width, []
    for label, style in shown.items():
        length = 54 + 6.4 * len(label)
        if x > 8 and x + length > width:
            x, y = 8, y + 18
        text = f'<text x="{x + 38}" y="{y + 4:g}" style="fill: var(--ink)">{html.escape(label)}</text>'
        parts.append(f'<g transform="translate({x:g} {y - 5:g})">{_sample(style, marks)}</g>{text}')
        x += length
        right = max(right, x)
    return f'<g class="key" data-right="{right:g}" data-bottom="{y + 14:g}" font-size="11">{"".join(parts)}</g>'


FIGURE = re.compile(r'<svg role="img" aria-label="([^"]*)".*?</svg>', re.S)
_FILE_KEY = re.compile(r'<g class="key" data-right="([\d.]+)" data-bottom="([\d.]+)".*(?=</svg>)', re.S)


def on_page(figure):
    """Returns a figure's SVG element as a page shows it, which has the key elsewhere."""
    return _FILE_KEY.sub("", figure)


def in_file(figure):
    """Returns a figure's SVG element as a file of its own: in the light colours, with a size, fonts and its key."""
    found = _FILE_KEY.search(figure)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure).groups()
    width, height = found.groups() if found else (width, height)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    fonts = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
    figure = re.sub(r'viewBox="[^"]*"', f'{size} font-family="{fonts}"', figure, count=1)
    figure = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", figure)  # XML has no place for them
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + re.sub(r"var\(--(\w+)\)", lambda m: _LIGHT[m[1]], figure)


def _lean(tag, prefix):
    """Shortens a tag, puts the CSS variables in, makes its ids unique; text between tags is left alone."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"| transform="rotate\(-?0 [^)]*\)"|font-family: [^;"]*;? ?', "", tag)
    tag = re.sub(r'( id="|xlink:href="#|clip-path="url\(#)', rf"\g<1>{prefix}", tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), tag)
    names = {INK: "ink", QUIET: "quiet", GRID: "grid"} | {colour(i): f"c{i}" for i in range(len(LIGHT))}
    tag = re.sub(r"(?<=: )#0[0-9a-f]{5}\b", lambda found: f"var(--{names[found[0]]})", tag)
    return re.sub(r"\s+", " ", tag).replace(' "', '"')


def styled(draw):
    """Turns a function that returns what `svg` takes into one that returns SVG in the report's style."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(_RC):
            return svg(*draw(*args, **kwargs))

    return drawn


# Figures that several pages show.


@styled
def group_mass(title, mass, fair, training):
    """Draws the mass per group as bars, the true shares as ticks, those of the training images as diamonds."""
    longest = max(len(name) for name in mass)
    fig, ax = panel(title, height=64 + 36 * len(mass), left=min(110, 14 + 7 * longest), right=40)
    names, rows = list(mass), range(len(mass))
    ax.barh(rows, [mass[name] for name in names], height=0.56, color=QUIET, alpha=0.45)
    hollow = {"markersize": 7, "markeredgecolor": colour(7), "markerfacecolor": "none", "markeredgewidth": 1.8}
    if training != fair:
        ax.plot([training[name] for name in names], rows, "D", clip_on=False, **hollow)
    fair_at = [fair[name] for name in names]
    ax.plot(fair_at, rows, "|", color=colour(6), markersize=19, markeredgewidth=2.4, clip_on=False)
    for row, name in enumerate(names):
        ax.text(1.17, row, f"{mass[name]:.2f}", ha="right", va="center")
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), yticks=rows, yticklabels=names)
    ticks = (0, 0.25, 0.5, 0.75, 1)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    told = [
        f"{n}: mass {mass[n]:.3f}, true share {fair[n]:.3f}, of the training images {training[n]:.3f}" for n in names
    ]
    hovers = areas(ax, None, [(row - 0.4, row + 0.4) for row in rows], told)
    return fig, f"Mass by group, {title}: " + ", ".join(f"{name} {mass[name]:.2f}" for name in names), hovers


@styled
def lines(title, series, found, *, log=False):
    """Draws {label: (x, y)} over the epochs."""
    fig, ax = panel(title)
    for label, (x, y) in series.items():
        index, dashes = found[label]
        thin = max(1, len(x) // 120)
        marker = {"marker": "o", "markersize": 4} if len(x) < 3 else {}
        ax.plot(x[::thin], y[::thin], color=colour(index), linestyle=dashes, linewidth=1.6, **marker)
    ax.set_xlabel("epoch")
    if log and all(np.min(y) > 0 for _, y in series.values()):
        ax.set_yscale("log")
        plain_log(ax)
    else:
        ax.set_ylim(bottom=min(0.0, *(float(np.min(y)) for _, y in series.values())))
    return fig, f"{title} over the epochs: {', '.join(series)}", (), {label: found[label] for label in series}


def mark_groups(ax, assignment, names):
    """Draws the borders of the groups, and their names above; the classes are sorted by count."""
    starts = [int(np.argmax(assignment == g)) for g in range(len(names))] if len(names) else []
    for g, start in enumerate(starts):
        if start:
            ax.axvline(start - 0.5, color=QUIET, linewidth=0.8, linestyle=DOTTED)
        middle = (start + np.flatnonzero(assignment == g)[-1]) / 2
        if len(names) <= 6:
            above = ax.get_xaxis_transform()
            ax.text(middle, 1.0, names[g], transform=above, ha="center", va="top", fontsize=11, color=QUIET)


def plain_log(ax):
    """Labels a logarithmic axis with plain numbers; Matplotlib's own labels are formulas."""
    low, high = ax.get_ylim()
    steps = (1,) if high / low > 100 else (1, 2, 5)
    ticks = [s * 10.0**e for e in range(-8, 9) for s in steps if low <= s * 10.0**e <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def heat_map(label, matrix, names):
    """Writes a matrix in percent as a table whose cells are the darker, the larger they are."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    rows = []
    for name, row in zip(names, matrix):
        shade = [f"background: color-mix(in srgb, var(--c7) {0.62 * v:.0f}%, transparent)" for v in row]
        told = [f"{label}: {v:.1f} % of {name} taken for {other}" for other, v in zip(names, row)]
        cells = "".join(
            f'<td style="{style}" title="{html.escape(words)}">{v:.1f}</td>'
            for style, words, v in zip(shade, told, row)
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    caption = f"<figcaption>{html.escape(label)}</figcaption>"
    body = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<figure class="scroll">{caption}{body}</figure>'


# What was logged.


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
    """Leaves out what was not logged."""
    return {label: curve for label, curve in curves.items() if len(curve[0])}
