"""Figures of reports: functions that take arrays and return a `Figure` for each panel.

Panels are small, so that a page can show them side by side on a desktop and one below
the other on a phone, with letters of the same size. Matplotlib draws them in
placeholder colours, which are then replaced by CSS variables: so the page's light and
dark colours apply to the figures, and text remains text. Invisible areas with a
`<title>` make the browser show numbers under the pointer, without a script.
"""

import collections
import copy
import dataclasses
import hashlib
import io
import itertools
import math
import re
import textwrap
from xml.etree import ElementTree

import matplotlib.figure
import numpy as np
from markupsafe import Markup

# Distinct for people with protanopia and deuteranopia too (CIELAB distance of any two
# at least 15), with a contrast of at least 3 : 1 to the page. Methods of the same
# colour differ in their dashes.
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
# Line styles of Matplotlib: (offset, lengths of dashes and gaps).
SOLID = "solid"
DASHED = (0, (4, 2))
DOTTED = (0, (1.2, 1.6))
MIXED = (0, (5, 1.6, 1.2, 1.6))
DASHES = (SOLID, DASHED, DOTTED, MIXED)
# Colour index and dashes of the known methods.
STYLES = {
    "ce": (0, SOLID),
    "balanced_softmax": (5, SOLID),
    "logit_adjusted": (5, DASHED),
    "kd": (1, SOLID),
    "wsl": (1, DASHED),
    "dkd": (2, SOLID),
    "reviewkd": (2, DASHED),
    "bkd": (4, SOLID),
    "dive": (4, DASHED),
    "ltkd": (6, SOLID),
    "ltkd_bs": (3, SOLID),
    "bikd": (7, SOLID),
    "bikd over ltkd": (7, DASHED),
    "bikd over ltkd_bs": (7, MIXED),
}
# Where a method is a point, its dashes become the shape of the marker.
MARKERS = {SOLID: "o", DASHED: "s", DOTTED: "^", MIXED: "D"}
# With this many classes or more, curves over the classes are smoothed.
MANY_CLASSES = 30
# Widths in CSS pixels.
PANEL_WIDTH = 300
DESKTOP_WIDTH = 950
PHONE_WIDTH = 343
# Placeholders of the CSS variables with these names, see `_PLACEHOLDERS`.
INK = "#010101"
QUIET = "#020202"
GRID = "#030303"
_RC = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # ids that are the same in every process
    "text.parse_math": False,  # a "$" in a name is a character
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.labelsize": 11,
    "lines.linewidth": 1.8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
# A decorator of functions that draw.
styled = matplotlib.rc_context(_RC)

_VARIABLES = ("ink", "quiet", "grid", "page", *(f"c{i}" for i in range(len(LIGHT))))
_LIGHT_PAGE = ("#1d1d1b", "#63625e", "#e3e0d9", "#fdfcfa")
_DARK_PAGE = ("#e6e4df", "#a3a19b", "#35363a", "#17181a")
LIGHT_VARIABLES = dict(zip(_VARIABLES, (*_LIGHT_PAGE, *LIGHT)))
DARK_VARIABLES = dict(zip(_VARIABLES, (*_DARK_PAGE, *DARK)))


def method_styles(methods):
    """Returns {label: (colour index, dashes)} of methods and of the teacher.

    The name sets the colour. Dashes distinguish methods of the same name.
    """
    all_styles = itertools.product(range(len(LIGHT)), DASHES)
    free_styles = [style for style in all_styles if style not in STYLES.values()]
    styles: dict = {}
    repeats = collections.Counter()
    for method in methods:
        if method.name in STYLES:
            index, dashes = STYLES[method.name]
            position = DASHES.index(dashes) + repeats[method.name]
            styles[method.label] = index, DASHES[position % len(DASHES)]
            repeats[method.name] += 1
            continue
        # By its name, so that it is nearly always the same in every figure; the next
        # one where another method has it.
        position = sum(method.name.encode()) % len(free_styles)
        while free_styles[position] in styles.values():
            position = (position + 1) % len(free_styles)
        styles[method.label] = free_styles[position]
    styles["teacher"] = None, DOTTED
    return styles


def colour(index):
    """Returns the placeholder of a method's colour for Matplotlib; None is the ink."""
    return INK if index is None else f"#0100{0x10 + index:02x}"


def css_colour(index):
    """Returns a method's colour in CSS; None is the ink."""
    return "var(--ink)" if index is None else f"var(--c{index})"


def symbol(text, index):
    """Returns a symbol in a method's colour, as HTML for a paragraph."""
    return Markup('<span style="color: {}">{}</span>').format(css_colour(index), text)


# The marks of `draw_group_mass`, for texts that explain them.
_TRUE_SHARE_COLOUR = 6
_TRAINING_SHARE_COLOUR = 7
TRUE_SHARE_SYMBOL = symbol("❙", _TRUE_SHARE_COLOUR)
TRAINING_SHARE_SYMBOL = symbol("◇", _TRAINING_SHARE_COLOUR)

# {colour in Matplotlib's output: name of the CSS variable that replaces it}.
_PLACEHOLDERS = {INK: "ink", QUIET: "quiet", GRID: "grid"}
_PLACEHOLDERS |= {colour(i): f"c{i}" for i in range(len(LIGHT))}


# Figures as objects.


@dataclasses.dataclass(frozen=True)
class Legend:
    """Holds the labels of a figure's lines or markers, with their styles.

    Several figures of a page may share a legend, which is above them.

    Attributes:
      styles: {label: (colour index, dashes)}.
      markers: whether the samples are markers, not lines.
      below: whether the legend is for one figure, and below it.
    """

    styles: dict
    markers: bool = False
    below: bool = False

    def samples(self):
        """Returns (label, attributes of an SVG path in a box of 30 by 10) pairs."""
        draw = _marker_sample if self.markers else _line_sample
        return [(label, draw(*style)) for label, style in self.styles.items()]


_MARKER_PATHS = {
    "o": "M10 5a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M10.5.5h9v9h-9z",
    "^": "M15 0l5.5 10h-11z",
    "D": "M15-.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
}


def _marker_sample(index, dashes):
    style = f"fill: {css_colour(index)}"
    return {"d": _MARKER_PATHS[MARKERS[dashes]], "style": style}


def _line_sample(index, dashes):
    style = f"stroke: {css_colour(index)}"
    path = {"d": "M0 5h30", "stroke-width": "3", "style": style}
    if dashes != SOLID:
        # Matplotlib multiplies the lengths by the width of the line, which is about 2.
        _, lengths = dashes
        path["stroke-dasharray"] = " ".join(f"{2 * length:g}" for length in lengths)
    return path


@dataclasses.dataclass(frozen=True)
class Figure:
    """Holds an SVG element.

    Attributes:
      name: of the figure, and of its file.
      description: for people who cannot see it.
      element: the root of the SVG.
      legend: of its lines or markers, if it needs one.
    """

    name: str
    description: str
    element: ElementTree.Element
    legend: Legend | None = None

    def __html__(self):
        """Returns the element for a page, which shows the legend separately."""
        return ElementTree.tostring(self.element, encoding="unicode")

    def file(self):
        """Returns the text of an SVG file with light colours, fonts and the legend."""
        root = copy.deepcopy(self.element)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        if self.legend:
            width, height = _append_legend(root, self.legend, width, height)
        root.attrib |= {
            "width": f"{width:g}",
            "height": f"{height:g}",
            "viewBox": f"0 0 {width:g} {height:g}",
            "font-family": "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif",
        }
        text = ElementTree.tostring(root, encoding="unicode")
        # A file has no page that defines the CSS variables.
        for name, value in LIGHT_VARIABLES.items():
            text = text.replace(f"var(--{name})", value)
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


def _append_legend(root, legend, width, height):
    """Appends a legend below a figure, and returns the new width and height."""
    group = ElementTree.SubElement(root, "g", {"class": "key", "font-size": "11"})
    margin = 8
    left: float = margin
    right = width
    y = height + 14
    for label, attributes in legend.samples():
        # An estimate: the width of the text depends on the reader's fonts.
        length = 54 + 6.4 * len(label)
        if left > margin and left + length > width:
            left = margin
            y += 18
        sample = ElementTree.SubElement(
            group, "g", transform=f"translate({left:g} {y - 5:g})"
        )
        ElementTree.SubElement(sample, "path", attributes)
        position = {"x": f"{left + 38:g}", "y": f"{y + 4:g}"}
        text = ElementTree.SubElement(group, "text", position, style="fill: var(--ink)")
        text.text = _printable(label)
        left += length
        right = max(right, left)
    return right, y + 14


def to_figure(fig, name, description, *, hovers=(), legend=None):
    """Returns a Matplotlib figure as a `Figure`.

    Args:
      fig: a figure of `canvas`.
      name: its name, also of its file.
      description: for people who cannot see it.
      hovers: SVG elements from `hover_areas`, `hover_discs` or `dots`.
      legend: of its lines or markers.
    """
    buffer = io.StringIO()
    # Without metadata such as the date, the same figure is always the same text.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    fig.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = _printable(buffer.getvalue())
    root = ElementTree.fromstring(text)
    # The definitions hold a style sheet, which would apply to the whole page.
    definitions = root.find(f"{_SVG}defs")
    assert definitions is not None
    root.remove(definitions)
    # Ids must be unique on a page: figures with the same prefix are the same figure.
    prefix = f"f{hashlib.md5(text.encode()).hexdigest()[:8]}"
    for element in root.iter():
        _adapt(element, prefix)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "xmlns:xlink": "http://www.w3.org/1999/xlink",
        "role": "img",
        "aria-label": _printable(f"{name}: {description}"),
        "viewBox": root.attrib["viewBox"],
    }
    if hovers:
        attributes = {"class": "hovers", "fill": "none", "pointer-events": "all"}
        group = ElementTree.SubElement(root, "g", attributes)
        group.extend(hovers)
    return Figure(name, description, root, legend)


_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


def _printable(text):
    """Returns a text with "?" for control characters, which XML does not allow."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", text)


def _adapt(element, prefix):
    """Adapts one of Matplotlib's SVG elements to a page, in place.

    Removes namespaces, makes ids unique, shortens numbers, and replaces placeholder
    colours by CSS variables.
    """
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.tag == "g":
        # Matplotlib numbers the groups, and nothing refers to these ids.
        element.attrib.pop("id", None)
    if not (element.text or "").strip():
        element.text = None
    # Setting an attribute anew keeps the order in which they were.
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        value = _adapt_value(key, value, prefix)
        element.set(key.replace(_XLINK, "xlink:"), " ".join(value.split()))


def _adapt_value(key, value, prefix):
    if key == "id":
        value = prefix + value
    elif key == f"{_XLINK}href":
        value = value.replace("#", f"#{prefix}")
    else:
        value = value.replace("url(#", f"url(#{prefix}")
        value = re.sub(r"-?\d+\.\d{2,}", _round, value)
    if key == "style":
        # The page sets the font.
        declarations = value.split("; ")
        kept = [part for part in declarations if not part.startswith("font-family")]
        value = "; ".join(kept)
        for placeholder, name in _PLACEHOLDERS.items():
            value = value.replace(placeholder, f"var(--{name})")
    return value


def _round(match):
    return f"{float(match[0]):.1f}".removesuffix(".0")


# Empty figures.


def canvas(width=PANEL_WIDTH, height=190, *, left=34, right=12, bottom=40):
    """Returns an empty Matplotlib figure of a size and margins in CSS pixels.

    The margins are fixed, so that the axes of neighbouring panels are aligned.
    """
    fig = matplotlib.figure.Figure(figsize=(width / 72, height / 72), dpi=72)
    fig.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - 25 / height, hspace=0.3
    )
    return fig


def panel(title, *, height=190, left=34, right=12):
    """Returns the figure and the axes of a panel.

    It is higher than `height` if the title takes several lines.
    """
    lines = textwrap.wrap(title, int((PANEL_WIDTH - left) / 7.4))
    extra = 15 * max(0, len(lines) - 1)
    fig = canvas(height=height + extra, left=left, right=right)
    fig.subplots_adjust(top=1 - (25 + extra) / (height + extra))
    ax = fig.subplots()
    ax.set_title("\n".join(lines))
    return fig, ax


# What a pointer shows.


def hover_areas(ax, xs, ys, texts):
    """Returns rectangles that show their texts under a pointer.

    The limits of the axes must be final.

    Args:
      ax: the axes.
      xs: (left, right) of each rectangle, or None for the whole axis.
      ys: (bottom, top) of each rectangle, or None for the whole axis.
      texts: one for each rectangle.
    """
    shape = len(texts), 2
    xs = np.broadcast_to(xs or ax.get_xlim(), shape)
    ys = np.broadcast_to(ys or ax.get_ylim(), shape)
    corners = [_to_pixels(ax, xs[:, i], ys[:, i]) for i in range(2)]
    # Sorted, because an axis may be inverted, and y points down in SVG.
    upper_left, lower_right = np.sort(corners, axis=0)
    rectangles = []
    for (left, top), (right, bottom), text in zip(upper_left, lower_right, texts):
        path = f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"
        rectangles.append(_with_title("path", text, d=path))
    return rectangles


def hover_discs(ax, xs, ys, texts, radius=9):
    """Returns discs around points, which show their texts under a pointer."""
    discs = []
    for (x, y), text in zip(_to_pixels(ax, xs, ys), texts):
        centre = {"cx": f"{x:.1f}", "cy": f"{y:.1f}"}
        discs.append(_with_title("circle", text, **centre, r=f"{radius}"))
    return discs


def dots(ax, xs, ys, texts, index):
    """Returns visible dots in a method's colour, which show texts under a pointer.

    An invisible stroke makes the area that reacts larger than the dot.
    """
    style = f"fill: {css_colour(index)}; fill-opacity: 0.6"
    group = ElementTree.Element("g", {"class": "dots", "style": style})
    group.attrib |= {"stroke": "#000", "stroke-opacity": "0", "stroke-width": "5"}
    group.extend(hover_discs(ax, xs, ys, texts, radius=1.8))
    return [group]


def _with_title(tag, text, **attributes):
    element = ElementTree.Element(tag, attributes)
    ElementTree.SubElement(element, "title").text = _printable(text)
    return element


def _to_pixels(ax, xs, ys):
    """Returns points of the data in CSS pixels from the upper left, `[N, 2]`."""
    # Matplotlib computes automatic limits late; reading them makes it do so now.
    ax.get_xlim()
    ax.get_ylim()
    x, y = ax.transData.transform(np.stack([xs, ys], axis=-1)).T
    return np.stack([x, ax.figure.bbox.height - y], axis=-1)


# Figures that several pages show.


@styled
def draw_group_mass(title, mass, true_share, training_share):
    """Draws the probability mass of each group as a bar.

    Ticks mark the true shares of the input, diamonds those of the training images. All
    arguments but the title are {group: number}.
    """
    names = list(mass)
    rows = range(len(names))
    left = min(110, 14 + 7 * max(map(len, names)))
    fig, ax = panel(title, height=64 + 36 * len(names), left=left, right=40)
    ax.barh(rows, mass.values(), height=0.56, color=QUIET, alpha=0.45)
    if training_share != true_share:
        diamonds = {
            "markersize": 7,
            "markeredgecolor": colour(_TRAINING_SHARE_COLOUR),
            "markerfacecolor": "none",
            "markeredgewidth": 1.8,
            "clip_on": False,
        }
        ax.plot([training_share[name] for name in names], rows, "D", **diamonds)
    ticks = {
        "color": colour(_TRUE_SHARE_COLOUR),
        "markersize": 19,
        "markeredgewidth": 2.4,
        "clip_on": False,
    }
    ax.plot([true_share[name] for name in names], rows, "|", **ticks)
    texts = []
    for row, name in enumerate(names):
        # In the right margin, since the axis ends at 1.
        ax.text(1.17, row, f"{mass[name]:.2f}", ha="right", va="center")
        texts.append(
            f"{name}: mass {mass[name]:.3f}, true share {true_share[name]:.3f}, of the "
            f"training images {training_share[name]:.3f}"
        )
    # The first group is at the top.
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), yticks=rows, yticklabels=names)
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ax.set_xticks(quarters, [f"{quarter:g}" for quarter in quarters])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    hovers = hover_areas(ax, None, [(row - 0.4, row + 0.4) for row in rows], texts)
    description = ", ".join(f"{name} {mass[name]:.2f}" for name in names)
    return to_figure(fig, f"Mass by group, {title}", description, hovers=hovers)


@styled
def draw_lines(title, series, styles, *, log=False, legend_below=False):
    """Draws {label: (x, y)} over the epochs.

    Args:
      title: of the panel.
      series: what `mean_curves` returns.
      styles: {label: (colour index, dashes)}.
      log: whether y is logarithmic, if all values are positive.
      legend_below: whether the figure has a legend of its own.
    """
    fig, ax = panel(title)
    for label, (x, y) in series.items():
        index, dashes = styles[label]
        # More points than this are not visible, and make the page large.
        step = max(1, len(x) // 120)
        line = {"color": colour(index), "linestyle": dashes, "linewidth": 1.6}
        if len(x) < 3:
            line |= {"marker": "o", "markersize": 4}
        ax.plot(x[::step], y[::step], **line)
    ax.set_xlabel("epoch")
    epochs = np.concatenate([x for x, _ in series.values()])
    if epochs.min() == epochs.max() > 0:
        # Matplotlib would show fractions of an epoch around the only one.
        ax.set_xlim(0, 1.05 * epochs.max())
    lowest = min(float(np.min(y)) for _, y in series.values())
    if log and lowest > 0:
        ax.set_yscale("log")
        set_plain_log_ticks(ax)
    else:
        is_zero = not any(np.any(y) for _, y in series.values())
        ax.set_ylim(bottom=min(0.0, lowest), top=1.0 if is_zero else None)
    legend_styles = {label: styles[label] for label in series}
    legend = Legend(legend_styles, below=legend_below)
    return to_figure(fig, f"{title} over the epochs", ", ".join(series), legend=legend)


def mark_groups(ax, assignment, names):
    """Draws the borders and the names of the groups over classes sorted by group."""
    for group, name in enumerate(names):
        members = np.flatnonzero(assignment == group)
        # The first group has no border on its left.
        if group > 0 and members[0] > 0:
            ax.axvline(members[0] - 0.5, color=QUIET, linewidth=0.8, linestyle=DOTTED)
        if len(names) <= 6:
            middle = (members[0] + members[-1]) / 2
            # x is a class, and y a fraction of the axes' height.
            transform = ax.get_xaxis_transform()
            style = {"fontsize": 11, "color": QUIET, "ha": "center", "va": "top"}
            ax.text(middle, 1.0, name, transform=transform, **style)


def set_plain_log_ticks(ax):
    """Labels a logarithmic y axis with plain numbers.

    Matplotlib's own labels are formulas, which `text.parse_math` turns off.
    """
    low, high = ax.get_ylim()
    factors = (1,) if high / low > 100 else (1, 2, 5)
    ticks = []
    for power in range(-8, 9):
        for factor in factors:
            tick = factor * 10.0**power
            if low <= tick <= high:
                ticks.append(tick)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


# Logged numbers.


def mean_curves(methods, value_of):
    """Returns {label: (epochs, means over the runs)} of a logged number.

    Methods that did not log it are left out.

    Args:
      methods: {label: method}.
      value_of: a function that returns the number of (label, record), or None.
    """
    curves = {}
    for label, method in methods.items():
        values_by_epoch = collections.defaultdict(list)
        for record in logged_records(method):
            value = value_of(label, record)
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if is_number and "epoch" in record:
                values_by_epoch[record["epoch"]].append(value)
        if values_by_epoch:
            epochs = sorted(values_by_epoch)
            means = [np.mean(values_by_epoch[epoch]) for epoch in epochs]
            curves[label] = np.array(epochs, float), np.array(means)
    return curves


def logged_records(method):
    """Returns the logged records of all runs of a method."""
    records = []
    for run in method.runs.values():
        records += run.get("metrics") or []
    return records
