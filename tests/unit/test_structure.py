"""The rooms of the house: imports point down, and the losses need jax, chex and optax only."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What each module or package below ltkd_jax may import of its own project.
GROUND = {"files", "names", "signals"}
MAY_IMPORT = {
    "files": set(),
    "names": set(),
    "signals": set(),
    "groups": set(),
    "losses": {"groups", "losses"},
    "models": {"models", *GROUND},
    "data": {"data", "groups", *GROUND},
    "metrics": {"groups"},
    "methods": {"groups", "losses", "names"},
    "bias": {"data", "groups", "losses", "metrics"},
    "bilevel": set(),
    "training": {"training", "bilevel", "losses", "models", "data", "methods", "metrics", "groups", *GROUND},
}
# The library knows no flags, no config object, no progress bar on its own account.
FOREIGN_TO_LIBRARY = {"ml_collections", "experiments", "configs", "matplotlib"}


def imports(path):
    """Dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


LIBRARY = sorted(p for p in (ROOT / "ltkd_jax").rglob("*.py") if p.parent != ROOT / "ltkd_jax" or p.stem != "__init__")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT / "ltkd_jax").parts[0].removesuffix(".py")
    assert room in MAY_IMPORT, f"{room} is a new room: say above what it may import"
    for name in imports(path):
        first, *rest = name.split(".")
        assert first not in FOREIGN_TO_LIBRARY, f"{path} imports {name}"
        if first == "ltkd_jax":
            assert rest[0] in MAY_IMPORT[room], f"{path} imports {name}"


def test_only_one_module_imports_tfds_to_read():
    users = {path.stem for path in LIBRARY if any(name.startswith("tensorflow_datasets") for name in imports(path))}
    assert users <= {"records", "prepare", "write"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_a_main_prints(path):
    tree = ast.parse(path.read_text())
    allowed = {id(n) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "main" for n in ast.walk(f)}
    printed = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
               and id(n) not in allowed]  # fmt: skip
    assert not printed, f"{path} prints in lines {printed}"


def test_losses_import_without_the_rest():
    """In a fresh process where every other package of ours is made impossible to import."""
    code = """
import sys
absent = ("flax", "orbax", "tensorflow_datasets", "ml_collections", "matplotlib", "sklearn", "PIL")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent or name.split(".")[0] in absent:
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "fine", done.stderr


def test_main_is_short():
    assert len((ROOT / "experiments" / "main.py").read_text().splitlines()) < 70


def test_the_readmes_example_runs():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```")[0], "README.md", "exec"), {})


def test_every_promise_names_a_test_that_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (
            f"docs/reliability.md names {path}::{name}, which is not there"
        )
