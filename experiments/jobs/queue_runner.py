"""Does the runs of a queue that have no result yet, alone or beside other processes."""

import collections
import enum
import json
import os
import pathlib
import sys
import time
from typing import Any

import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec
from experiments.config.validation import ConfigError
from experiments.jobs.queue_entry import QueueEntry
from experiments.trainer import run
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.loop import DivergedError
from ltkd_jax import files


class Results:
    """Stores results in a folder, one JSON file for each run.

    A result is looked up by the hash of its config's identity, so after a change of a
    default the run counts as new.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)

    def find(self, spec: RunSpec) -> dict[str, Any] | None:
        """Returns the result of a run, None if there is none.

        Raises:
          ConfigError: its file is damaged.
        """
        path = self._path(spec)
        return identity.read_json(path) if path.exists() else None

    def add(self, spec: RunSpec, results: dict[str, Any], group: str | None) -> None:
        """Writes the result of a run, with the group of its entry."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self._path(spec), {**results, "group": group})

    def _path(self, spec: RunSpec) -> pathlib.Path:
        return self._folder / f"{spec.name}-{spec.hash}.json"


class Queue:
    """Resolves the entries of a queue to runs, and finds their results.

    Args:
      entries: from `read_queue`.
      results: where results are stored.
      folder: for a work directory of each run.
      data_dir: the TFDS directory of all runs; if empty, that of each config.

    Raises:
      ConfigError: a config cannot be loaded or has a key or value that is not allowed,
        or a run of a group that `best_of` names has no validation images.
    """

    def __init__(
        self,
        entries: list[QueueEntry],
        results: Results,
        folder: str | os.PathLike[str],
        data_dir: str = "",
    ):
        self._entries = entries
        self._results = results
        self._folder = pathlib.Path(folder)
        self._overrides = {"data.dir": data_dir} if data_dir else {}
        self._specs: dict[QueueEntry, RunSpec] = {}
        # Without the hyperparameters of `best_of`, which may not be known yet: neither
        # the teacher nor the data depend on them.
        self._preliminary_specs = {
            entry: entry.resolve(None, self._overrides) for entry in entries
        }
        self._table_runs = self._count_table_runs()
        self._check_groups()

    def _count_table_runs(self) -> dict[QueueEntry, int]:
        """Returns for each entry the number of runs that can read its teacher's table.

        It is at least 1.
        """
        specs = self._preliminary_specs
        num_runs = collections.Counter(
            spec.teacher_hash for spec in specs.values() if spec.can_use_table
        )
        return {
            entry: max(1, num_runs[spec.teacher_hash]) for entry, spec in specs.items()
        }

    def _check_groups(self) -> None:
        """Raises ConfigError if a group of a `best_of` lacks validation images."""
        chosen_groups = {entry.best_of for entry in self._entries} - {None}
        for entry, spec in self._preliminary_specs.items():
            if entry.group in chosen_groups and spec.data.validation_per_class == 0:
                raise ConfigError(
                    f"{entry.config} of group {entry.group!r}: "
                    "data.validation_per_class=0, and best_of chooses by the accuracy "
                    "on validation images: set it to at least 1"
                )

    def spec(self, entry: QueueEntry) -> RunSpec | None:
        """Returns the specification of an entry's run.

        It is None while its `best_of` names a group with runs that have no result.
        """
        if entry not in self._specs:
            best = None
            if entry.best_of:
                best = self.best_of(entry.best_of)
                if best is None:
                    return None
            overrides = {
                **self._overrides,
                "teacher.table_runs": self._table_runs[entry],
            }
            self._specs[entry] = entry.resolve(best, overrides)
        return self._specs[entry]

    def best_of(self, group: str) -> dict[str, Any] | None:
        """Returns a group's result with the best balanced validation accuracy.

        It is None while a run of the group has no result.
        """
        results = []
        for entry in self._entries:
            if entry.group == group:
                result = self.result(entry)
                if result is None:
                    return None
                results.append(result)
        return max(results, key=lambda result: result["validation"]["all"])

    def result(self, entry: QueueEntry) -> dict[str, Any] | None:
        """Returns the result of an entry's run, None if there is none."""
        spec = self.spec(entry)
        return None if spec is None else self._results.find(spec)

    def missing(self) -> list[QueueEntry]:
        """Returns the entries without a result, in order."""
        return [entry for entry in self._entries if self.result(entry) is None]

    def check(self, *, devices: bool) -> None:
        """Checks all runs without a result before the first of them starts.

        Args:
          devices: see `experiments.trainer.run.check`.

        Raises:
          ConfigError: some cannot run; it names all of them.
        """
        checked = set()
        configs_of = collections.defaultdict(list)  # by their problem
        for entry in tqdm.tqdm(self.missing(), desc="checking", unit="run", delay=5):
            # Runs that differ only in their seeds have the same problem.
            name = f"{entry.config} {json.dumps(entry.set) if entry.set else ''}"
            if name in checked:
                continue
            checked.add(name)
            spec = self.spec(entry) or self._preliminary_specs[entry]
            try:
                run.check(spec, devices=devices)
            except (ConfigError, OSError) as error:
                configs_of[str(error)].append(name.strip())
        if not configs_of:
            return
        lines = ["no run was started, since some cannot run:"]
        for problem, (name, *others) in configs_of.items():
            more = f" (and {len(others)} more)" if others else ""
            lines.append(f"{name}{more}: {problem}")
        raise ConfigError("\n  ".join(lines))

    def results(self) -> list[dict[str, Any]]:
        """Returns the results that exist, in the order of the queue."""
        results = [self.result(entry) for entry in self._entries]
        return [result for result in results if result is not None]

    def workdirs(self) -> list[pathlib.Path]:
        """Returns the work directories of finished runs, with their training curves."""
        folders = set()
        for entry in self._entries:
            spec = self.spec(entry)
            if spec is not None:
                folders.add(self._workdir(spec))
        return sorted(
            folder for folder in folders if (folder / "results.json").exists()
        )

    def run(self, entry: QueueEntry, stop: StopRequest) -> bool:
        """Does the run of an entry and stores its result.

        Returns:
          False if the run cannot start yet, see `spec`.

        Raises:
          StoppedError, DivergedError, ConfigError: see `experiments.trainer.run.run`.
        """
        spec = self.spec(entry)
        if spec is None:
            return False
        # Another process may have done it since the queue was read.
        if self._results.find(spec) is None:
            results = run.run(
                spec, self._workdir(spec), command=entry.command(spec), stop=stop
            )
            self._results.add(spec, results, entry.group)
        return True

    def _workdir(self, spec: RunSpec) -> pathlib.Path:
        return self._folder / f"{spec.name}-{spec.hash}"


class _Outcome(enum.Enum):
    """What happened when a run was tried."""

    DONE = enum.auto()
    FAILED = enum.auto()
    STOPPED = enum.auto()
    # Another process is doing it.
    IN_USE = enum.auto()
    # The group that it chooses from is not done.
    WAITING = enum.auto()


def run_missing(queue: Queue, stop: StopRequest, *, poll_seconds: float = 5.0) -> int:
    """Does the runs without a result until all are done or it is asked to stop.

    Errors of runs are printed to stderr, and the other runs go on.

    Several processes may work on the same queue and folders. Each skips the runs that
    another has begun, and tries them again later: if that process has ended without a
    result, this one continues its run.

    Args:
      queue: the runs.
      stop: checked before each run, and within it.
      poll_seconds: between two passes over runs that are all in use.

    Returns:
      The number of runs that failed, or that wait for a group with a failed run.
    """
    num_failed = 0
    pending = queue.missing()
    with tqdm.tqdm(
        total=len(pending), desc="queue", unit="run", dynamic_ncols=True, position=0
    ) as bar:
        while pending:
            outcomes = {}
            for entry in pending:
                config_name = entry.config.rpartition("/")[2]
                bar.set_postfix_str(f"{config_name}, seed {entry.seed}")
                outcome = _try_run(queue, entry, stop)
                if outcome is _Outcome.STOPPED:
                    return num_failed
                if outcome is _Outcome.FAILED:
                    num_failed += 1
                if outcome in (_Outcome.DONE, _Outcome.FAILED):
                    bar.update()
                else:
                    outcomes[entry] = outcome
            # Without progress, only another process can help.
            if len(outcomes) == len(pending):
                if _Outcome.IN_USE not in outcomes.values():
                    _report_waiting(pending)
                    return num_failed + len(pending)
                bar.set_postfix_str("waiting for runs of other processes")
                time.sleep(poll_seconds)
            pending = list(outcomes)
    return num_failed


def _try_run(queue: Queue, entry: QueueEntry, stop: StopRequest) -> _Outcome:
    """Does a run, and prints an error if there is one."""
    if stop.reason:
        _report(f"stopped by {stop.reason}; the same command continues")
        return _Outcome.STOPPED
    try:
        done = queue.run(entry, stop)
    except run.InUseError:
        return _Outcome.IN_USE
    except StoppedError as error:
        _report(f"{error}; the same command continues")
        return _Outcome.STOPPED
    except (ConfigError, DivergedError, OSError) as error:
        _report(f"error: {entry.config}, seed {entry.seed}: {error}")
        return _Outcome.FAILED
    return _Outcome.DONE if done else _Outcome.WAITING


def _report_waiting(entries: list[QueueEntry]) -> None:
    for entry in entries:
        _report(f"{entry.config} waits for all runs of group {entry.best_of!r}")


def _report(text: str) -> None:
    # Printed above the progress bar, not into it.
    tqdm.tqdm.write(text, file=sys.stderr)
