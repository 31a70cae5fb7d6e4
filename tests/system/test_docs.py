"""The documentation: what its pages name is there, what they say to type works, and the site builds."""

import ast
import html.parser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import typing

import pytest
from helpers.small_runs import ROOT

import ltkd_jax
from configs import common
from experiments.jobs import queue_entry

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
READ = sorted({*PAGES, ROOT / "README.md"})
BLOCK = re.compile(r"^(`{3,})(\{[\w-]+\})? ?(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
OF_ONE_PAGE = {"kd_adjusted", "experiments/queues/mine.json"}  # what docs/add_a_method.md adds
TOOLS = "sphinx myst_nb furo sphinx_design sphinx_copybutton sphinx-mathjax-offline equinox".split()
ROOMS = ("losses", "groups", "bilevel", "methods", "metrics")

each_page = pytest.mark.parametrize("page", READ, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(page, *kinds):
    """The code of a page's blocks of these kinds: "code-cell", "python", "bash", …; options are left out."""
    for _, role, language, body in BLOCK.findall(page.read_text()):
        if {role.strip("{}"), language} & set(kinds):
            lines = body.splitlines(keepends=True)
            yield "".join(line for line in lines if not re.match(r":[\w-]+:", line))


@each_page
def test_python_parses(page):
    for code in blocks(page, "code-cell", "python"):
        if not code.startswith("%%"):
            compile(code, str(page), "exec")


@each_page
def test_commands_name_what_is_there(page):
    typed = page.read_text().replace("\\\n", " ")
    for module in {*re.findall(r"python -m ([\w.]+)", typed)}:
        assert importlib.util.find_spec(module), f"{page}: python -m {module}"
    for path, argument in re.findall(r"--config=(configs/\w+\.py)(?::([^\s`]+))?", typed):
        if not any(new in argument for new in OF_ONE_PAGE):
            queue_entry.load_config(f"{path}:{argument}" if argument else path)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shell = "\n".join([*blocks(page, "bash"), *re.findall(r"`(make [^`\n]+)`", typed)])
    for target in re.findall(r"^make ([\w-]+)", shell, re.MULTILINE):
        assert target in targets, f"{page}: make {target}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r'pip install (?:-e )?"\.\[(\w+)\]"', typed):
        assert extra in extras, f"{page}: .[{extra}]"


@each_page
def test_keys_and_paths_are_there(page):
    text = page.read_text()
    config = common.base("digits", teacher="resnet8", student="resnet8", imbalance=1.0)
    config.weighting.update(common.bilevel())
    known = {*config.to_dict(), "method.strength"}
    for parent in ("data", "augment", "groups", "method", "weighting", "student", "teacher", "train"):
        known |= {f"{parent}.{key}" for key in config[parent]}
    known |= {f"teacher.train.{key}" for key in config.teacher.train}
    named = re.findall(r"--config\.([\w.]*\w)", text)
    named += re.findall(r"`((?:data|augment|weighting|teacher|train)\.[\w.]*\w)[`=]", text)
    for key in named:
        assert key in known or key == "KEY", f"{page}: no key {key}"
    for path in re.findall(r"\b((?:configs|experiments|tests|ltkd_jax|results)/[\w./*]*[\w*])", text):
        if path not in OF_ONE_PAGE and not re.match(r"experiments/\w+$", path):
            assert list(ROOT.glob(path)), f"{page}: no {path}"


def test_the_first_example_is_the_readmes():
    """Which tests/test_structure.py runs."""
    (code,) = blocks(DOCS / "index.md", "python")
    readmes = next(blocks(ROOT / "README.md", "python"))
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(readmes))


# A method of one's own.


@pytest.fixture(scope="module")
def with_a_method(tmp_path_factory):
    """A copy of the checkout with what docs/add_a_method.md says applied."""
    if not shutil.which("git"):
        pytest.skip("git applies the page's diffs")
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "_build", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for diff in blocks(DOCS / "add_a_method.md", "diff"):
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
        done = subprocess.run(["git", "apply"], input=diff, cwd=copy, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (queue,) = blocks(DOCS / "add_a_method.md", "json")
    (copy / "experiments/queues/mine.json").write_text(queue)
    return copy


def run_in(copy, *words):
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    environment = {**os.environ, "PYTHONPATH": str(copy), "LTKD_CACHE": cache}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_pages_method_is_in_the_table(with_a_method):
    """Its hyperparameters and its queue, as a fresh process sees them."""
    code = "from ltkd_jax import methods as o; print(o.hyperparameters('kd_adjusted', learned_weights=True))"
    assert run_in(with_a_method, "-c", code).strip() == "{'strength': 1.0, 'temperature': 4.0}"
    listed = run_in(with_a_method, "-m", "experiments.reproduce", "experiments/queues/mine.json", "--list")
    assert listed.count("kd_adjusted") == 6 and listed.count('{"method.strength": 0.5}') == 3


@pytest.mark.slow
def test_the_pages_method_trains_and_passes_its_tests(with_a_method):
    """Through the program, with static and with learned weights."""
    tested = run_in(with_a_method, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_methods.py")
    assert "failed" not in tested and "passed" in tested
    for argument in ("kd_adjusted,smoke", "bikd,terms=kd_adjusted,smoke"):
        workdir = with_a_method / "runs" / argument.replace(",", "-")
        flags = (f"--config=configs/digitslt.py:{argument}", f"--workdir={workdir}")
        run_in(with_a_method, "-m", "experiments.main", *flags)
        results = json.loads((workdir / "results.json").read_text())
        assert results["config"]["method"]["name"] == "kd_adjusted" and results["test"]["all"] > 0


# A tracker of one's own.

TRACKER = """
import contextlib, json, types

def init(**about):
    tracker = types.SimpleNamespace(summary={}, log=lambda record, step: print("LOGGED", json.dumps([step, record])))
    return contextlib.nullcontext(tracker)
"""


@pytest.mark.slow
def test_the_pages_hook_hears_every_record(tmp_path):
    """docs/logging.md's script as it stands, in a smoke run, with a tracker that prints."""
    (tmp_path / "wandb.py").write_text(TRACKER)
    script = next(code for code in blocks(DOCS / "logging.md", "python") if "import wandb" in code)
    assert "digitslt.py:ltkd" in script and len(script.splitlines()) <= 10
    (tmp_path / "my_script.py").write_text(script.replace("digitslt.py:ltkd", "digitslt.py:ltkd,smoke"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "my_script.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    heard = [json.loads(line.removeprefix("LOGGED ")) for line in done.stdout.splitlines() if line.startswith("LOGGED")]
    written = (tmp_path / "runs" / "tracked" / "metrics.jsonl").read_text().splitlines()
    assert [record for _, record in heard] == [json.loads(line) for line in written] and heard[-1][0] == 20


# The site.


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site; a warning is an error, and every cell has run."""
    for needed in TOOLS:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the site needs {needed}: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "LTKD_DOCS_BUILD": str(out / "build")}
    flags = ["-q", "-W", "--keep-going", "-j", "auto", "-d", out / "doctrees", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *flags, DOCS, out / "html"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "html"


class Reader(html.parser.HTMLParser):
    """What a page refers to, the anchors it has, and the classes of its parts."""

    def __init__(self, path):
        super().__init__()
        self.refers, self.anchors, self.classes, self.loads = [], set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.add(found.get("id"))
        self.classes += (found.get("class") or "").split()
        self.refers += [found["href"]] if tag == "a" and found.get("href") else []
        self.loads += [found[key] for key in ("src", "href", "srcset") if tag != "a" and found.get(key)]


@pytest.mark.slow
def test_every_page_with_cells_ran(site):
    for page in PAGES:
        cells = [cell for cell in blocks(page, "code-cell")]
        if cells:
            built = site / page.relative_to(DOCS).with_suffix(".html")
            classes = Reader(built).classes
            assert classes.count("cell_output") >= 1 and not {"traceback", "stderr"} & set(classes), built
            figures = sum("plt.subplots(" in cell for cell in cells)
            assert len(re.findall(r'<img [^>]*\.svg"', built.read_text())) == figures, built


@pytest.mark.slow
def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        far = [load for load in Reader(page).loads if re.match(r"(https?:)?//", load)]
        assert not far, f"{page} loads {far}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_every_link_inside_leads_somewhere(site):
    pages = {page.resolve(): Reader(page) for page in site.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        for link in page.refers:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            where = (path.parent / target).resolve() if target else path
            assert where.exists(), f"{path}: {link}"
            if anchor and where in pages:
                assert anchor in pages[where].anchors, f"{path}: {link}"


def public(module):
    """Names in `__all__`, or those that the module defines itself: what is imported says of which module it is."""
    hints = types.ModuleType, typing.TypeVar
    own = {name: x for name, x in vars(module).items() if name[0] != "_" and not isinstance(x, hints)}
    own = [name for name, x in own.items() if getattr(x, "__module__", module.__name__) == module.__name__]
    return getattr(module, "__all__", own)


def test_what_is_public():
    assert {"METHODS", "kd", "create", "Term"} <= {*public(ltkd_jax.methods)}
    assert not {"ClassGroups", "check_counts", "NamedTuple", "jnp"} & {*public(ltkd_jax.methods)}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", os.path.join)
    listed = {name for domain, names in inventory.items() if domain.startswith("py:") for name in names}
    for room in ROOMS:
        for name in public(getattr(ltkd_jax, room)):
            assert f"ltkd_jax.{room}.{name}" in listed, f"docs/api/{room}.md lacks {name}"
