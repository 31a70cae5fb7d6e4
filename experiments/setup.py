"""What every command does first."""

import logging
import os
import shlex

import jax


def once() -> None:
    """Keeps compiled programs on disk between runs, in $LTKD_CACHE or .jax_cache, and the log to warnings."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.environ.get("LTKD_CACHE", ".jax_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def command_line(module: str, arguments: list[str]) -> str:
    """The command that repeats a run, without what differs between machines."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name != "config.data.dir":
            kept.append(word)
        elif not equals:
            next(words, None)  # the folder, as a word of its own
    return shlex.join(["python", "-m", module, *kept])
