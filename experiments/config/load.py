"""Reads config files."""

import importlib.util
import pathlib

import ml_collections

from experiments.config.validation import ConfigError
from ltkd_jax import names


def load_config(reference: str) -> ml_collections.ConfigDict:
    """Returns the locked config of "configs/x.py:argument", as `--config` takes it.

    Raises:
      ConfigError: there is no such file, it has no `get_config`, or the argument is wrong.
    """
    path, _, argument = reference.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(missing_file(path))
    try:
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument).lock()
    except ValueError as error:
        raise ConfigError(f"{reference}: {error}") from None
    except Exception as error:  # a user's file raises what it likes
        raise ConfigError(
            f"{path} is no config, a file with get_config(argument): {type(error).__name__}: {error}"
        ) from error


def missing_file(path: str) -> str:
    """Returns the message about a config file that does not exist."""
    hint = names.suggestion(path, map(str, pathlib.Path(path).parent.glob("*.py")))
    return f"no config file {path!r}{hint}"
