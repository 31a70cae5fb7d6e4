"""Loads config files and sets their keys."""

import argparse
import importlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import common
from experiments.config.names import check_key
from experiments.config.validation import ConfigError
from ltkd_jax import files, names


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --import, the modules for `import_modules`, as the option `modules`."""
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        default="",
        help="modules that register custom methods and models, separated by commas",
    )


def import_modules(module_names: str) -> None:
    """Imports modules that register methods or models.

    Args:
      module_names: separated by commas, such as "my_methods,my_models"; may be empty.

    Raises:
      ConfigError: a module cannot be imported.
    """
    for name in filter(None, module_names.split(",")):
        try:
            importlib.import_module(name.strip())
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(
                f"--import={module_names}: {name} cannot be imported "
                f"({type(error).__name__}: {error}): give names of modules in this "
                "folder, in the environment or in a folder of PYTHONPATH, without .py"
            ) from error


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


def set_values(
    config: ml_collections.ConfigDict, values: Mapping[str, Any], source: str
) -> None:
    """Sets values of a config's keys.

    Args:
      config: is changed.
      values: by dotted paths such as "train.lr".
      source: where the values are from, for an error.

    Raises:
      ConfigError: the config has no such key, or the type of a value is another one.
    """
    paths = common.key_paths(config)
    for key in values:
        check_key(key)
        if key not in paths:
            raise ConfigError(f"{source}: {unknown_key(key, paths)}")
    try:
        config.update_from_flattened_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None


def missing_file(path: str) -> str:
    """Returns the error message for a config file that does not exist."""
    siblings = [str(sibling) for sibling in pathlib.Path(path).parent.glob("*.py")]
    hint = names.suggestion(path, siblings)
    if not siblings and not pathlib.Path(path).is_absolute():
        hint = ": run in the checkout, or give the path of the file"
    return f"no config file {path!r}{hint}"


def unknown_key(key: str, paths: list[str]) -> str:
    """Returns the error message for a key that is not among a config's paths."""
    hint = names.suggestion(key, paths) or ";"
    return f"the config has no key {key!r}{hint} configs/common.py has all keys"
