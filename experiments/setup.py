"""What every command does first."""

import logging
import os
import shlex
import sys

import jax

from ltkd_jax.training import hosts


def once(distributed: str | None = None) -> None:
    """Keeps compiled programs on disk between runs, in $LTKD_CACHE or .jax_cache, and the log to warnings.

    Args:
      distributed: for one of several processes, as `hosts.start`.
    """
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.environ.get("LTKD_CACHE", ".jax_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed:
        print(f"meeting the other processes ({distributed}), for five minutes at most", file=sys.stderr)
        try:
            hosts.start(distributed)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {error}")


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
