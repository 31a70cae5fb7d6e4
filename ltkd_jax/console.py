"""The console of the commands."""

import io
import sys


def replace_unencodable() -> None:
    """Lets the standard output show "?" for what its encoding does not have.

    By default Python raises UnicodeEncodeError there, for example for "…" in ASCII or
    Latin-1. The standard error needs no such setting: Python escapes what it lacks.
    """
    # A notebook, or a program without a console, has another object or None.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
