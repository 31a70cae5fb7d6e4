"""The checkout's metadata: its version, hooks, lazily loaded modules, requirements."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest
from helpers.environments import ROOT

import ltkd_jax

# Modules of `ltkd_jax` that are not part of its interface.
INTERNAL = {"console", "files", "names", "signals"}
# Packages of the checkout, and those that jax, ml_collections and Jinja2 require.
PROVIDED = {"ltkd_jax", "experiments", "configs", "numpy", "absl", "markupsafe"}
# Distributions whose name differs from that of their module.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit_learn",
    "orbax": "orbax_checkpoint",
}


def test_versions_agree():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ltkd_jax.__version__
    assert f"## [{ltkd_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    arxiv = set()
    for paper in citation["references"]:
        arxiv |= {identifier["value"] for identifier in paper["identifiers"]}
    assert arxiv == {"arXiv:2506.18496", "arXiv:2605.17839"}


def test_hooks_run_installed_tools():
    """Ensures that hooks use the tool versions of `make lint`, and so agree with it."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    hooks = repository["hooks"]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)


def test_modules_load_on_first_use():
    # Another process, because jax is loaded in this one.
    code = (
        "import sys, ltkd_jax; print(*dir(ltkd_jax)); assert 'jax' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    listed = set(process.stdout.split())
    modules = {path.stem for path in (ROOT / "ltkd_jax").glob("*.py")}
    modules |= {path.parent.name for path in (ROOT / "ltkd_jax").glob("*/__init__.py")}
    public = modules - INTERNAL - {"__init__"}
    assert set(ltkd_jax.__all__) == public
    assert public <= listed
    with pytest.raises(AttributeError, match="loses"):
        _ = ltkd_jax.loses


def imported_modules(path):
    """Returns the modules that a file imports, in functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


def normalized_name(requirement):
    """Returns the name of a requirement's distribution in the form of a module's."""
    name = re.match(r"[\w-]+", requirement).group()
    return name.lower().replace("-", "_")


def test_imports_are_requirements():
    """Ensures that a new environment has every imported package."""
    modules = set()
    for package in ("ltkd_jax", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            modules |= imported_modules(path)
    packages = {module.partition(".")[0] for module in modules}
    packages -= set(sys.stdlib_module_names) | PROVIDED
    distributions = {DISTRIBUTIONS.get(name, name.lower()) for name in packages}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in ("train", "torch", "tensorboard"):
        requirements += project["optional-dependencies"][extra]
    assert distributions <= {normalized_name(line) for line in requirements}


def test_program_without_its_extra(tmp_path):
    """Python imports `sitecustomize` first: here it hides two packages."""
    (tmp_path / "sitecustomize.py").write_text("""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = {"matplotlib", "tqdm"}
PathFinder.find_spec = lambda name, *args: None if name in hidden else find(name, *args)
""")
    for module in ("experiments.main", "experiments.sweep", "experiments.audit"):
        process = subprocess.run(
            [sys.executable, "-m", module],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert process.returncode == 1
        (line,) = process.stderr.splitlines()
        assert "needs matplotlib, tqdm" in line
        assert 'pip install -e ".[train]"' in line
