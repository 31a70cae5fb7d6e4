"""A page: one HTML file with its style sheet in it, which needs no network, light and dark, from desk to phone.

Beside it stands a folder with each of its figures as an SVG file, for a paper or a talk. The page does not need it.
"""

import collections
import html
import pathlib
import re

from experiments.reporting import figures

STYLE_SHEET = """
* { box-sizing: border-box; }
html { background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem;
  font: 1.0625rem/1.55 "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, serif; }
h1, h2, h3 { font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; }
h2 { font-size: 1.4rem; margin: 3.5rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--ink); }
h3 { font-size: 1.08rem; margin: 2.6rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1.6rem 0 .2rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 42rem; overflow-wrap: break-word; }
a { color: inherit; }
.lead { font-size: 1.2rem; line-height: 1.45; }
.quiet, .note { color: var(--quiet); }
.small, table, .key, summary, figure, h1 + p, nav {
  font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.small { font-size: .84rem; color: var(--quiet); line-height: 1.5; }
.scroll { overflow-x: auto; margin: .8rem 0;
  background: linear-gradient(to left, var(--page) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--grid), transparent) right / 1.2rem 100% no-repeat scroll; }
.scroll th:first-child { position: sticky; left: 0; background: var(--page); }
table { border-collapse: collapse; font-size: .86rem; white-space: nowrap;
  font-variant-numeric: tabular-nums lining-nums; }
.scroll > table { min-width: 100%; }
th, td { padding: .36rem 0 .36rem .75rem; text-align: right; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--quiet); border-bottom: 1px solid var(--ink); vertical-align: bottom; white-space: normal; }
.label { display: inline-block; width: max-content; max-width: 17rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 1px solid var(--ink); }
.words { text-align: left; }
td.words { white-space: normal; min-width: 7.5rem; }
td.words .note { white-space: nowrap; }
td:not(.words) .note { display: inline-block; min-width: 3.4em; text-align: left; }
.note { font-size: .86em; }
nav { font-size: .9rem; }
nav ul { padding-left: 1.1rem; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.2rem 1.4rem; }
.narrow { display: none; }
.hovers > :hover { fill: var(--ink); fill-opacity: .09; }
.dots > :hover { fill: var(--ink); fill-opacity: 1; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; font-size: .84rem; margin: .6rem 0; max-width: none; }
.key span { display: inline-flex; align-items: center; gap: .5rem; min-width: 0; overflow-wrap: anywhere; }
.key svg { width: 30px; height: 10px; flex: none; }
.maps { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
.maps figure { margin: 0; max-width: 100%; }
.maps figcaption { font-size: .88rem; margin-bottom: .2rem; }
.maps th, .maps td { padding: .3rem .45rem; border: 0 !important; font-size: .82rem; }
.maps td { min-width: 3.1rem; text-align: center; }
.maps thead th { text-align: center; }
details { margin: .7rem 0; }
summary { cursor: pointer; font-size: .88rem; }
pre { overflow-x: auto; font: .78rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 44rem) { .wide { display: none; } .narrow { display: block; }
  .label { max-width: 8rem; } body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.55rem; } .lead { font-size: 1.1rem; } }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""


# The figures of a section are named after it; what stands in no section has no name before its own.
_SECTION = re.compile(r'<section id="([^"]*)"|</section>|(<svg role="img".*?</svg>)', re.S)
_OURS = "<!-- written with the page beside this folder, and removed with it -->"


def anchor(title):
    """Turns a title into what may stand in an address or a file's name.

    >>> anchor("cifar100, imbalance 100, resnet32x4 → resnet8x4")
    'cifar100-imbalance-100-resnet32x4-resnet8x4'
    """
    words = re.sub(r"\W+", "-", title.lower().replace("’", "")).encode()[:100].decode(errors="ignore")
    return words.strip("-") or "page"


def write(path, title, body, beside=None):
    """Writes a page, and the folder beside it, `report_files` for `report.html`.

    Args:
      path: of the page.
      title: of the window.
      body: parts in HTML, the first an h1; figures are `plots.svg`'s.
      beside: {name: text} of what else the folder holds.
    """
    path, body = pathlib.Path(path), "\n".join(body)
    files = (beside or {}) | _figures(body)
    folder = path.with_name(f"{path.stem}_files")
    _write_files(folder, files)
    if files:
        what = html.escape(", ".join(["each figure as an SVG file", *(beside or {})]))
        body += f'\n<p class="small">Written beside this page, into {html.escape(folder.name)}/: {what}.</p>'
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{figures.STYLE_SHEET}{STYLE_SHEET}</style></head>\n"
        f"<body><main>{figures.FIGURE.sub(lambda figure: figures.on_page(figure[0]), body)}</main></body></html>\n"
    )
    path.write_text(text, encoding="utf-8")


def _figures(body):
    """Returns {name: text} of the SVG files of a page's figures."""
    found, section, seen = {}, "", collections.Counter()
    for part in _SECTION.finditer(body):
        if not part[2]:
            section = f"{part[1]}_" if part[1] else ""
            continue
        label = html.unescape(figures.FIGURE.match(part[2])[1])
        name = f"{section}{anchor(label.partition(':')[0])}"
        seen[name] += 1
        found[f"{name}-{seen[name]}.svg" if seen[name] > 1 else f"{name}.svg"] = figures.in_file(part[2]) + _OURS
    return found


def _write_files(folder, files):
    """Writes the files, and removes the figures that an earlier page had; a figure from elsewhere stays."""
    for old in folder.glob("*.svg"):
        if old.name not in files and old.read_text(encoding="utf-8", errors="replace").rstrip().endswith(_OURS):
            old.unlink()
    if files:
        folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")
