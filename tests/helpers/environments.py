"""Virtual environments that take their packages from this one, copies of the checkout, and commands run in them."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
# pip finds every requirement in this environment: nothing is downloaded, nor built apart from it.
OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def create(folder):
    """Creates an environment that sees this one's packages but no checkout; returns its Python.

    A .pth file adds this environment's packages without what their own .pth files add, such as an editable install.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    pathlib.Path(packages, "zz_packages.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )
    return pathlib.Path(folder) / "bin" / "python"


def clean(**variables):
    """Returns the environment variables of a process that is to see nothing of this one but its compiled functions."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "XLA_FLAGS")
    }
    return {"LTKD_CACHE": str(ROOT / ".jax_cache"), **inherited, **OFFLINE, **variables}


def copy_checkout(folder):
    """Copies the checkout, changes that are not committed included; returns where."""
    ignored = shutil.ignore_patterns(
        ".*", "runs", "_build", "build", "dist", "__pycache__", "*.egg-info"
    )
    return shutil.copytree(ROOT, folder, ignore=ignored)


def run(*command, cwd=ROOT, **variables):
    """Runs a command that must succeed; returns what it printed."""
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=clean(**variables),
    )
    assert done.returncode == 0, (
        f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout
