"""The site builds, its pages refer to what exists, and what its pages say to type works."""

import functools
import html.parser
import json
import pathlib
import re
import sys
import types
import typing

import pytest
from helpers import environments
from helpers.environments import ROOT
from helpers.pages import DOCS, PAGES, blocks, captioned

import ltkd_jax

REFERENCE = ("losses", "groups", "bilevel", "methods", "metrics")


def test_added_method(tmp_path):
    """The code of docs/add_a_method.md, in the files that its captions name: tested, listed, and trained.

    With static and with learned weights, which share a teacher.
    """
    copy = environments.copy_checkout(tmp_path / "checkout")
    for caption, code in captioned(DOCS / "add_a_method.md").items():
        name, _, anchor = caption.partition(", below: ")
        path = copy / name.removesuffix(", at the end")
        text = path.read_text() if path.exists() else ""
        assert text.count(f"{anchor}\n") == 1 or not anchor, f"{name}: {anchor}"
        path.write_text(
            text.replace(f"{anchor}\n", f"{anchor}\n{code}")
            if anchor
            else f"{text}\n\n{code}"
        )
    python = functools.partial(environments.run, sys.executable, "-m", cwd=copy)
    python("pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_methods.py")
    listed = python("experiments.reproduce", "experiments/queues/mine.json", "--list")
    assert listed.count("kd_adjusted") == 6 and listed.count('{"method.tau": 0.5}') == 3
    for argument in ("kd_adjusted", "bikd,terms=kd_adjusted"):
        python(
            "experiments.main",
            f"--config=configs/digitslt.py:{argument},smoke",
            "--workdir",
            copy / argument,
        )
        results = json.loads((copy / argument / "results.json").read_text())
        assert (
            results["config"]["method"]["name"] == "kd_adjusted"
            and results["test"]["all"] > 0
        )


TRACKER = """
import contextlib, json, types
log = lambda record, step: print("LOGGED", json.dumps([step, record]))
init = lambda **about: contextlib.nullcontext(types.SimpleNamespace(summary={}, log=log))
"""


def test_hook_gets_every_record(tmp_path):
    """docs/logging.md's script as it stands, in a smoke run, with a tracker that prints."""
    (tmp_path / "wandb.py").write_text(TRACKER)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = next(
        code for code in blocks(DOCS / "logging.md", "python") if "import wandb" in code
    )
    (tmp_path / "my_script.py").write_text(
        script.replace("digitslt.py:ltkd", "digitslt.py:ltkd,smoke")
    )
    printed = environments.run(
        sys.executable, "my_script.py", cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    logged = [
        json.loads(line[7:])
        for line in printed.splitlines()
        if line.startswith("LOGGED ")
    ]
    written = (tmp_path / "runs" / "tracked" / "metrics.jsonl").read_text().splitlines()
    assert [record for _, record in logged] == [json.loads(line) for line in written]
    assert logged[-1][0] == 20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, in a copy of the checkout; a warning is an error, and every cell runs."""
    copy = environments.copy_checkout(tmp_path_factory.mktemp("site") / "checkout")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "docs.stamp").touch()  # the environment is this one
    tools = pathlib.Path(sys.executable).parent
    environments.run("make", "docs", f"BIN={tools}", cwd=copy, PYTHONPATH=str(copy))
    return copy / "docs" / "_build" / "html"


@pytest.fixture(scope="module")
def pages(site):
    """Every page of the site, parsed, by its path."""
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


class Page(html.parser.HTMLParser):
    """A page's links, what it loads, its anchors, and the classes of its elements."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.classes = [], [], set(), []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        self.classes += (attributes.get("class") or "").split()
        addresses = [
            attributes[key] for key in ("href", "src", "srcset") if attributes.get(key)
        ]
        (self.links if tag == "a" else self.loads).extend(addresses)


def test_every_cell_ran(site, pages):
    for source in PAGES:
        cells = [*blocks(source, "code-cell")]
        if cells:
            page = pages[
                (site / source.relative_to(DOCS).with_suffix(".html")).resolve()
            ]
            assert "cell_output" in page.classes and not {"traceback", "stderr"} & {
                *page.classes
            }, source
            figures = sum("plt.subplots(" in cell for cell in cells)
            assert len(re.findall(r'<img [^>]*\.svg"', page.text)) == figures, source


def test_site_needs_no_network(site, pages):
    remote = [
        (path, load)
        for path, page in pages.items()
        for load in page.loads
        if re.match(r"(https?:)?//", load)
    ]
    assert not remote
    for sheet in site.rglob("*.css"):
        assert not re.search(
            r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()
        ), sheet


def test_every_internal_link_has_a_target(pages):
    assert len(pages) > 40
    for path, page in pages.items():
        for link in page.links:
            if not re.match(r"\w+:", link):
                relative, _, anchor = link.partition("#")
                target = (path.parent / relative).resolve() if relative else path
                assert target.exists(), f"{path}: {link}"
                assert (
                    not anchor or target not in pages or anchor in pages[target].anchors
                ), f"{path}: {link}"


def public(module):
    """Returns the names in `__all__`, or those that the module itself defines."""
    imported = (types.ModuleType, typing.TypeVar)
    own = {
        name: x
        for name, x in vars(module).items()
        if name[0] != "_" and not isinstance(x, imported)
    }
    defined = [
        name
        for name, x in own.items()
        if getattr(x, "__module__", module.__name__) == module.__name__
    ]
    return getattr(module, "__all__", defined)


def test_reference_lists_every_public_name(site):
    names = {
        f"ltkd_jax.{module}.{name}"
        for module in REFERENCE
        for name in public(getattr(ltkd_jax, module))
    }
    text = "".join(
        (site / "api" / f"{module}.html").read_text() for module in REFERENCE
    )
    assert "ltkd_jax.methods.create" in names
    assert not [name for name in names if f'id="{name}"' not in text]
