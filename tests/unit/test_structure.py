"""Rules of the layout: imports and prints; and names in documents exist."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "ltkd_jax").rglob("*.py"))
PROJECT = (
    LIBRARY
    + sorted((ROOT / "experiments").rglob("*.py"))
    + sorted((ROOT / "configs").glob("*.py"))
)

# The modules of its own package that each part may import, besides itself.
BASE = {"console", "files", "names", "signals"}
LIBRARY_RULES = {
    "console": {"files"},
    "files": set(),
    "names": set(),
    "signals": set(),
    "groups": set(),
    "bilevel": set(),
    "metrics": {"groups"},
    "losses": {"groups"},
    "methods": {"groups", "losses", "names"},
    "models": BASE,
    "data": {"groups", *BASE},
    "bias": {"data", "groups", "losses", "metrics"},
    "inference": {"data", "models", *BASE},
    "training": {
        "bilevel",
        "data",
        "groups",
        "losses",
        "methods",
        "metrics",
        "models",
        *BASE,
    },
}
EXPERIMENTS_RULES = {
    "provenance": set(),
    "runtime": set(),
    "config": set(),
    "trainer": {"config", "provenance"},
    "training": {"config", "reporting", "runtime", "trainer"},
    "reporting": {"config"},
    "jobs": {"config", "trainer", "reporting", "runtime"},
    "audit": {"config", "trainer", "reporting", "runtime"},
    "benchmark": {"config", "trainer", "reporting", "provenance", "runtime"},
}
# They may import everything, and nothing imports them.
COMMANDS = {"main", "sweep", "reproduce", "report", "tensorboard", "predict"}


def name_of(path):
    """Returns the dotted name of a module."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {name_of(path): path for path in PROJECT}


@functools.cache
def imports(path):
    """Returns the dotted names of the modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in names}
    return modules


@pytest.mark.parametrize(
    "package, rules", [("ltkd_jax", LIBRARY_RULES), ("experiments", EXPERIMENTS_RULES)]
)
def test_imports_of_each_part(package, rules):
    for name, path in MODULES.items():
        part = name.split(".")[1] if name.startswith(f"{package}.") else None
        if part is None or (package == "experiments" and part in COMMANDS):
            continue
        assert part in rules, f"{part} is new: add above what it may import"
        imported = set()
        for module in imports(path):
            if module.startswith(f"{package}."):
                imported.add(module.split(".")[1])
        forbidden = imported - rules[part] - {part}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


@pytest.mark.parametrize(
    "package, foreign",
    [
        ("ltkd_jax", {"configs", "experiments", "matplotlib", "ml_collections"}),
        ("configs", {"experiments"}),
    ],
)
def test_imports_of_other_packages(package, foreign):
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            packages = {module.split(".")[0] for module in imports(path)}
            assert not packages & foreign, f"{name} imports {packages & foreign}"


def test_no_import_circle():
    """Imports inside functions count, too."""
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    # A CycleError has the names of the circle.
    graphlib.TopologicalSorter(graph).prepare()


def print_lines(tree):
    """Returns the lines of calls of `print` outside functions called `main`."""
    in_main = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            in_main |= {id(child) for child in ast.walk(node)}
    lines = []
    for node in ast.walk(tree):
        is_print = (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        )
        if is_print and id(node) not in in_main:
            lines.append(node.lineno)
    return lines


def test_print_only_in_main():
    for path in LIBRARY:
        lines = print_lines(ast.parse(path.read_text()))
        assert not lines or path.stem == "__main__", f"{path} prints in lines {lines}"


def test_losses_need_only_jax():
    """In a new process in which no other package can be imported."""
    code = """
import sys
absent = {"flax", "orbax", "tensorflow_datasets", "ml_collections", "matplotlib"}
absent |= {"sklearn", "PIL"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import ltkd_jax
import ltkd_jax.losses as losses
from ltkd_jax import groups
import jax.numpy as jnp
g = groups.ClassGroups.from_counts([5, 3, 1])
assert losses.ltkd(jnp.zeros((2, 3)), jnp.ones((2, 3)), g).shape == (2,)
try:
    ltkd_jax.models
except ModuleNotFoundError:
    print("fine")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert process.stdout.strip() == "fine", process.stderr


def test_readme_example():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```")[0], "README.md", "exec"), {})


def test_tests_in_reliability_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    references = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", page)
    assert len(references) > 30
    for path, name in references:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
