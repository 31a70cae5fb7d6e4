"""Errors about names: what was given, what is meant, what there is."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the choice closest to a name, "" where none is close.

    >>> suggestion("ltkx", ["ce", "ltkd"])
    "; did you mean 'ltkd'?"
    """
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Returns the message of an error about a name that is none of the choices.

    >>> unknown("method", "ltkx", ["ce", "ltkd"])
    "unknown method 'ltkx'; did you mean 'ltkd'? The methods are: ce, ltkd"
    """
    choices = list(choices)
    hint = suggestion(name, choices) or "."
    return f"unknown {kind} {name!r}{hint} The {kind}s are: {', '.join(choices)}"
