"""The console of the commands, and parsers of their arguments for `argparse`."""

import argparse
import io
import sys
from collections.abc import Callable

from ltkd_jax import files


def replace_unencodable() -> None:
    """Lets the standard output show "?" for what its encoding does not have.

    By default Python raises UnicodeEncodeError there, for example for "…" in ASCII or
    Latin-1. The standard error needs no such setting: Python escapes what it lacks.
    """
    # A notebook, or a program without a console, has another object or None.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def path_argument(text: str) -> str:
    """Returns an argument with ~ expanded: shells leave it in `--output=~/x`."""
    try:
        return files.expand_user(text)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from a minimum on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number of at least {minimum}"
            )
        return int(text)

    return parse
