"""The entries of a queue file, and the runs that they describe."""

import dataclasses
import json
import pathlib
import re
import shlex

from experiments.config import load, names, spec
from experiments.config.validation import ConfigError

_KEYS = {"config", "set", "seeds", "group", "best_of"}


@dataclasses.dataclass(frozen=True, eq=False)
class QueueEntry:
    """One run of a queue.

    Attributes:
      config: "configs/x.py:argument", as `--config` takes it.
      set: values of config keys, which are dotted paths.
      seed: the student's.
      group: the name by which other entries refer to this one's result.
      best_of: the group whose best result gives this run its method's hyperparameters.
    """

    config: str
    set: dict
    seed: int
    group: str | None = None
    best_of: str | None = None

    def resolve(self, best: dict | None = None, **execution) -> spec.RunSpec:
        """Returns the specification of this run.

        Args:
          best: the result whose hyperparameters it takes, those of learned weights too, but for what the entry sets.
          **execution: values of further config keys, such as `**{"data.dir": folder}`.

        Raises:
          ConfigError: a config that cannot be loaded, or a key or value that it does not accept.
        """
        config = load.load_config(self.config)
        values = _chosen(best["config"], config) if best else {}
        values |= {**self.set, "seed": self.seed, **execution}
        try:
            config.update_from_flattened_dict(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.config} with {values}: {error}") from None
        return spec.resolve(config)

    def command(self, run_spec: spec.RunSpec) -> str:
        """Returns the command that repeats this run alone; `run_spec` is what `resolve` returned."""
        values = {**self.set, "seed": self.seed}
        if self.best_of:
            values |= _chosen(run_spec.config, run_spec.config)
        words = [f"--config.{key}={value}" for key, value in values.items()]
        return shlex.join(
            ["python", "-m", "experiments.main", f"--config={self.config}", *words]
        )


def _chosen(source, config):
    """Returns the hyperparameters of `source` that `config` has too: the method's, and those of learned weights."""
    return {
        f"{section}.{key}": source[section][key]
        for section in ("method", "loss_weighting")
        for key in config[section]
        if key != "name" and key in source.get(section, {})
    }


def read_queue(path) -> list[QueueEntry]:
    """Returns the entries of a queue file, one for each seed, in order.

    Raises:
      ConfigError: the file cannot be read, has an unknown or a renamed key, or a `best_of` that cannot be chosen.
    """
    entries = []
    try:
        queue = json.loads(pathlib.Path(path).read_text())
        for run in queue["runs"]:
            unknown = sorted(set(run) - _KEYS)
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r} in {json.dumps(run)}")
            values = {**queue.get("set", {}), **run.get("set", {})}
            for seed in run.get("seeds", [0]):
                entries.append(
                    QueueEntry(
                        run["config"],
                        values,
                        seed,
                        run.get("group"),
                        run.get("best_of"),
                    )
                )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the queue {path}: {error}") from None
    except KeyError as error:
        raise ConfigError(f"the queue {path} lacks the key {error}") from None
    try:
        _check(entries)
    except ConfigError as error:
        raise ConfigError(f"queue {path}: {error}") from None
    return entries


def _check(entries):
    groups = {entry.group for entry in entries}
    chosen_from = {entry.best_of for entry in entries} - {None}
    for entry in entries:
        is_reference = isinstance(entry.config, str) and entry.config.partition(":")[
            0
        ].endswith(".py")
        if not is_reference or not all(
            isinstance(name, str | None) for name in (entry.group, entry.best_of)
        ):
            raise ConfigError(
                f"{entry.config!r}: the config must be configs/….py:ARGUMENT, group and best_of names"
            )
        if "seed" in entry.set or re.search(r"[:,]\s*seed\s*=", entry.config):
            raise ConfigError(
                f"{entry.config!r}: seeds of the student are given by the key 'seeds', a list"
            )
        for key in entry.set:
            names.check_key(key)
        if entry.best_of and entry.group in chosen_from:
            raise ConfigError(
                f"a run of group {entry.group!r} cannot be best_of another: it is what others choose from"
            )
        if entry.best_of and entry.best_of not in groups:
            raise ConfigError(
                f"best_of names {entry.best_of!r}, which is no run's group"
            )
