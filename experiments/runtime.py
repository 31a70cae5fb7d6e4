"""What every command does first."""

import importlib.metadata
import logging
import os
import shlex
import sys

import jax

from ltkd_jax.training import hosts

STOPPED = (
    75  # exit status of a command that a signal or its time limit stopped, after saving
)

# On CPU all but convolutions may go to YNNPACK, as XLA would have it; those go to Eigen, which is faster, by 19 times
# for the gradient of a 3×3 kernel at 32×32 pixels (docs/performance.md). XLA ends the process at a flag that it does
# not know, so only releases that are known to accept this one get it.
_NO_YNN_CONVOLUTIONS = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)
_ACCEPTING = ("0.10.", "0.11.")  # of jaxlib


def initialize(distributed: str | None = None) -> None:
    """Keeps compiled programs on disk between runs, in $LTKD_CACHE or .jax_cache, and the log to warnings; sets XLA up.

    Args:
      distributed: for one of several processes, as `hosts.start`.
    """
    set_xla_flags()
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    jax.config.update(
        "jax_compilation_cache_dir",
        os.path.abspath(os.environ.get("LTKD_CACHE", ".jax_cache")),
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed:
        print(
            f"waiting up to five minutes for the other processes ({distributed})",
            file=sys.stderr,
        )
        try:
            hosts.start(distributed)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {error}")


def set_xla_flags() -> None:
    """Adds this program's flags to XLA_FLAGS, which XLA reads when the first device is asked for."""
    flags = os.environ.get("XLA_FLAGS", "")
    jaxlib = importlib.metadata.version("jaxlib")
    if (
        jaxlib.startswith(_ACCEPTING)
        and _NO_YNN_CONVOLUTIONS.split("=")[0] not in flags
    ):
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNN_CONVOLUTIONS}".strip()


def command_line(module: str, arguments: list[str]) -> str:
    """The command that repeats a run, without what differs between machines."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name not in ("config.data.dir", "distributed"):
            kept.append(word)
        elif not equals:
            next(words, None)  # its value, as a word of its own
    return shlex.join(["python", "-m", module, *kept])
