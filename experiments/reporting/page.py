"""Writes a page: one HTML file that needs no network, and the files beside it.

A page is light or dark, and fits a desktop or a phone. It is a list of components: the
classes below and `writers.Table`. The templates (templates/parts.html) turn components
into HTML. A folder beside the page has each of its figures as an SVG file, which the
page does not need.
"""

import collections
import dataclasses
import pathlib
import re

import jinja2
from markupsafe import Markup

from experiments.reporting import figures
from experiments.reporting.figures import Legend

# At the end of each SVG file that this module writes, so that it removes no other.
_SIGNATURE = "<!-- written with the page beside this folder, and removed with it -->"


@dataclasses.dataclass
class Section:
    """Holds components below a heading.

    The names of its figures' files begin with its anchor.
    """

    title: str
    components: list
    anchor: str = ""


@dataclasses.dataclass
class Heading:
    """Holds a heading, of level 1 (the page's) to 4."""

    text: str
    level: int = 3


@dataclasses.dataclass
class Text:
    """Holds a paragraph, of which `Markup` is not escaped.

    The kind is its CSS class: "small", "lead", or "key" for a line above something.
    """

    text: str
    kind: str = "small"


@dataclasses.dataclass
class Contents:
    """Holds links to sections, as (anchor, title) pairs."""

    links: list


@dataclasses.dataclass
class Details:
    """Holds components that are hidden until a reader opens them."""

    summary: str
    components: list


@dataclasses.dataclass
class Code:
    """Holds a text in a monospaced font."""

    text: str


@dataclasses.dataclass
class Panels:
    """Holds figures side by side, or in one column on a phone, and their legend."""

    figures: list
    legend: Legend | None = None


@dataclasses.dataclass
class ResponsiveFigure:
    """Holds two forms of one figure, [for a wide page, for a narrow page]."""

    figures: list
    legend: Legend | None = None


@dataclasses.dataclass
class HeatMaps:
    """Holds matrices in percent, {label: matrix}, and the names of rows and columns."""

    matrices: dict
    names: list


def _html(component):
    """Renders a component by the macro that has the name of its class."""
    macro = getattr(_MACROS, type(component).__name__.lower())
    return Markup(macro(component))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
    # Names and commands of runs may contain any characters.
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    # A name that does not exist is an error, not an empty text.
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters["html"] = _html
_ENVIRONMENT.globals["zip"] = zip
_MACROS = _ENVIRONMENT.get_template("parts.html").module


def anchor(title):
    """Returns a title in a form that fits an address and a file name.

    >>> anchor("cifar100, imbalance 100, resnet32x4 → resnet8x4")
    'cifar100-imbalance-100-resnet32x4-resnet8x4'
    """
    name = re.sub(r"\W+", "-", title.lower().replace("’", ""))
    # File systems limit the bytes of a name, and a letter may have several.
    name = name.encode()[:100].decode(errors="ignore")
    return name.strip("-") or "page"


def write(path, title, components, files=None):
    """Writes a page, and the folder beside it: `report_files` for `report.html`.

    Args:
      path: of the page.
      title: of the window.
      components: of the page, the first a heading of level 1.
      files: {name: text} of other files for the folder.
    """
    path = pathlib.Path(path)
    files = files or {}
    folder = path.with_name(f"{path.stem}_files")
    all_files = files | _figure_files(components)
    _write_files(folder, all_files)
    html = _ENVIRONMENT.get_template("page.html").render(
        title=title,
        components=components,
        folder=folder.name,
        files=["each figure as an SVG file", *files] if all_files else [],
        light=figures.LIGHT_VARIABLES,
        dark=figures.DARK_VARIABLES,
    )
    path.write_text(html, encoding="utf-8", errors="replace")


def _figure_files(components):
    """Returns {name: text} of the SVG files of a page; equal names are numbered."""
    files = {}
    repeats = collections.Counter()
    for name, figure in _named_figures(components):
        repeats[name] += 1
        number = f"-{repeats[name]}" if repeats[name] > 1 else ""
        files[f"{name}{number}.svg"] = figure.file() + _SIGNATURE
    return files


def _named_figures(components, prefix=""):
    """Yields (file name without its ending, figure) of all figures of a page."""
    for component in components:
        if isinstance(component, Section):
            section_prefix = f"{component.anchor}_" if component.anchor else ""
            yield from _named_figures(component.components, section_prefix)
        # `Panels` and `ResponsiveFigure` have figures.
        for figure in getattr(component, "figures", ()):
            yield prefix + anchor(figure.name), figure


def _write_files(folder, files):
    """Writes the files, and removes figures of an earlier page.

    Figures that this module did not write stay.
    """
    for path in folder.glob("*.svg"):
        if path.name not in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.rstrip().endswith(_SIGNATURE):
                path.unlink()
    if files:
        folder.mkdir(exist_ok=True)
    for name, text in files.items():
        text = text.rstrip() + "\n"
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
