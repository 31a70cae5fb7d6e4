"""The site builds, its links have targets, and the code of its pages runs."""

import functools
import html.parser
import json
import pathlib
import re
import shlex
import sys
import types
import typing

import pytest
from helpers import environments, pictures
from helpers.environments import ROOT
from helpers.pages import DOCS, PAGES, blocks, captioned
from helpers.small_runs import INSECTS

import ltkd_jax

REFERENCE = ("losses", "groups", "bilevel", "methods", "metrics")


def add_captioned_code(page, checkout):
    """Writes the captioned blocks of a page into the files that the captions name."""
    for name, code in captioned(page).items():
        (checkout / name).write_text(code)


def test_added_method(tmp_path):
    """Tests, lists and trains the method of docs/add_a_method.md.

    The two runs, with static and with learned weights, share a teacher.
    """
    checkout = environments.copy_checkout(tmp_path / "checkout")
    add_captioned_code(DOCS / "add_a_method.md", checkout)
    python = functools.partial(environments.run, sys.executable, "-m", cwd=checkout)
    python("pytest", "-q", "-p", "no:cacheprovider", "test_my_methods.py")
    modules = "--import=my_methods,my_models,my_nnx_models"
    queue = python(
        "experiments.reproduce", "experiments/queues/mine.json", "--list", modules
    )
    assert queue.count("kd_adjusted") == 6
    assert queue.count('{"method.tau": 0.5}') == 3
    for argument, student, module in (
        ("kd_adjusted", "mlp", "my_models"),
        ("bikd,terms=kd_adjusted", "nnx_convnet", "my_nnx_models"),
    ):
        config = f"--config=configs/digitslt.py:{argument},smoke"
        workdir = checkout / argument
        options = [f"--config.student.model={student}", "--workdir", workdir]
        python("experiments.main", modules, config, *options)
        results = json.loads((workdir / "results.json").read_text())
        assert results["config"]["method"]["name"] == "kd_adjusted"
        assert results["content"]["code"]["student"].startswith(f"{module} ")
        assert results["test"]["all"] > 0


# Recognizes the class of `pictures.picture` by its brightness.
TEACHER = """
import numpy as np
import torch

class_names = ["ant", "bee", "cat", "dog"]

def transform(image):
    return torch.tensor(np.asarray(image, np.float32).mean())

class Teacher(torch.nn.Module):
    def forward(self, brightness):
        return -((brightness[:, None] - 31.5 - 12 * torch.arange(4)) ** 2)

model = Teacher()
"""


def test_logits_from_pytorch(tmp_path):
    """Runs teacher_logits.py of docs/custom_teacher.md, then trains on its file.

    The script finds the images in both layouts of a folder.
    """
    pytest.importorskip("torch", reason="the script is for PyTorch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    add_captioned_code(DOCS / "custom_teacher.md", tmp_path)
    python = functools.partial(
        environments.run, sys.executable, cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    by_split = pictures.by_class(INSECTS, folder="train/")
    by_split |= pictures.by_class(dict.fromkeys(INSECTS, 5), folder="test/")
    layouts = {"splits": by_split, "classes": pictures.by_class(INSECTS)}
    for layout, images in layouts.items():
        folder = pictures.write_folder(tmp_path / layout, images)
        prepare = ["-m", "ltkd_jax.data.prepare", "folder", "--name=insects"]
        options = ["--test_per_class=5"] if layout == "classes" else []
        data_dir = tmp_path / f"{layout}_tfds"
        output = python(
            *prepare, f"--source={folder}", f"--data_dir={data_dir}", *options
        )
        python("teacher_logits.py", data_dir / "insects" / "1.0.0", folder)

    # The command that `prepare` printed, with a smoke test's options.
    _, *command = shlex.split(output.splitlines()[-1])
    config = command.index("--config=configs/folderlt.py:ltkd,name=insects")
    command[config] += ",image_size=16,smoke"
    python(
        *command,
        "--config.teacher.checkpoint=teacher.npz",
        "--config.student.model=resnet8",
        "--config.train.batch_size=16",
        "--workdir=run",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["test"]["all"] == 100
    assert results["teacher"]["model"] == "teacher.npz"
    assert results["teacher_logits"] == "table"
    assert "teacher.npz → resnet8" in (tmp_path / "run" / "report.html").read_text()


# Replaces wandb: prints each record.
TRACKER = """
import contextlib, json, types

def log(record, step):
    print("LOGGED", json.dumps([step, record]))

def init(**settings):
    return contextlib.nullcontext(types.SimpleNamespace(summary={}, log=log))
"""


def test_hook_gets_every_record(tmp_path):
    """Runs the wandb script of docs/logging.md with a tracker that prints."""
    (tmp_path / "wandb.py").write_text(TRACKER)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scripts = blocks(DOCS / "logging.md", "python")
    script = next(code for code in scripts if "import wandb" in code)
    script = script.replace("digitslt.py:ltkd", "digitslt.py:ltkd,smoke")
    (tmp_path / "my_script.py").write_text(script)
    output = environments.run(
        sys.executable, "my_script.py", cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    logged = []
    for line in output.splitlines():
        if line.startswith("LOGGED "):
            logged.append(json.loads(line.removeprefix("LOGGED ")))
    metrics = (tmp_path / "runs" / "tracked" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in metrics.splitlines()]
    assert [record for _, record in logged] == records
    assert logged[-1][0] == 20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the site by `make docs` in a copy of the checkout; warnings are errors."""
    checkout = environments.copy_checkout(tmp_path_factory.mktemp("site") / "checkout")
    # The stamp keeps make from creating .venv: the packages of this environment do.
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "docs.stamp").touch()
    bin_folder = pathlib.Path(sys.executable).parent
    environments.run(
        "make", "docs", f"BIN={bin_folder}", cwd=checkout, PYTHONPATH=str(checkout)
    )
    return checkout / "docs" / "_build" / "html"


@pytest.fixture(scope="module")
def pages(site):
    """Returns every page of the site, parsed, by its path."""
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


class Page(html.parser.HTMLParser):
    """A page's links, loaded files, anchors, and the classes of its elements."""

    def __init__(self, path):
        super().__init__()
        self.links = []
        self.loads = []
        self.anchors = set()
        self.classes = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        self.classes += (attributes.get("class") or "").split()
        addresses = self.links if tag == "a" else self.loads
        for key in ("href", "src", "srcset"):
            if attributes.get(key):
                addresses.append(attributes[key])


def test_every_cell_ran(site, pages):
    for source in PAGES:
        cells = list(blocks(source, "code-cell"))
        if not cells:
            continue
        path = site / source.relative_to(DOCS).with_suffix(".html")
        page = pages[path.resolve()]
        assert "cell_output" in page.classes, source
        assert not {"traceback", "stderr"} & set(page.classes), source
        num_figures = sum("plt.subplots(" in cell for cell in cells)
        assert len(re.findall(r'<img [^>]*\.svg"', page.text)) == num_figures, source


def test_site_needs_no_network(site, pages):
    remote = []
    for path, page in pages.items():
        for address in page.loads:
            if re.match(r"(https?:)?//", address):
                remote.append((path, address))
    assert not remote
    remote_import = re.compile(r"(@import|url\()\s*['\"]?(https?:)?//")
    for sheet in site.rglob("*.css"):
        assert not remote_import.search(sheet.read_text()), sheet


def test_every_internal_link_has_a_target(pages):
    assert len(pages) > 40
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            relative, _, anchor = link.partition("#")
            target = (path.parent / relative).resolve() if relative else path
            assert target.exists(), f"{path}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path}: {link}"


def public_names(module):
    """Returns `__all__`, or the names that the module itself defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    names = []
    for name, value in vars(module).items():
        is_imported = isinstance(value, types.ModuleType | typing.TypeVar)
        origin = getattr(value, "__module__", module.__name__)
        if name[0] != "_" and not is_imported and origin == module.__name__:
            names.append(name)
    return names


def test_reference_lists_every_public_name(site):
    missing = []
    for module in REFERENCE:
        text = (site / "api" / f"{module}.html").read_text()
        for name in public_names(getattr(ltkd_jax, module)):
            if f'id="ltkd_jax.{module}.{name}"' not in text:
                missing.append(f"{module}.{name}")
    assert "create" in public_names(ltkd_jax.methods)
    assert not missing
