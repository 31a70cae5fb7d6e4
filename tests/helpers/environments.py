"""Virtual environments that use this one's packages, and commands that run in them."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
# pip finds every requirement among this environment's packages: it downloads nothing,
# and builds with the setuptools that is installed.
OFFLINE = {
    "PIP_NO_INDEX": "1",
    # pip reads this variable as the value of `build_isolation`: 0 turns isolation off.
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
# PYTHONPATH would let the process import the checkout. XLA_FLAGS is set by conftest.py
# for the unit tests, with optimization turned off.
NOT_INHERITED = ("PYTHONPATH", "XLA_FLAGS")


def create(folder):
    """Creates an environment without the checkout, and returns its Python.

    A .pth file adds this environment's packages. Python does not execute the .pth files
    of a folder that is added so: an editable install of the checkout stays out.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    pathlib.Path(packages, "zz_packages.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )
    return pathlib.Path(folder) / "bin" / "python"


def isolated_variables(**variables):
    """Returns this process's variables, less those that would affect what is tested.

    The compilation cache is shared: without it, each process would compile everything.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in NOT_INHERITED
    }
    return {"LTKD_CACHE": str(ROOT / ".jax_cache"), **inherited, **OFFLINE, **variables}


def copy_checkout(folder):
    """Copies the checkout with its uncommitted changes, and returns the folder."""
    ignored = shutil.ignore_patterns(
        ".*", "runs", "_build", "build", "dist", "__pycache__", "*.egg-info"
    )
    return shutil.copytree(ROOT, folder, ignore=ignored)


def run(*command, cwd=ROOT, **variables):
    """Runs a command, checks that it succeeds, and returns its standard output."""
    process = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=isolated_variables(**variables),
    )
    assert process.returncode == 0, (
        f"{command}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    )
    return process.stdout
