"""The entries of a queue file, and the runs that they describe."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from experiments.config import identity, load, spec
from experiments.config.validation import ConfigError

_KEYS = {"config", "set", "seeds", "group", "best_of"}


@dataclasses.dataclass(frozen=True, eq=False)
class QueueEntry:
    """Describes one run of a queue.

    Attributes:
      config: "configs/x.py:argument", the syntax of `--config`.
      set: values of config keys, which are dotted paths.
      seed: the student's seed.
      group: a name for `best_of` of other entries.
      best_of: the group whose best run provides the hyperparameters of this run.
    """

    config: str
    set: dict[str, Any]
    seed: int
    group: str | None = None
    best_of: str | None = None

    def resolve(
        self,
        best: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> spec.RunSpec:
        """Returns the specification of this run.

        Args:
          best: a result. Its hyperparameters, of the method and of learned weights, are
            used unless the entry sets them.
          overrides: values of config keys that say how the run is executed.

        Raises:
          ConfigError: the config cannot be loaded, or a key or value is not allowed.
        """
        config = load.load_config(self.config)
        values = _hyperparameters(best["config"], config) if best else {}
        values |= {**self.set, "seed": self.seed, **(overrides or {})}
        load.set_values(config, values, f"{self.config} with {json.dumps(self.set)}")
        return spec.resolve(config)

    def command(self, run_spec: spec.RunSpec) -> str:
        """Returns the command that repeats this run alone.

        Args:
          run_spec: from `resolve`.
        """
        values = {**self.set, "seed": self.seed}
        if self.best_of:
            # Repeated alone, the run cannot look the best result up.
            values |= _hyperparameters(run_spec.config, run_spec.config)
        words = [f"--config.{key}={value}" for key, value in values.items()]
        modules = identity.custom_modules(run_spec.content)
        if modules:
            words.insert(0, f"--import={modules}")
        return shlex.join(
            ["python", "-m", "experiments.main", f"--config={self.config}", *words]
        )


def _hyperparameters(
    source: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns those hyperparameters of one config that another config has, too."""
    values = {}
    for section in ("method", "loss_weighting"):
        source_section = source.get(section, {})
        for key in config[section]:
            if key != "name" and key in source_section:
                values[f"{section}.{key}"] = source_section[key]
    return values


def read_queue(path: str | os.PathLike[str]) -> list[QueueEntry]:
    """Returns the entries of a queue file, one for each seed of each run, in order.

    Raises:
      ConfigError: the file cannot be read or has an unknown key, or an entry cannot
        choose from the group that its `best_of` names.
    """
    entries = []
    try:
        queue = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        for run in queue["runs"]:
            unknown = sorted(set(run) - _KEYS)
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r} in {json.dumps(run)}")
            values = {**queue.get("set", {}), **run.get("set", {})}
            for seed in run.get("seeds", [0]):
                entry = QueueEntry(
                    config=run["config"],
                    set=values,
                    seed=seed,
                    group=run.get("group"),
                    best_of=run.get("best_of"),
                )
                entries.append(entry)
    # AttributeError and TypeError come from JSON of another structure.
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the queue {path}: {error}") from None
    except KeyError as error:
        raise ConfigError(f"the queue {path} lacks the key {error}") from None
    try:
        _check_entries(entries)
    except ConfigError as error:
        raise ConfigError(f"queue {path}: {error}") from None
    return entries


def _check_entries(entries: list[QueueEntry]) -> None:
    groups = {entry.group for entry in entries}
    chosen_groups = {entry.best_of for entry in entries} - {None}
    for entry in entries:
        _check_types(entry)
        if "seed" in entry.set or re.search(r"[:,]\s*seed\s*=", entry.config):
            raise ConfigError(
                f"{entry.config!r}: set the student's seeds by the key 'seeds', a list"
            )
        # Chains of choices are not supported.
        if entry.best_of and entry.group in chosen_groups:
            raise ConfigError(
                f"a run of group {entry.group!r} cannot be best_of another group: "
                "other runs choose from it"
            )
        if entry.best_of and entry.best_of not in groups:
            raise ConfigError(
                f"best_of names {entry.best_of!r}, which is no run's group"
            )


def _check_types(entry: QueueEntry) -> None:
    # The type hints promise more than JSON does.
    path = str(entry.config).partition(":")[0]
    is_config = isinstance(entry.config, str) and path.endswith(".py")
    group_names = (entry.group, entry.best_of)
    are_names = all(isinstance(name, str | None) for name in group_names)
    if not is_config or not are_names:
        raise ConfigError(
            f"{entry.config!r}: the config must be configs/….py:ARGUMENT, group and "
            "best_of names"
        )
