"""The rules of the layout: who may import whom, who may print, and that the documents name what is there."""

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

# What each part may import of its own package, beside itself.
GROUND = {"files", "names", "signals"}
LIBRARY_RULES = {
    "files": set(),
    "names": set(),
    "signals": set(),
    "groups": set(),
    "bilevel": set(),
    "metrics": {"groups"},
    "losses": {"groups"},
    "methods": {"groups", "losses", "names"},
    "models": GROUND,
    "data": {"groups", *GROUND},
    "bias": {"data", "groups", "losses", "metrics"},
    "training": {
        "bilevel",
        "data",
        "groups",
        "losses",
        "methods",
        "metrics",
        "models",
        *GROUND,
    },
}
EXPERIMENTS_RULES = {
    "provenance": set(),
    "runtime": set(),
    "config": set(),
    "trainer": {"config", "provenance"},
    "reporting": {"config"},
    "jobs": {"config", "trainer", "reporting", "runtime"},
    "audit": {"config", "trainer", "reporting", "runtime"},
    "benchmark": {"config", "trainer", "reporting", "provenance", "runtime"},
}
COMMANDS = {
    "main",
    "sweep",
    "reproduce",
    "report",
    "tensorboard",
}  # may import all, and nothing imports them


def name_of(path):
    """Returns the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PROJECT}


@functools.cache
def imports(path):
    """Returns the dotted names of the modules that a file imports, at its top or inside a function."""
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
        if part is None or package == "experiments" and part in COMMANDS:
            continue
        assert part in rules, f"{part} is new: say above what it may import"
        imported = {
            other.split(".")[1]
            for other in imports(path)
            if other.startswith(f"{package}.")
        }
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
        packages = {other.split(".")[0] for other in imports(path)}
        assert not (name.split(".")[0] == package and packages & foreign), (
            f"{name} imports {packages & foreign}"
        )


def test_no_import_circle():
    """Imports inside functions included."""
    graph = {
        name: {other for other in imports(path) if other != name}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_only_a_main_prints():
    for path in LIBRARY:
        tree = ast.parse(path.read_text())
        mains = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "main"
        ]
        allowed = {id(node) for main in mains for node in ast.walk(main)}
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and id(node) not in allowed
        ]
        lines = [
            call.lineno for call in calls if getattr(call.func, "id", "") == "print"
        ]
        assert not lines or path.stem == "__main__", f"{path} prints in lines {lines}"


def test_losses_import_without_the_rest():
    """In a fresh process in which no other package can be imported."""
    code = """
import sys
absent = ("flax", "orbax", "tensorflow_datasets", "ml_collections", "matplotlib", "sklearn", "PIL")
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


def test_readme_example_runs():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```")[0], "README.md", "exec"), {})


def test_reliability_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", page)
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
