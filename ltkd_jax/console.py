"""The console of the commands, and arguments that are paths."""

import argparse
import io
import sys

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
    """Returns an argument with ~ expanded: shells leave it in `--output=~/x`.

    It is a `type` for `argparse`, which names the argument in the error.
    """
    try:
        return files.expand_user(text)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
