"""The program that trains, compares and reports; it needs the extra `train`."""

import importlib.util
import sys

# What the extra installs, by the names of its modules.
_MODULES = ("grain", "jinja2", "matplotlib", "sklearn", "tqdm")


def _check_extra() -> None:
    """Raises ModuleNotFoundError, in one line for a command, without the extra."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if not missing:
        return
    message = (
        f"the program needs {', '.join(missing)}, which the library alone does not: "
        'pip install -e ".[train]"'
    )
    # What Python writes there while it looks for the module of `python -m`.
    if sys.argv[:1] == ["-m"]:
        sys.exit(f"error: {message}")
    raise ModuleNotFoundError(message)


_check_extra()
