"""The wheel and the source distribution: contents, metadata, types and first use."""

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
TYPED_USAGE = ROOT / "tests" / "helpers" / "typed_usage.py"
# A user's strict configuration. It excuses optax, which has no type hints, but not
# ltkd_jax.
MYPY = "[mypy]\nstrict = true\n[mypy-optax]\nignore_missing_imports = true\n"
# Excuses the README's examples, which have no type hints of their own.
UNTYPED = "# mypy: allow-untyped-defs, allow-untyped-calls\n"
REQUIREMENTS = {
    "jax",
    "flax",
    "optax",
    "chex",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "ml-collections",
}


@pytest.fixture(scope="module")
def tracked():
    """Returns the names of the files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    names = run("git", "ls-files", "-z").split("\0")
    # The list ends with a separator, and includes files that were deleted.
    return {name for name in names if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """Returns the paths of the source distribution and of the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    # A file that git does not track must not get into a distribution.
    for name in tracked:
        copy = checkout / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", folder / "dist", checkout)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Returns the Python of an environment in which the wheel is installed."""
    _, wheel = built
    python = environments.create(tmp_path_factory.mktemp("installed") / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    return python


def test_wheel_contents(built, tracked):
    _, wheel = built
    info = f"ltkd_jax-{ltkd_jax.__version__}.dist-info"
    metadata = ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    expected = {name for name in tracked if name.startswith("ltkd_jax/")}
    # Without this file, type checkers ignore the package's hints.
    assert "ltkd_jax/py.typed" in expected
    expected |= {f"{info}/{name}" for name in metadata}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_source_distribution(built, tracked, tmp_path):
    """Holds the entire checkout, so that its tests run in it."""
    sdist, _ = built
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)) for path in files}
    assert tracked - names <= {".gitignore", ".ci/run"}
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    output = run(*pytest_command, "tests/unit/test_groups.py", cwd=folder)
    assert " passed" in output
    assert "skipped" not in output


def test_metadata(built):
    wheel = zipfile.ZipFile(built[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_string(wheel.read(name).decode())
    assert metadata["Version"] == ltkd_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == README.strip()
    # A line with a semicolon has a condition, such as an extra.
    lines = [line for line in metadata.get_all("Requires-Dist") if ";" not in line]
    required = {re.match(r"[\w-]+", line).group() for line in lines}
    assert required >= REQUIREMENTS
    assert not required & {"pytest", "mypy", "matplotlib", "torch"}


def test_wheel_runs_examples(installed, tmp_path):
    """Runs the README's first example and a user's file away from the checkout."""
    shutil.copy(TYPED_USAGE, tmp_path)
    environment = installed.parent.parent
    # Only what follows the example may load flax, TFDS or orbax.
    script = f"""
{EXAMPLES[0]}
import importlib.metadata, sys
import numpy as np
import ltkd_jax
heavy = {{"flax", "tensorflow_datasets", "orbax", "grain", "ml_collections"}}
assert not heavy & set(sys.modules), sorted(sys.modules)
assert importlib.metadata.version("ltkd_jax") == ltkd_jax.__version__
# The loss is log 6: student and teacher are uniform over six classes.
assert abs(float(loss.mean()) - 1.7918) < 1e-4
for module in ltkd_jax.__all__:
    assert getattr(ltkd_jax, module).__file__.startswith({str(environment)!r})

import typed_usage
loss = typed_usage.mean_loss(jnp.zeros((4, 6)), np.eye(4, 6), np.arange(4))
assert loss.shape == ()
weights = typed_usage.learned_weights({{"x": jnp.eye(3), "y": jnp.arange(3.0)}})
assert weights.shape == (3, 2)
terms = typed_usage.custom_objective(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.arange(2))
assert terms.shape == (2,)
metrics = typed_usage.evaluate(jnp.zeros((2, 8, 8, 1)), jnp.arange(2))
assert abs(sum(metrics.values()) - 1) < 1e-6
"""
    # Nothing here runs often enough to be worth optimizing.
    flags = "--xla_backend_optimization_level=0"
    run(installed, "-c", script, cwd=tmp_path, XLA_FLAGS=flags)


def test_types_of_wheel(installed, tmp_path):
    """Checks right and wrong uses by a user's `mypy --strict`.

    The wrong uses in `misuse` of the user's file have `type: ignore` comments, and the
    strict mode reports each that nothing needs.
    """
    shutil.copy(TYPED_USAGE, tmp_path)
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"readme{number}.py").write_text(UNTYPED + example)
    (tmp_path / "mypy.ini").write_text(MYPY)
    # mypy is that of this environment; it reads the types of the installed wheel.
    mypy = [sys.executable, "-m", "mypy", "--python-executable", installed]
    run(*mypy, *tmp_path.glob("*.py"), cwd=tmp_path)
