"""Error messages about unknown names."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the choice closest to `name`.

    It is "" where no choice is close. A dotted path is also meant by its last name.

    >>> suggestion("ltkx", ["ce", "ltkd"])
    "; did you mean 'ltkd'?"
    >>> suggestion("lr", ["seed", "train.lr", "teacher.train.lr"])
    "; did you mean 'train.lr'?"
    """
    paths: dict[str, str] = {}
    for choice in choices:
        # The first of several paths that end alike is meant.
        paths.setdefault(choice.rpartition(".")[2], choice)
        paths[choice] = choice
    matches = difflib.get_close_matches(str(name), list(paths), n=1)
    return f"; did you mean {paths[matches[0]]!r}?" if matches else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Returns the error message for a name that is not among the choices.

    >>> unknown("method", "ltkx", ["ce", "ltkd"])
    "unknown method 'ltkx'; did you mean 'ltkd'? The methods are: ce, ltkd"
    """
    choices = list(choices)
    hint = suggestion(name, choices) or "."
    return f"unknown {kind} {name!r}{hint} The {kind}s are: {', '.join(choices)}"


def unregistered(kind: str, name: str, registry: Iterable[str]) -> str:
    """Returns the error message for a method or a model that is not registered.

    >>> unregistered("model", "mlp", ["vgg8"]).partition(". ")[2]
    'The models are: vgg8; a custom one: import its module first (--import=MODULE)'
    """
    message = unknown(kind, name, registry)
    return f"{message}; a custom one: import its module first (--import=MODULE)"
