"""The metadata of the checkout: one version, hooks that run this environment's tools, lazy modules, requirements."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from helpers.environments import ROOT

import ltkd_jax

INTERNAL = {
    "files",
    "names",
    "signals",
}  # modules below `ltkd_jax` that are not part of its interface
# Packages of the checkout, and those that jax, ml_collections and Jinja2 require themselves.
PROVIDED = {"ltkd_jax", "experiments", "configs", "numpy", "absl", "markupsafe"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit_learn",
    "orbax": "orbax_checkpoint",
}  # by module, of another name


def test_version_is_one():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ltkd_jax.__version__
    assert f"## [{ltkd_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    arxiv = {
        identifier["value"]
        for paper in citation["references"]
        for identifier in paper["identifiers"]
    }
    assert arxiv == {"arXiv:2506.18496", "arXiv:2605.17839"}


def test_hooks_run_this_environments_tools():
    """A tool of another version than `make lint` has would accept other files."""
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())[
        "repos"
    ]
    assert {hook["id"] for hook in repository["hooks"]} >= {
        "ruff-check",
        "ruff-format",
        "mypy",
    }
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repository["hooks"])


def test_modules_load_on_first_use():
    script = (
        "import sys, ltkd_jax; print(*dir(ltkd_jax)); assert 'jax' not in sys.modules"
    )
    listed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    modules = {path.stem for path in (ROOT / "ltkd_jax").glob("*.py")}
    modules |= {path.parent.name for path in (ROOT / "ltkd_jax").glob("*/__init__.py")}
    assert (
        set(ltkd_jax.__all__)
        == modules - INTERNAL - {"__init__"}
        <= set(listed.split())
    )
    with pytest.raises(AttributeError, match="loses"):
        ltkd_jax.loses


def test_imports_are_requirements():
    """A fresh environment would lack any other package."""
    paths = [*(ROOT / "ltkd_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    modules = {
        alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = (
        {module.partition(".")[0] for module in modules}
        - set(sys.stdlib_module_names)
        - PROVIDED
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *extras["train"],
        *extras["torch"],
        *extras["tensorboard"],
    ]
    required = {
        re.match(r"[\w-]+", line).group().lower().replace("-", "_") for line in lines
    }
    assert {
        DISTRIBUTIONS.get(package, package.lower()) for package in packages
    } <= required
