"""Where a result comes from: device, versions, commit."""

import importlib.metadata
import os
import pathlib
import subprocess

import jax

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(precision: str, num_devices: int) -> dict:
    """`device`, `precision`, `versions` and `commit`, for `results.json`."""
    return {
        "device": _device(num_devices),
        "precision": precision,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def short() -> str:
    """One line for a benchmark: device, jax, commit."""
    found = describe("", 1)
    return (
        f"{found['device']}, jax {found['versions']['jax']}, commit {found['commit']}"
    )


def _device(num_devices):
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{len(os.sched_getaffinity(0))}-core CPU"
    return f"{num_devices} × {device.device_kind}"


def _commit():
    """The checkout's commit, marked if there are changes; "unknown" outside of one."""
    root = pathlib.Path(__file__).parent

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../ltkd_jax", "../configs", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
