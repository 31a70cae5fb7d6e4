"""The origin of a result: device, versions and commit."""

import importlib.metadata
import os
import pathlib
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(precision: str, num_devices: int) -> dict[str, Any]:
    """Returns `device`, `precision`, `versions` and `commit`, for `results.json`.

    Args:
      precision: the config's.
      num_devices: the number of devices used.
    """
    return {
        "device": _device(num_devices),
        "precision": precision,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def short() -> str:
    """Returns device, version of jax and commit in one line, for a benchmark."""
    origin = describe(precision="", num_devices=1)
    versions = origin["versions"]
    return f"{origin['device']}, jax {versions['jax']}, commit {origin['commit']}"


def _device(num_devices: int) -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        num_cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # macOS has none
            # The cores that this process may use, of which the machine may have more.
            num_cores = len(os.sched_getaffinity(0))
        return f"{num_cores}-core CPU"
    return f"{num_devices} × {device.device_kind}"


def _commit() -> str:
    """Returns the checkout's commit, marked if it has changes, or "unknown"."""
    root = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        process = subprocess.run(
            ["git", *words],
            cwd=root,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
        return process.stdout.strip()

    try:
        # Only changes of the code count, not those of pages or results.
        changes = git("status", "--porcelain", "--", "../ltkd_jax", "../configs", ".")
        commit = git("rev-parse", "--short=12", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit
