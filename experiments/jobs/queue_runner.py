"""Does the runs of a queue that have no result yet, alone or beside other processes."""

import collections
import pathlib
import sys
import time

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
    """A folder of results, one JSON a run, found by the hash of the run's config."""

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)

    def find(self, spec: RunSpec) -> dict | None:
        """Returns the result of a run; None if there is none.

        Raises:
          ConfigError: its file is damaged.
        """
        path = self._path(spec)
        return identity.read_json(path) if path.exists() else None

    def add(self, spec: RunSpec, results: dict, group: str | None) -> None:
        """Writes the result of a run, with its entry's group."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self._path(spec), {**results, "group": group})

    def _path(self, spec):
        return self._folder / f"{spec.name}-{spec.hash}.json"


class Queue:
    """The runs of a queue: their specifications, results and work directories.

    Args:
      entries: as `read_queue` returns them.
      results: the folder of results.
      folder: gets a work directory for each run.
      data_dir: the TFDS directory of every run; each config's own if empty.
    """

    def __init__(
        self, entries: list[QueueEntry], results: Results, folder, data_dir: str = ""
    ):
        self._entries = entries
        self._results = results
        self._folder = pathlib.Path(folder)
        self._data_dir = {"data.dir": data_dir} if data_dir else {}
        self._specs = {}
        # A first time without the chosen hyperparameters, on which no teacher depends.
        specs = {entry: entry.resolve(**self._data_dir) for entry in entries}
        sharing = collections.Counter(
            spec.teacher_hash
            for spec in specs.values()
            if spec.needs_teacher and spec.can_use_table
        )
        self._table_runs = {
            entry: max(1, sharing[spec.teacher_hash]) for entry, spec in specs.items()
        }

    def spec(self, entry: QueueEntry) -> RunSpec | None:
        """Returns the specification of an entry's run; None while the group that it chooses from is not done."""
        if entry not in self._specs:
            best = self.best_of(entry.best_of) if entry.best_of else None
            if entry.best_of and best is None:
                return None
            values = {**self._data_dir, "teacher.table_runs": self._table_runs[entry]}
            self._specs[entry] = entry.resolve(best, **values)
        return self._specs[entry]

    def best_of(self, group: str) -> dict | None:
        """Returns a group's result with the best balanced validation accuracy; None while one is missing.

        Raises:
          ConfigError: a result of the group without a validation set.
        """
        results = [
            self.result(entry) for entry in self._entries if entry.group == group
        ]
        if any(result is None for result in results):
            return None
        if any(result["validation"] is None for result in results):
            raise ConfigError(
                f"group {group!r} has runs without validation images: set data.validation_per_class"
            )
        return max(results, key=lambda result: result["validation"]["all"])

    def result(self, entry: QueueEntry) -> dict | None:
        """Returns the result of an entry's run; None if there is none."""
        spec = self.spec(entry)
        return None if spec is None else self._results.find(spec)

    def missing(self) -> list[QueueEntry]:
        """Returns the entries without a result, in order."""
        return [entry for entry in self._entries if self.result(entry) is None]

    def results(self) -> list[dict]:
        """Returns the results that there are, in the queue's order."""
        results = [self.result(entry) for entry in self._entries]
        return [result for result in results if result is not None]

    def workdirs(self) -> list[pathlib.Path]:
        """Returns the work directories of finished runs, which hold their training curves too."""
        specs = [self.spec(entry) for entry in self._entries]
        folders = {self._workdir(spec) for spec in specs if spec is not None}
        return sorted(
            folder for folder in folders if (folder / "results.json").exists()
        )

    def run(self, entry: QueueEntry, stop: StopRequest) -> bool:
        """Does one run and adds its result; returns False where the group that it chooses from is not done.

        Raises:
          Stopped, DivergedError, ConfigError: as `experiments.trainer.run.run`.
        """
        spec = self.spec(entry)
        if spec is None:
            return False
        if (
            self._results.find(spec) is None
        ):  # another process may have done it meanwhile
            results = run.run(
                spec, self._workdir(spec), command=entry.command(spec), stop=stop
            )
            self._results.add(spec, results, entry.group)
        return True

    def _workdir(self, spec):
        return self._folder / f"{spec.name}-{spec.hash}"


def run_missing(queue: Queue, stop: StopRequest, *, poll_seconds: float = 5.0) -> int:
    """Does the runs without a result until it is asked to stop, and reports on stderr what went wrong.

    Other processes may do the same with the same folders: this one leaves to them what they have begun, and takes
    over what they leave unfinished.

    Returns:
      The number of runs that failed or could not be chosen.
    """
    failed = 0
    todo = queue.missing()
    with tqdm.tqdm(
        total=len(todo), desc="queue", unit="run", dynamic_ncols=True, position=0
    ) as bar:
        while todo:
            remaining = []
            any_in_use = False
            for entry in todo:
                bar.set_postfix_str(
                    f"{entry.config.rpartition('/')[2]}, seed {entry.seed}"
                )
                if stop.reason:
                    _report(f"stopped by {stop.reason}; the same command continues")
                    return failed
                try:
                    is_done = queue.run(entry, stop)
                except run.InUseError:
                    is_done = False
                    any_in_use = True
                except StoppedError as stopped:
                    _report(f"{stopped}; the same command continues")
                    return failed
                except (ConfigError, DivergedError, OSError) as error:
                    _report(f"error: {entry.config}, seed {entry.seed}: {error}")
                    failed += 1
                    is_done = True
                if is_done:
                    bar.update()
                else:
                    remaining.append(entry)
            if len(remaining) == len(todo):
                if not any_in_use:
                    for entry in remaining:
                        _report(
                            f"{entry.config} waits for all runs of group {entry.best_of!r}"
                        )
                    return failed + len(remaining)
                bar.set_postfix_str("waiting for runs of other processes")
                time.sleep(poll_seconds)
            todo = remaining
    return failed


def _report(text):
    tqdm.tqdm.write(text, file=sys.stderr)
