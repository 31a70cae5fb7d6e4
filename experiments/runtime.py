"""The set-up that every command needs before it computes anything."""

import importlib.metadata
import logging
import os
import shlex
import sys

import jax

from ltkd_jax import files
from ltkd_jax.training import hosts

# Exit status of a command that a signal stopped, and that the same command continues.
STOPPED = 75

# On CPU, XLA gives most operations to YNNPACK by default. Without this flag it would do
# so with convolutions, too, which Eigen computes faster: by 19 times for the gradient
# of a 3×3 kernel at 32×32 pixels (docs/performance.md).
_NO_YNN_CONVOLUTIONS = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)
# XLA aborts the process if it does not know a flag, so the flag is set only for the
# releases of jaxlib that are known to accept it.
_JAXLIB_WITH_FLAG = ("0.10.", "0.11.")

# Options of jax that change random numbers or precision, at jax's defaults. They can be
# set by environment variables, such as JAX_ENABLE_X64, but a result must depend on its
# config alone.
_NUMERICS = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
}


def initialize(distributed: str | None = None) -> None:
    """Sets up XLA, jax's numbers, logging and the cache of compiled programs.

    The cache is on disk, in $LTKD_CACHE or .jax_cache, and shared by all runs.

    Args:
      distributed: how this process joins other ones, see `hosts.start`; None for a
        single process.
    """
    set_xla_flags()
    for name, value in _NUMERICS.items():
        # A later jax may lack an option.
        if hasattr(jax.config, name):
            jax.config.update(name, value)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        cache_dir = files.expand_user(os.environ.get("LTKD_CACHE", ".jax_cache"))
    except FileNotFoundError as error:
        sys.exit(f"error: LTKD_CACHE={error}")
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(cache_dir))
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
    """Adds this program's flags to the environment variable XLA_FLAGS.

    XLA reads the variable once, when jax uses its first device. A value that the user
    has set for the same flag is kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    jaxlib_version = importlib.metadata.version("jaxlib")
    flag_name = _NO_YNN_CONVOLUTIONS.partition("=")[0]
    if jaxlib_version.startswith(_JAXLIB_WITH_FLAG) and flag_name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNN_CONVOLUTIONS}".strip()


def command_line(module: str, arguments: list[str]) -> str:
    """Returns the command that repeats a run, without what differs between machines.

    >>> command_line("experiments.main", ["--config.data.dir=x", "--workdir", "y"])
    'python -m experiments.main --workdir y'
    """
    portable = []
    remaining = iter(arguments)
    for word in remaining:
        flag, equals, _ = word.lstrip("-").partition("=")
        if flag not in ("config.data.dir", "data_dir", "distributed"):
            portable.append(word)
        elif not equals:
            # The flag's value is the next word.
            next(remaining, None)
    return shlex.join(["python", "-m", module, *portable])
