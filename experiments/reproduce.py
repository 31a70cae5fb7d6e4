"""Runs what a queue file asks for and has no result yet, one JSON a run into a results folder.

    python -m experiments.reproduce experiments/queues/demo.json --results=runs/demo/results
    python -m experiments.reproduce experiments/queues/gpu.json --minutes=25 --data_dir=DIR
    python -m experiments.report --results=results --queue experiments/queues/*.json   # the table, beside the papers'

A queue is JSON: {"about": …, "set": {…}, "runs": [{"config": "configs/x.py:METHOD,…", "set": {"train.epochs": 60},
"seeds": [0, 1, 2], "group": …, "best_of": …}]}. A run with "best_of" takes its method's hyperparameters from the run
of that group with the best balanced validation accuracy, and waits until all of that group are done.
A result is known by the hash of its resolved config, so a changed default is a run to do again.
The exit status is 1 where a run failed, and 75 where a signal stopped it before all was done.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import jax
import tqdm

from experiments import report, runtime
from experiments.config import checks
from experiments.jobs import workers
from experiments.jobs.queue_entry import Entry, command, read_queue, resolve
from experiments.reporting import tables
from experiments.trainer import build, loop, run
from ltkd_jax import files

_WAIT = 5.0  # seconds between looks at what others do
_STOPPED = 75  # exit status, as of experiments.main


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
        return self._folder / f"{pathlib.Path(run.default_workdir(config)).name}-{checks.config_hash(config)}.json"


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

    def carry_out(self, entry: Entry, deadline: float | None) -> bool:
        """Does one run, in its own work directory, and adds its result; false while its group is not done."""
        config = self.config(entry)
        if config is None:
            return False
        if self._results.find(config) is not None:  # another process did it meanwhile
            return True
        found = run.run(config, self._workdir(config), command=command(entry, config), deadline=deadline)
        self._results.add(config, found, entry.group)
        return True

    def workdirs(self) -> list[pathlib.Path]:
        """Work directories of the finished runs, which hold their training curves too."""
        configs = [self.config(entry) for entry in self._entries]
        places = [self._workdir(config) for config in configs if config is not None]
        return sorted({place for place in places if (place / "results.json").exists()})

    def _workdir(self, config):
        return self._folder / f"{pathlib.Path(run.default_workdir(config)).name}-{checks.config_hash(config)}"


def reproduce(reproduction: Reproduction, deadline: float | None) -> int:
    """Runs what is missing until the deadline; returns the number of runs that failed or could not be chosen.

    Other processes may do the same with the same folders: what one has begun the others leave to it, and what it
    leaves unfinished they take over.
    """
    failed, todo = [], reproduction.missing()
    with tqdm.tqdm(total=len(todo), desc="queue", unit="run", dynamic_ncols=True, position=0) as bar:
        while todo:
            left, used = [], False
            for entry in todo:
                bar.set_postfix_str(f"{entry.config.rpartition('/')[2]}, seed {entry.seed}")
                if deadline is not None and time.monotonic() > deadline:
                    _tell("the time budget is used up; the same command goes on from here")
                    return len(failed)
                try:
                    if not reproduction.carry_out(entry, deadline):
                        left.append(entry)
                        continue
                except checks.InUse:
                    left.append(entry)
                    used = True
                    continue
                except loop.Stopped as stopped:
                    _tell(f"{stopped}; the same command goes on from here")
                    return len(failed)
                except (checks.ConfigError, loop.Diverged, OSError) as error:
                    _tell(f"error: {entry.config}, seed {entry.seed}: {error}")
                    failed.append(entry)
                bar.update()
            if len(left) == len(todo):  # nothing could be done: wait for those of others, if there are any
                if not used:
                    for entry in left:
                        _tell(f"{entry.config} waits for all runs of group {entry.best_of!r}")
                    return len(failed) + len(left)
                bar.set_postfix_str("waiting for runs of other processes")
                time.sleep(_WAIT)
            todo = left
    return len(failed)


def _tell(text):
    tqdm.tqdm.write(text, file=sys.stderr)


def _fleet(options) -> workers.Measured | None:
    """What is to do runs side by side; None for one at a time, in this process.

    It comes before anything that computes: this process must not take a device that another is to have.
    """
    if options.at_once == 1 or options.list:
        return None
    measured = workers.ask(options.queue, options.data_dir, timed=not options.at_once)
    if measured.alone is not None:
        _tell(str(measured))
    if options.at_once > measured.slots:
        raise checks.ConfigError(f"--at_once={options.at_once}: there are {measured.slots} devices for a run each")
    if (options.at_once or measured.at_once) == 1:
        return None
    jax.config.update("jax_platforms", "cpu")
    return measured


def _carry_out_all(reproduction, options, measured, deadline, folder):
    if measured is None or not reproduction.missing():
        return reproduce(reproduction, deadline)
    same = [options.queue, f"--results={options.results}", f"--runs={folder}", f"--data_dir={options.data_dir}"]
    same.append(f"--minutes={options.minutes}")
    at_once = options.at_once or measured.at_once
    return workers.run(same, measured, at_once, folder, lambda: len(reproduction.missing()))


def _at_once(text):
    if text == "auto":
        return 0
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be auto, or a number of runs")
    return int(text)


def options_of_a_queue():
    """A parser of what may be said of any queue, to be another's parent."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data_dir", default="", help="TFDS directory, for every run")
    parser.add_argument("--minutes", type=float, default=0, help="stop, saved, after so many minutes (default: never)")
    parser.add_argument("--at_once", type=_at_once, default=0, metavar="auto|N",
                        help="runs at a time, each on a device of its own; auto measures whether that is faster than "
                        "one at a time on all of them (default: auto)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    return parser


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[options_of_a_queue()])  # fmt: skip
    parser.add_argument("queue", help="a queue file, such as experiments/queues/demo.json")
    parser.add_argument("--results", default="results", help="folder of result JSONs (default: results)")
    parser.add_argument("--runs", help="folder of work directories (default: runs/<queue's name>)")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    folder = pathlib.Path(options.runs or pathlib.Path("runs") / pathlib.Path(options.queue).stem)
    runtime.initialize()
    try:
        measured = _fleet(options)
        reproduction = Reproduction(read_queue(options.queue), Results(options.results), folder, options.data_dir)
        if options.list:
            for entry in reproduction.missing():
                print(f"{entry.config} seed={entry.seed} {json.dumps(entry.set)}")
            return
        failed = _carry_out_all(reproduction, options, measured, deadline, folder)
    except checks.ConfigError as error:
        sys.exit(f"error: {error}")
    if reproduction.done():
        print(tables.console(reproduction.done()))
    if workdirs := reproduction.workdirs():
        report.write_page([report.load(path) for path in workdirs], folder / "report.html")
        print(f"\n{folder / 'report.html'}")
    in_time = deadline is None or time.monotonic() < deadline
    sys.exit(1 if failed else _STOPPED if in_time and reproduction.missing() else 0)


if __name__ == "__main__":
    main()
