"""Loads config files."""

import importlib.util
import pathlib

import ml_collections

from experiments.config.validation import ConfigError
from ltkd_jax import files, names


def load_config(reference: str) -> ml_collections.ConfigDict:
    """Returns the locked config of "configs/x.py:argument", the syntax of `--config`.

    Raises:
      ConfigError: the file does not exist or has no `get_config`, or the argument is
        wrong.
    """
    path, _, argument = reference.partition(":")
    try:
        path = files.expand_user(path)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    if not pathlib.Path(path).is_file():
        raise ConfigError(missing_file(path))
    try:
        # By its path, not by its name: a config file need not be in a package.
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument).lock()
    except ValueError as error:
        raise ConfigError(f"{reference}: {error}") from None
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(
            f"{path} is no config, a file with get_config(argument): "
            f"{type(error).__name__}: {error}"
        ) from error


def missing_file(path: str) -> str:
    """Returns the error message for a config file that does not exist."""
    siblings = [str(sibling) for sibling in pathlib.Path(path).parent.glob("*.py")]
    return f"no config file {path!r}{names.suggestion(path, siblings)}"
