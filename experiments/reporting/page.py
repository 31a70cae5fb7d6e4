"""A page: one HTML file that needs no network, light and dark, from desk to phone, and the files beside it.

A page is a list of parts: the classes below and `writers.Table`. Templates (templates/parts.html) turn parts into
HTML. Beside the page stands a folder with each of its figures as an SVG file, which the page does not need.
"""

import collections
import dataclasses
import pathlib
import re

import jinja2
from markupsafe import Markup

from experiments.reporting import figures

_OURS = "<!-- written with the page beside this folder, and removed with it -->"


@dataclasses.dataclass
class Section:
    """A heading with the parts below it; the files of its figures begin with its anchor."""

    title: str
    parts: list
    anchor: str = ""


@dataclasses.dataclass
class Heading:
    """A heading, from 1 (of the page) to 4."""

    text: str
    level: int = 3


@dataclasses.dataclass
class Text:
    """A paragraph: "small", the "lead", or a "key" above something; `Markup` is not escaped."""

    words: str
    kind: str = "small"


@dataclasses.dataclass
class Contents:
    """A list of links to sections: (anchor, title) pairs."""

    links: list


@dataclasses.dataclass
class Details:
    """Parts that are hidden until a reader opens them."""

    summary: str
    parts: list


@dataclasses.dataclass
class Code:
    """A text in letters of one width."""

    text: str


@dataclasses.dataclass
class Panels:
    """Figures side by side, or below each other where the page is narrow, with the legend that they share."""

    figures: list
    legend: figures.Legend | None = None


@dataclasses.dataclass
class ByWidth:
    """Two forms of one figure: for a wide and for a narrow page."""

    figures: list
    legend: figures.Legend | None = None


@dataclasses.dataclass
class HeatMaps:
    """Matrices in percent, {label: matrix}, whose rows and columns have the same names."""

    matrices: dict
    names: list


def _html(part):
    """Renders a part by the macro that has the name of its class."""
    return Markup(getattr(_PARTS, type(part).__name__.lower())(part))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters["html"] = _html
_ENVIRONMENT.globals["zip"] = zip
_PARTS = _ENVIRONMENT.get_template("parts.html").module


def anchor(title):
    """Returns a title as it may stand in an address or in the name of a file.

    >>> anchor("cifar100, imbalance 100, resnet32x4 → resnet8x4")
    'cifar100-imbalance-100-resnet32x4-resnet8x4'
    """
    words = (
        re.sub(r"\W+", "-", title.lower().replace("’", ""))
        .encode()[:100]
        .decode(errors="ignore")
    )
    return words.strip("-") or "page"


def write(path, title, parts, files=None):
    """Writes a page, and the folder beside it, `report_files` for `report.html`.

    Args:
      path: of the page.
      title: of the window.
      parts: of the page, the first a heading of level 1.
      files: {name: text} of other files for the folder.
    """
    path, files = pathlib.Path(path), files or {}
    folder = path.with_name(f"{path.stem}_files")
    written = files | _figure_files(parts)
    _write_files(folder, written)
    names = ["each figure as an SVG file", *files] if written else []
    colours = {"light": figures.LIGHT_VARIABLES, "dark": figures.DARK_VARIABLES}
    page = _ENVIRONMENT.get_template("page.html")
    path.write_text(
        page.render(
            title=title, parts=parts, folder=folder.name, files=names, **colours
        ),
        encoding="utf-8",
    )


def _figure_files(parts):
    """Returns {name: text} of the SVG files of a page's figures; those of a name are numbered."""
    files, repeats = {}, collections.Counter()
    for name, figure in _named_figures(parts):
        repeats[name] += 1
        number = f"-{repeats[name]}" if repeats[name] > 1 else ""
        files[f"{name}{number}.svg"] = figure.file() + _OURS
    return files


def _named_figures(parts, prefix=""):
    for part in parts:
        if isinstance(part, Section):
            yield from _named_figures(
                part.parts, f"{part.anchor}_" if part.anchor else ""
            )
        for figure in getattr(part, "figures", ()):
            yield prefix + anchor(figure.name), figure


def _write_files(folder, files):
    """Writes the files, and removes figures of an earlier page; figures from elsewhere stay."""
    for old in folder.glob("*.svg"):
        if old.name not in files and old.read_text(
            encoding="utf-8", errors="replace"
        ).rstrip().endswith(_OURS):
            old.unlink()
    if files:
        folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")
