"""What is built, and what an environment of someone else's gets: types, wheel, source distribution, metadata, hooks."""

import email
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import typed_usage
from helpers.small_runs import ROOT

import ltkd_jax

# What a user's own strict check says of packages that have no type hints; ltkd_jax is not among them.
MYPY = "[mypy]\nstrict = true\n[mypy-optax]\nignore_missing_imports = true\n"
UNTYPED = "# mypy: allow-untyped-defs, allow-untyped-calls\n"  # the README's examples have no hints of their own


def run(*command, cwd=ROOT, rc=0):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout


def needs(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not here: pip install -e ".[test]"')


def tracked():
    """What git tracks, where this is a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    return [name for name in run("git", "ls-files", "-z").split("\0") if name and (ROOT / name).exists()]


# --- Types and style ----------------------------------------------------------------------------


def test_types_are_right():
    needs("mypy")
    run(sys.executable, "-m", "mypy")


def test_style_is_right():
    needs("ruff")
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_every_module_is_there_and_told():
    """Lazily: a new interpreter that only asks for the names loads none of them."""
    script = "import sys, ltkd_jax; print(*dir(ltkd_jax)); assert 'jax' not in sys.modules"
    told = set(run(sys.executable, "-c", script).split())
    rooms = {
        path.stem for path in (ROOT / "ltkd_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(ltkd_jax.__all__) == rooms - {"__init__", "files"} <= told
    with pytest.raises(AttributeError, match="'ltkd_jax' has no attribute 'loses'"):
        ltkd_jax.loses  # noqa: B018


@pytest.mark.slow
def test_the_typed_usage_runs():
    student, labels = jnp.zeros((4, 6)), np.arange(4)
    assert typed_usage.mean_loss(student, np.eye(4, 6), labels).shape == ()
    assert typed_usage.learned_weights({"x": jnp.eye(3), "y": jnp.arange(3.0)}).shape == (3, 2)
    assert typed_usage.own_objective(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.arange(2)).shape == (2,)
    mass = typed_usage.evaluate(jnp.zeros((2, 8, 8, 1)), jnp.arange(2))
    assert sum(mass.values()) == pytest.approx(1)


# --- Metadata -----------------------------------------------------------------------------------


def test_one_version():
    """In the code, in the citation and in the change log; in what is built, see below."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ltkd_jax.__version__
    assert f"## [{ltkd_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    arxiv = {identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]}
    assert arxiv == {"arXiv:2506.18496", "arXiv:2605.17839"}


def test_the_hooks_run_tools_of_the_test_extra():
    yaml = pytest.importorskip("yaml")
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy"}
    for hook in hooks:
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/"), f"{hook['id']} runs {tool}, which may be of another version or missing"


@pytest.mark.slow
def test_the_hooks_pass(tmp_path):
    """On every file, in a new checkout, by the tools of this environment."""
    needs("pre_commit", "pre_commit_hooks", "mypy", "ruff")
    copy(tracked(), tmp_path)
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "add", ".", cwd=tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    told = run(sys.executable, "-m", "pre_commit", "run", "--all-files", "--color=never", cwd=tmp_path)
    assert told.count("Passed") == 6 and "Skipped" not in told, told


# --- Wheel and source distribution --------------------------------------------------------------


def copy(names, folder):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution of what git tracks, and the wheel that is built of nothing but it."""
    needs("build")
    folder = tmp_path_factory.mktemp("built")
    copy(tracked(), folder / "checkout")
    # The wheel is built out of the unpacked source distribution.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "checkout")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of a new environment with the wheel, and of what it needs that which is installed here.

    A .pth file adds this environment's packages, but not what their own .pth files add: no checkout is in the path.
    """
    folder = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", built[1])
    packages = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_what_the_wheel_holds(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    info = f"ltkd_jax-{ltkd_jax.__version__}.dist-info"
    package = {name for name in tracked() if name.startswith("ltkd_jax/")}
    assert "ltkd_jax/py.typed" in package
    assert names == package | {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    }


@pytest.mark.slow
def test_the_source_distribution_is_the_checkout(built):
    top = f"ltkd_jax-{ltkd_jax.__version__}/"
    names = {name.removeprefix(top) for name in tarfile.open(built[0]).getnames() if name.startswith(top)}
    assert set(tracked()) - names <= {".gitignore", ".ci/run"}


@pytest.mark.slow
def test_the_source_distribution_tests_itself(built, tmp_path):
    """One of the test files, with its helpers, out of the unpacked source distribution."""
    with tarfile.open(built[0]) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    told = run(
        sys.executable, "-m", "pytest", "-q", "tests/unit/test_groups.py", "tests/unit/test_structure.py", cwd=folder
    )
    assert " passed" in told and "skipped" not in told


@pytest.mark.slow
def test_the_metadata(built):
    wheel = zipfile.ZipFile(built[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_string(wheel.read(name).decode())
    assert metadata["Version"] == ltkd_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    needed = {
        re.match(r"[\w-]+", line).group().lower() for line in metadata.get_all("Requires-Dist") if ";" not in line
    }
    assert needed >= {"jax", "flax", "optax", "chex", "orbax-checkpoint", "tensorflow-datasets", "ml-collections"}
    assert not needed & {"pytest", "mypy", "matplotlib", "torch"}


@pytest.mark.slow
def test_the_readmes_example_runs_out_of_the_wheel(installed, tmp_path):
    """In a folder that is no checkout; the losses load neither flax nor TFDS nor orbax."""
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = f"""
{block}
import sys, importlib.metadata, ltkd_jax
assert not {{"flax", "tensorflow_datasets", "orbax", "grain", "ml_collections"}} & set(sys.modules), sorted(sys.modules)
assert importlib.metadata.version("ltkd_jax") == ltkd_jax.__version__
for module in ltkd_jax.__all__:
    getattr(ltkd_jax, module)
print(float(loss.mean()), ltkd_jax.__file__)
"""
    value, where = run(installed, "-c", script, cwd=tmp_path).split()
    assert abs(float(value) - 1.7918) < 1e-4  # log 6: uniform student, uniform teacher
    assert pathlib.Path(where).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_the_wheel_tells_its_types(installed, tmp_path):
    """To a user's `mypy --strict`: right use is right, wrong use is reported; without py.typed nothing is known."""
    needs("mypy")
    shutil.copy(ROOT / "tests" / "helpers" / "typed_usage.py", tmp_path)
    for number, block in enumerate((ROOT / "README.md").read_text().split("```python\n")[1:]):
        (tmp_path / f"readme{number}.py").write_text(UNTYPED + block.split("```")[0])
    (tmp_path / "mypy.ini").write_text(MYPY)
    mypy = (sys.executable, "-m", "mypy", "--python-executable", installed)
    run(*mypy, *sorted(tmp_path.glob("*.py")), cwd=tmp_path)
    (marker,) = installed.parent.parent.glob("lib/python*/site-packages/ltkd_jax/py.typed")
    marker.rename(tmp_path / "away")
    try:
        assert "py.typed marker" in run(*mypy, "typed_usage.py", cwd=tmp_path, rc=1)
    finally:
        (tmp_path / "away").rename(marker)


@pytest.mark.slow
def test_a_checkout_needs_no_installation(installed, tmp_path):
    """Its version is known where nothing is installed, and the losses run."""
    copy([name for name in tracked() if name.startswith("ltkd_jax/")], tmp_path)
    script = "import ltkd_jax, ltkd_jax.losses; print(ltkd_jax.__version__, ltkd_jax.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([installed, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    version, where = done.stdout.split()
    assert version == ltkd_jax.__version__ and pathlib.Path(where).is_relative_to(tmp_path)
