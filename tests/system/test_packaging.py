"""What is built, and what an environment of someone else's gets: wheel, source distribution, metadata, types."""

import email
import re
import shutil
import sys
import tarfile
import zipfile

import pytest
from helpers import environments
from helpers.environments import ROOT, run

import ltkd_jax

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# What a user's own strict check says of packages that have no type hints; ltkd_jax is not among them.
MYPY = "[mypy]\nstrict = true\n[mypy-optax]\nignore_missing_imports = true\n"
UNTYPED = "# mypy: allow-untyped-defs, allow-untyped-calls\n"  # the README's examples have no hints of their own
TYPED_USAGE = ROOT / "tests" / "helpers" / "typed_usage.py"


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    return {
        name
        for name in run("git", "ls-files", "-z").split("\0")
        if name and (ROOT / name).exists()
    }


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """The source distribution of what git tracks, and the wheel that is built of nothing but it."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked:
        copy = folder / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "checkout",
    )
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment in which the wheel is installed."""
    python = environments.create(tmp_path_factory.mktemp("installed") / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built[1])
    return python


def test_wheel_holds_the_library(built, tracked):
    info = f"ltkd_jax-{ltkd_jax.__version__}.dist-info"
    metadata = {
        f"{info}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    }
    package = {name for name in tracked if name.startswith("ltkd_jax/")}
    assert "ltkd_jax/py.typed" in package
    assert set(zipfile.ZipFile(built[1]).namelist()) == package | metadata


def test_source_distribution_is_the_checkout_and_tests_itself(built, tracked, tmp_path):
    with tarfile.open(built[0]) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    names = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    assert tracked - names <= {".gitignore", ".ci/run"}
    flags = ("-q", "-p", "no:cacheprovider")
    printed = run(
        sys.executable, "-m", "pytest", *flags, "tests/unit/test_groups.py", cwd=folder
    )
    assert " passed" in printed and "skipped" not in printed


def test_metadata(built):
    wheel = zipfile.ZipFile(built[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_string(wheel.read(name).decode())
    assert metadata["Version"] == ltkd_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == README.strip()
    required = {
        re.match(r"[\w-]+", line).group()
        for line in metadata.get_all("Requires-Dist")
        if ";" not in line
    }
    assert required >= {
        "jax",
        "flax",
        "optax",
        "chex",
        "orbax-checkpoint",
        "tensorflow-datasets",
        "ml-collections",
    }
    assert not required & {"pytest", "mypy", "matplotlib", "torch"}


def test_wheel_runs_the_readmes_example_and_a_users_file(installed, tmp_path):
    """In a folder that is no checkout; the losses load neither flax nor TFDS nor orbax."""
    shutil.copy(TYPED_USAGE, tmp_path)
    script = f"""
{EXAMPLES[0]}
import sys, importlib.metadata, numpy as np, ltkd_jax
assert not {{"flax", "tensorflow_datasets", "orbax", "grain", "ml_collections"}} & set(sys.modules), sorted(sys.modules)
assert importlib.metadata.version("ltkd_jax") == ltkd_jax.__version__
assert abs(float(loss.mean()) - 1.7918) < 1e-4  # log 6: uniform student, uniform teacher
for module in ltkd_jax.__all__:
    assert getattr(ltkd_jax, module).__file__.startswith({str(installed.parent.parent)!r})
import typed_usage
assert typed_usage.mean_loss(jnp.zeros((4, 6)), np.eye(4, 6), np.arange(4)).shape == ()
assert typed_usage.learned_weights({{"x": jnp.eye(3), "y": jnp.arange(3.0)}}).shape == (3, 2)
assert typed_usage.custom_objective(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.arange(2)).shape == (2,)
assert abs(sum(typed_usage.evaluate(jnp.zeros((2, 8, 8, 1)), jnp.arange(2)).values()) - 1) < 1e-6
"""
    run(
        installed,
        "-c",
        script,
        cwd=tmp_path,
        XLA_FLAGS="--xla_backend_optimization_level=0",
    )


def test_types_of_the_wheel(installed, tmp_path):
    """A user's `mypy --strict` accepts right use, and reports each wrong use of `misuse`."""
    shutil.copy(TYPED_USAGE, tmp_path)
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"readme{number}.py").write_text(UNTYPED + example)
    (tmp_path / "mypy.ini").write_text(MYPY)
    run(
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        installed,
        *tmp_path.glob("*.py"),
        cwd=tmp_path,
    )
