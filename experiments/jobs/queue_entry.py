"""The runs of a queue file: each an entry, resolved to its config."""

import dataclasses
import importlib.util
import json
import pathlib
import shlex

from experiments.config import checks


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a queue: a config, what is set in it, and its place."""

    config: str
    set: dict
    seed: int
    group: str | None = None
    best_of: str | None = None


def read_queue(path) -> list[Entry]:
    """The runs of a queue file, in order.

    Raises:
      checks.ConfigError: the file is not there, not JSON, or has a key that no run has.
    """
    try:
        queue = json.loads(pathlib.Path(path).read_text())
        shared, entries = queue.get("set", {}), []
        for run in queue["runs"]:
            unknown = set(run) - {"config", "set", "seeds", "group", "best_of"}
            if unknown:
                raise ValueError(f"unknown key {sorted(unknown)[0]!r} in {json.dumps(run)}")
            for seed in run.get("seeds", [0]):
                values = {**shared, **run.get("set", {})}
                entries.append(Entry(run["config"], values, seed, run.get("group"), run.get("best_of")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise checks.ConfigError(f"cannot read the queue {path}: {error}") from None
    except KeyError as error:
        raise checks.ConfigError(f"the queue {path} lacks the key {error}") from None
    for entry in entries:
        texts = (entry.config, *(name for name in (entry.group, entry.best_of) if name is not None))
        if not all(isinstance(text, str) for text in texts) or not entry.config.partition(":")[0].endswith(".py"):
            raise checks.ConfigError(f"queue {path}: {entry.config!r} must be configs/….py:ARGUMENT, a group a name")
        if entry.best_of is not None and entry.best_of == entry.group:
            raise checks.ConfigError(f"queue {path}: a run of group {entry.group!r} cannot be best_of its own group")
    missing = {entry.best_of for entry in entries} - {entry.group for entry in entries} - {None}
    if missing:
        raise checks.ConfigError(f"queue {path}: best_of names {sorted(missing)[0]!r}, which is no run's group")
    return entries


def load_config(reference: str):
    """The config of "configs/x.py:argument", as `--config` takes it."""
    path, _, argument = reference.partition(":")
    if not pathlib.Path(path).is_file():
        raise checks.ConfigError(f"no config file {path!r}")
    try:
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument).lock()
    except ValueError as error:
        raise checks.ConfigError(f"{reference}: {error}") from None
    except Exception as error:  # a file of the user's raises what it likes
        raise checks.ConfigError(
            f"{path} is no config, a file with get_config(argument): {type(error).__name__}: {error}"
        ) from error


def resolve(entry: Entry, best: dict | None = None, data_dir: str = ""):
    """The config of an entry; `best` is the result whose hyperparameters it takes."""
    config = load_config(entry.config)
    chosen = best["config"]["method"] if best else {}
    values = {f"method.{key}": chosen[key] for key in config.method if key != "name" and key in chosen}
    values |= {**entry.set, "seed": entry.seed}  # what the entry says itself goes before
    if data_dir:
        values["data.dir"] = data_dir
    try:
        config.update_from_flattened_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise checks.ConfigError(f"{entry.config} with {values}: {error}") from None
    checks.validate(config)
    return config


def command(entry: Entry, config) -> str:
    """The command that does this run alone."""
    values = {**entry.set, "seed": entry.seed}
    if entry.best_of:
        values |= {f"method.{key}": value for key, value in config.method.items() if key != "name"}
    words = [f"--config.{key}={value}" for key, value in values.items()]
    return shlex.join(["python", "-m", "experiments.main", f"--config={entry.config}", *words])
