"""Figures of reports: arrays in, a `Figure` for each panel out.

Panels are small, so that a page can show them side by side on a desk and below each other on a phone with letters of
the same size. Matplotlib draws them in colours that stand for CSS variables, which replace them afterwards: the page's
light and dark colours reach into the figures, and text remains text. Invisible areas with a `<title>` make the browser
show the numbers behind a place under the pointer, without a script.
"""

import collections
import copy
import dataclasses
import hashlib
import io
import math
import re
import textwrap
from xml.etree import ElementTree

import matplotlib.figure
import numpy as np
from markupsafe import Markup

# Distinct for people with protanopia and deuteranopia too (CIELAB distance of any two at least 15), with a contrast of
# at least 3 : 1 to the page. Methods of the same colour differ in their dashes.
LIGHT = (
    "#8c8c8c",
    "#c68300",
    "#0b5f4a",
    "#743f9c",
    "#4499cb",
    "#6b4216",
    "#b8420f",
    "#2c57d0",
)
DARK = (
    "#d0d0d0",
    "#f0cf4a",
    "#4fdf9a",
    "#a878b8",
    "#86c8f5",
    "#a9795c",
    "#ee7a3a",
    "#5f7df0",
)
SOLID, DASHED, DOTTED, MIXED = (
    "solid",
    (0, (4, 2)),
    (0, (1.2, 1.6)),
    (0, (5, 1.6, 1.2, 1.6)),
)
DASHES = (SOLID, DASHED, DOTTED, MIXED)
STYLES = {
    "ce": (0, SOLID), "balanced_softmax": (5, SOLID), "logit_adjusted": (5, DASHED), "kd": (1, SOLID),
    "wsl": (1, DASHED), "dkd": (2, SOLID), "reviewkd": (2, DASHED), "bkd": (4, SOLID), "dive": (4, DASHED),
    "ltkd": (6, SOLID), "ltkd_bs": (3, SOLID), "bikd": (7, SOLID), "bikd over ltkd": (7, DASHED),
    "bikd over ltkd_bs": (7, MIXED),
}  # fmt: skip
MARKS = {SOLID: "o", DASHED: "s", DOTTED: "^", MIXED: "D"}  # of methods that are points
MANY = 30  # classes, from which on curves are smoothed
PANEL, DESK, PHONE = 300, 950, 343  # widths in CSS pixels
INK, QUIET, GRID = (
    "#010101",
    "#020202",
    "#030303",
)  # stand for the CSS variables of these names
_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11, "axes.titlesize": 12.5,
    "axes.titlelocation": "left", "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK,
    "axes.titlecolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "xtick.labelsize": 11, "ytick.labelsize": 11,
    "axes.labelsize": 11, "lines.linewidth": 1.8, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip
styled = matplotlib.rc_context(_RC)  # a decorator of functions that draw

_NAMES = ("ink", "quiet", "grid", "page", *(f"c{i}" for i in range(len(LIGHT))))
LIGHT_VARIABLES = dict(
    zip(_NAMES, ("#1d1d1b", "#63625e", "#e3e0d9", "#fdfcfa", *LIGHT))
)
DARK_VARIABLES = dict(zip(_NAMES, ("#e6e4df", "#a3a19b", "#35363a", "#17181a", *DARK)))


def styles(methods):
    """Returns {label: (colour index, dashes)}: the name sets the colour, and dashes distinguish methods of a name."""
    styles_by_label, repeats = {}, collections.Counter()
    for method in methods:
        unknown = (sum(method.name.encode()) % len(LIGHT), MIXED)
        index, dashes = STYLES.get(method.name, unknown)
        styles_by_label[method.label] = (
            index,
            DASHES[(DASHES.index(dashes) + repeats[method.name]) % len(DASHES)],
        )
        repeats[method.name] += 1
    return styles_by_label | {"teacher": (None, DOTTED)}


def colour(index):
    """Returns the colour that stands for a method's CSS variable in Matplotlib; None is the ink."""
    return INK if index is None else f"#0100{0x10 + index:02x}"


def css(index):
    """Returns a method's colour for the page."""
    return "var(--ink)" if index is None else f"var(--c{index})"


def symbol(text, index):
    """Returns a symbol in a method's colour, for a paragraph."""
    return Markup('<span style="color: {}">{}</span>').format(css(index), text)


_STAND_INS = {INK: "ink", QUIET: "quiet", GRID: "grid"} | {
    colour(i): f"c{i}" for i in range(len(LIGHT))
}


# Figures as objects.


@dataclasses.dataclass(frozen=True)
class Legend:
    """The labels of a figure's lines (or marks) with their styles, {label: (colour index, dashes)}.

    On a page several figures share a legend, which stands above them; one that is not shared stands `below` its figure.
    """

    styles: dict
    marks: bool = False
    below: bool = False

    def samples(self):
        """Returns (label, attributes of an SVG path in a box of 30 by 10) pairs."""
        draw = _mark_sample if self.marks else _line_sample
        return [(label, draw(*style)) for label, style in self.styles.items()]


def _mark_sample(index, dashes):
    shapes = {"o": "M10 5a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "s": "M10.5.5h9v9h-9z", "^": "M15 0l5.5 10h-11z",
              "D": "M15-.5l5.5 5.5l-5.5 5.5l-5.5-5.5z"}  # fmt: skip
    return {"d": shapes[MARKS[dashes]], "style": f"fill: {css(index)}"}


def _line_sample(index, dashes):
    line = {"d": "M0 5h30", "stroke-width": "3", "style": f"stroke: {css(index)}"}
    return (
        line
        if dashes == SOLID
        else line
        | {"stroke-dasharray": " ".join(f"{2 * length:g}" for length in dashes[1])}
    )


@dataclasses.dataclass(frozen=True)
class Figure:
    """An SVG element with a name, a description for those who cannot see it, and a legend where it needs one."""

    name: str
    description: str
    element: ElementTree.Element
    legend: Legend | None = None

    def __html__(self):
        """Returns the element for a page, which shows the legend beside it."""
        return ElementTree.tostring(self.element, encoding="unicode")

    def file(self):
        """Returns the text of an SVG file: in the light colours, with a size, fonts and the legend."""
        root = copy.deepcopy(self.element)
        width, height = map(float, root.get("viewBox").split()[2:])
        if self.legend:
            width, height = _append_legend(root, self.legend, width, height)
        size = {
            "width": f"{width:g}",
            "height": f"{height:g}",
            "viewBox": f"0 0 {width:g} {height:g}",
        }
        root.attrib |= size | {
            "font-family": "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
        }
        text = ElementTree.tostring(root, encoding="unicode")
        for name, value in LIGHT_VARIABLES.items():
            text = text.replace(f"var(--{name})", value)
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


def _append_legend(root, legend, width, height):
    """Appends a legend below a figure; returns the new size."""
    group = ElementTree.SubElement(root, "g", {"class": "key", "font-size": "11"})
    left, baseline, right = 8, height + 14, width
    for label, attributes in legend.samples():
        length = 54 + 6.4 * len(label)
        if left > 8 and left + length > width:
            left, baseline = 8, baseline + 18
        sample = ElementTree.SubElement(
            group, "g", transform=f"translate({left:g} {baseline - 5:g})"
        )
        ElementTree.SubElement(sample, "path", attributes)
        place = {"x": f"{left + 38:g}", "y": f"{baseline + 4:g}"}
        ElementTree.SubElement(
            group, "text", place, style="fill: var(--ink)"
        ).text = _printable(label)
        left += length
        right = max(right, left)
    return right, baseline + 14


def save(fig, name, description, *, hovers=(), legend=None):
    """Returns a Matplotlib figure as a `Figure`.

    Args:
      fig: a figure of `canvas`.
      name: its name, also of its file.
      description: for those who cannot see it.
      hovers: what `areas`, `spots` and `dots` returned.
      legend: of its lines or marks.
    """
    buffer = io.StringIO()
    fig.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = _printable(buffer.getvalue())
    root = ElementTree.fromstring(text)
    root.remove(
        root.find(f"{_SVG}defs")
    )  # a style sheet, which would reach the whole page
    # Ids must be unique on a page: figures with the same prefix are the same figure.
    prefix = f"f{hashlib.md5(text.encode()).hexdigest()[:8]}"
    for element in root.iter():
        _adapt(element, prefix)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink",
        "role": "img", "aria-label": _printable(f"{name}: {description}"), "viewBox": root.get("viewBox"),
    }  # fmt: skip
    if hovers:
        group = ElementTree.SubElement(
            root, "g", {"class": "hovers", "fill": "none", "pointer-events": "all"}
        )
        group.extend(hovers)
    return Figure(name, description, root, legend)


_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def _printable(text):
    """Returns a text with "?" for control characters, which XML does not allow."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", text)


def _adapt(element, prefix):
    """Makes one of Matplotlib's elements fit a page: no namespaces, unique ids, short numbers and CSS variables."""
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.tag == "g":
        element.attrib.pop("id", None)  # a number, which nothing refers to
    if not (element.text or "").strip():
        element.text = None
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id":
            value = prefix + value
        elif key == f"{_XLINK}href":
            value = value.replace("#", f"#{prefix}")
        else:
            value = value.replace("url(#", f"url(#{prefix}")
            value = re.sub(
                r"-?\d+\.\d{2,}",
                lambda number: f"{float(number[0]):.1f}".removesuffix(".0"),
                value,
            )
        if key == "style":
            value = "; ".join(
                part for part in value.split("; ") if not part.startswith("font-family")
            )
            for stand_in, name in _STAND_INS.items():
                value = value.replace(stand_in, f"var(--{name})")
        element.set(key.replace(_XLINK, "xlink:"), " ".join(value.split()))


# Empty figures, and what a pointer shows.


def canvas(width=PANEL, height=190, *, left=34, right=12):
    """Returns an empty Matplotlib figure, in CSS pixels; the margins are fixed, so that panels align."""
    fig = matplotlib.figure.Figure(figsize=(width / 72, height / 72), dpi=72)
    fig.subplots_adjust(
        left / width, 40 / height, 1 - right / width, 1 - 25 / height, hspace=0.3
    )
    return fig


def panel(title, *, height=190, left=34, right=12):
    """Returns the figure and the axes of a panel, which is higher where the title takes several lines."""
    lines = textwrap.wrap(title, int((PANEL - left) / 7.4))
    more = 15 * max(0, len(lines) - 1)
    fig = canvas(height=height + more, left=left, right=right)
    fig.subplots_adjust(top=1 - (25 + more) / (height + more))
    ax = fig.subplots()
    ax.set_title("\n".join(lines))
    return fig, ax


def areas(ax, xs, ys, texts):
    """Returns rectangles that show their texts under a pointer.

    `xs` and `ys` are pairs of coordinates, or None for the whole axis; the limits of the axes must be final.
    """
    xs, ys = (
        np.broadcast_to(v, (len(texts), 2))
        for v in (xs or ax.get_xlim(), ys or ax.get_ylim())
    )
    upper_left, lower_right = np.sort(
        [_to_pixels(ax, xs[:, i], ys[:, i]) for i in range(2)], axis=0
    )
    rectangles = []
    for (left, top), (right, bottom), text in zip(upper_left, lower_right, texts):
        path = f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"
        rectangles.append(_titled("path", text, d=path))
    return rectangles


def spots(ax, xs, ys, texts, radius=9):
    """Returns discs about points, which show their texts under a pointer."""
    points = zip(_to_pixels(ax, xs, ys), texts)
    return [
        _titled("circle", text, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius}")
        for (x, y), text in points
    ]


def dots(ax, xs, ys, texts, index):
    """Returns visible dots in a method's colour, which show their texts under a pointer, also a little beside them."""
    style = f"fill: {css(index)}; fill-opacity: 0.6"
    group = ElementTree.Element("g", {"class": "dots", "style": style})
    group.attrib |= {"stroke": "#000", "stroke-opacity": "0", "stroke-width": "5"}
    group.extend(spots(ax, xs, ys, texts, radius=1.8))
    return [group]


def _titled(tag, text, **attributes):
    element = ElementTree.Element(tag, attributes)
    ElementTree.SubElement(element, "title").text = _printable(text)
    return element


def _to_pixels(ax, xs, ys):
    """Returns where points of the data are in the SVG, in CSS pixels from the upper left."""
    ax.get_xlim(), ax.get_ylim()  # compute what Matplotlib has put off
    x, y = ax.transData.transform(np.stack([xs, ys], axis=-1)).T
    return np.stack([x, ax.figure.bbox.height - y], axis=-1)


# Figures that several pages show.


@styled
def group_mass(title, mass, fair, training):
    """Returns bars of the mass of each group, with ticks for the true shares and diamonds for the training images."""
    longest = max(map(len, mass))
    fig, ax = panel(
        title, height=64 + 36 * len(mass), left=min(110, 14 + 7 * longest), right=40
    )
    names, rows = list(mass), range(len(mass))
    ax.barh(rows, mass.values(), height=0.56, color=QUIET, alpha=0.45)
    if training != fair:
        hollow = {
            "markersize": 7,
            "markeredgecolor": colour(7),
            "markerfacecolor": "none",
            "markeredgewidth": 1.8,
        }
        ax.plot([training[name] for name in names], rows, "D", clip_on=False, **hollow)
    ticks = {
        "color": colour(6),
        "markersize": 19,
        "markeredgewidth": 2.4,
        "clip_on": False,
    }
    ax.plot([fair[name] for name in names], rows, "|", **ticks)
    texts = []
    for row, name in enumerate(names):
        ax.text(1.17, row, f"{mass[name]:.2f}", ha="right", va="center")
        shares = (
            f"true share {fair[name]:.3f}, of the training images {training[name]:.3f}"
        )
        texts.append(f"{name}: mass {mass[name]:.3f}, {shares}")
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), yticks=rows, yticklabels=names)
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ax.set_xticks(quarters, [f"{quarter:g}" for quarter in quarters])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    hovers = areas(ax, None, [(row - 0.4, row + 0.4) for row in rows], texts)
    described = ", ".join(f"{name} {mass[name]:.2f}" for name in names)
    return save(fig, f"Mass by group, {title}", described, hovers=hovers)


@styled
def lines(title, series, method_styles, *, log=False, legend_below=False):
    """Returns {label: (x, y)} drawn over the epochs."""
    fig, ax = panel(title)
    for label, (x, y) in series.items():
        index, dashes = method_styles[label]
        step = max(1, len(x) // 120)
        marker = {"marker": "o", "markersize": 4} if len(x) < 3 else {}
        ax.plot(
            x[::step],
            y[::step],
            color=colour(index),
            linestyle=dashes,
            linewidth=1.6,
            **marker,
        )
    ax.set_xlabel("epoch")
    lowest = min(float(np.min(y)) for _, y in series.values())
    if log and lowest > 0:
        ax.set_yscale("log")
        plain_log(ax)
    else:
        ax.set_ylim(bottom=min(0.0, lowest))
    legend = Legend(
        {label: method_styles[label] for label in series}, below=legend_below
    )
    return save(fig, f"{title} over the epochs", ", ".join(series), legend=legend)


def mark_groups(ax, assignment, names):
    """Draws the borders and the names of the groups; the classes must be sorted by group."""
    for g, name in enumerate(names):
        members = np.flatnonzero(assignment == g)
        if g and members[0]:
            ax.axvline(members[0] - 0.5, color=QUIET, linewidth=0.8, linestyle=DOTTED)
        if len(names) <= 6:
            middle = (members[0] + members[-1]) / 2
            place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
            ax.text(middle, 1.0, name, fontsize=11, color=QUIET, **place)


def plain_log(ax):
    """Labels a logarithmic axis with plain numbers; Matplotlib's own labels are formulas."""
    low, high = ax.get_ylim()
    factors = (1,) if high / low > 100 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(-8, 9) for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


# Logged numbers.


def curves(methods, pick):
    """Returns {label: (epochs, means over the runs)} of a logged number, of the methods that logged it.

    Args:
      methods: {label: method}.
      pick: a function that returns the number of a label and a record, or None.
    """
    series = {}
    for label, method in methods.items():
        by_epoch = collections.defaultdict(list)
        for run in method.runs.values():
            for record in run.get("metrics") or []:
                number = pick(label, record)
                if (
                    isinstance(number, (int, float))
                    and math.isfinite(number)
                    and "epoch" in record
                ):
                    by_epoch[record["epoch"]].append(number)
        if by_epoch:
            epochs = sorted(by_epoch)
            series[label] = (
                np.array(epochs, float),
                np.array([np.mean(by_epoch[epoch]) for epoch in epochs]),
            )
    return series
