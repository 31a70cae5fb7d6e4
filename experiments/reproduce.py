"""Runs what a queue file asks for and has no result yet, one JSON a run into a results folder.

    python -m experiments.reproduce experiments/queues/demo.json --results=runs/demo/results
    python -m experiments.reproduce experiments/queues/gpu.json --minutes=25 --data_dir=DIR
    python -m experiments.report --results=results --queue experiments/queues/*.json   # the table, beside the papers'

A queue is JSON: {"about": …, "set": {…}, "runs": [{"config": "configs/x.py:METHOD,…", "set": {"train.epochs": 60},
"seeds": [0, 1, 2], "group": …, "best_of": …}]}. A run with "best_of" takes its method's hyperparameters from the run
of that group with the best balanced validation accuracy, and waits until all of that group are done.
A result is known by the hash of its resolved config, so a changed default is a run to do again.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import tqdm

from experiments import build, checks, report, runs, setup, tables, train
from experiments.entries import Entry, command, read_queue, resolve
from ltkd_jax import files


class Results:
    """A folder of results, one JSON a run, known by the hash of its config."""

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)

    def find(self, config) -> dict | None:
        path = self._path(config)
        return checks.read_json(path) if path.exists() else None

    def add(self, config, results: dict, group: str | None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self._path(config), json.dumps({**results, "group": group}, indent=1) + "\n")

    def _path(self, config):
        return self._folder / f"{pathlib.Path(runs.default_workdir(config)).name}-{checks.config_hash(config)}.json"


def choose(entries: list[Entry], group: str, results: Results) -> dict | None:
    """The result of a group with the best balanced validation accuracy; None while one is missing.

    Raises:
      checks.ConfigError: a result of the group without a validation set.
    """
    found = [results.find(resolve(entry)) for entry in entries if entry.group == group]
    if any(result is None for result in found):
        return None
    if any(result["validation"] is None for result in found):
        raise checks.ConfigError(f"group {group!r} has runs without validation images: set data.validation_per_class")
    return max(found, key=lambda result: result["validation"]["all"])


class Reproduction:
    """The runs of a queue that are done and to do."""

    def __init__(self, entries: list[Entry], results: Results, folder, data_dir: str = ""):
        self._entries, self._results, self._folder, self._data_dir = entries, results, pathlib.Path(folder), data_dir
        self._sharing = collections.Counter()
        for entry in entries:
            config = resolve(entry)
            self._sharing[checks.teacher_hash(config)] += build.needs_teacher(config) and not checks.no_table(config)

    def config(self, entry: Entry):
        """The entry's config, or None while the group it waits for is not done."""
        best = choose(self._entries, entry.best_of, self._results) if entry.best_of else None
        if entry.best_of and best is None:
            return None
        config = resolve(entry, best, self._data_dir)
        config.teacher.table_runs = max(1, self._sharing[checks.teacher_hash(config)])
        return config

    def missing(self) -> list[Entry]:
        """Entries without a result, in order."""
        configs = [(entry, self.config(entry)) for entry in self._entries]
        return [entry for entry, config in configs if config is None or self._results.find(config) is None]

    def done(self) -> list[dict]:
        """The results there are, in the queue's order."""
        configs = [self.config(entry) for entry in self._entries]
        found = [self._results.find(config) for config in configs if config is not None]
        return [result for result in found if result is not None]

    def carry_out(self, entry: Entry, config, deadline: float | None) -> None:
        """Does one run, in its own work directory, and adds its result."""
        workdir = self._folder / f"{pathlib.Path(runs.default_workdir(config)).name}-{checks.config_hash(config)}"
        found = runs.run(config, workdir, command=command(entry, config), deadline=deadline)
        self._results.add(config, found, entry.group)

    def workdirs(self) -> list[pathlib.Path]:
        """Work directories of the finished runs, which hold their training curves too."""
        return sorted(path.parent for path in self._folder.glob("*/results.json"))


def reproduce(reproduction: Reproduction, deadline: float | None) -> int:
    """Runs what is missing until the deadline; returns the number of runs that failed or could not be chosen."""
    failed, missing = 0, reproduction.missing()
    with tqdm.tqdm(missing, desc="queue", unit="run", dynamic_ncols=True, position=0) as bar:
        for entry in bar:
            bar.set_postfix_str(f"{entry.config.rpartition('/')[2]}, seed {entry.seed}")
            if deadline is not None and time.monotonic() > deadline:
                tqdm.tqdm.write("the time budget is used up; the same command goes on from here", file=sys.stderr)
                return failed
            config = reproduction.config(entry)
            if config is None:
                tqdm.tqdm.write(f"{entry.config} waits for all runs of group {entry.best_of!r}", file=sys.stderr)
                failed += 1
                continue
            try:
                reproduction.carry_out(entry, config, deadline)
            except train.Stopped as stopped:
                tqdm.tqdm.write(f"{stopped}; the same command goes on from here", file=sys.stderr)
                return failed
            except (checks.ConfigError, train.Diverged, OSError) as error:
                tqdm.tqdm.write(f"error: {entry.config}, seed {entry.seed}: {error}", file=sys.stderr)
                failed += 1
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("queue", help="a queue file, such as experiments/queues/demo.json")
    parser.add_argument("--results", default="results", help="folder of result JSONs (default: results)")
    parser.add_argument("--runs", help="folder of work directories (default: runs/<queue's name>)")
    parser.add_argument("--data_dir", default="", help="TFDS directory, for every run")
    parser.add_argument("--minutes", type=float, default=0, help="stop, saved, after so many minutes (default: never)")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    folder = pathlib.Path(options.runs or pathlib.Path("runs") / pathlib.Path(options.queue).stem)
    setup.once()
    try:
        reproduction = Reproduction(read_queue(options.queue), Results(options.results), folder, options.data_dir)
        if options.list:
            for entry in reproduction.missing():
                print(f"{entry.config} seed={entry.seed} {json.dumps(entry.set)}")
            return
        failed = reproduce(reproduction, deadline)
    except checks.ConfigError as error:
        sys.exit(f"error: {error}")
    if reproduction.done():
        print(tables.console(reproduction.done()))
    if workdirs := reproduction.workdirs():
        report.write_page([report.load(path) for path in workdirs], folder / "report.html")
        print(f"\n{folder / 'report.html'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
