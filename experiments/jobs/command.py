"""What the commands `reproduce` and `sweep` share: the options of a queue, and doing it."""

import argparse
import json
import pathlib
import sys
import time

import jax

from experiments import runtime
from experiments.config.validation import ConfigError
from experiments.jobs import workers
from experiments.jobs.queue_entry import read_queue
from experiments.jobs.queue_runner import Queue, Results, run_missing
from experiments.reporting import load, report_page, tables
from experiments.trainer.interrupts import StopRequest


def _positive(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number of at least 1"
        )
    return int(text)


def options() -> argparse.ArgumentParser:
    """Returns a parser of the options of any queue, to be another's parent."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data_dir", default="", help="TFDS directory, for every run")
    parser.add_argument("--time_limit", type=float, default=0, metavar="MINUTES",
                        help="save and stop after this time (default: never)")  # fmt: skip
    parser.add_argument("--num_workers", type=_positive, default=1, metavar="N",
                        help="processes that share the queue, each on a device of its own (default: 1, which does one "
                        "run at a time on all devices)")  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="only print what is missing"
    )
    return parser


def set_up(options: argparse.Namespace) -> workers.Machine | None:
    """Does what comes before anything that computes; returns the machine whose devices several workers share.

    Raises:
      ConfigError: more workers than devices.
    """
    runtime.initialize()
    if options.num_workers == 1 or options.list:
        return None
    machine = workers.count_devices()
    if options.num_workers > machine.slots:
        raise ConfigError(
            f"--num_workers={options.num_workers}: each worker needs a device of its own, and there are {machine.slots}"
        )
    jax.config.update("jax_platforms", "cpu")  # the devices are the workers'
    return machine


def run(
    path,
    results_folder,
    folder,
    options: argparse.Namespace,
    machine: workers.Machine | None,
) -> int:
    """Does the runs of a queue file that have no result yet, prints the table, and writes the page.

    Args:
      path: the queue file.
      results_folder: the folder of result JSONs.
      folder: the folder of work directories, and of report.html.
      options: what the parser of `options` parsed.
      machine: what `set_up` returned.

    Returns:
      The exit status: 1 where a run failed, and 75 where a signal stopped it before all was done.
    """
    stop = StopRequest(
        time.monotonic() + 60 * options.time_limit if options.time_limit else None
    )
    folder = pathlib.Path(folder)
    queue = Queue(read_queue(path), Results(results_folder), folder, options.data_dir)
    if options.list:
        for entry in queue.missing():
            print(f"{entry.config} seed={entry.seed} {json.dumps(entry.set)}")
        return 0
    if machine is None or not queue.missing():
        with stop.listening():
            failed = run_missing(queue, stop)
    else:
        words = [
            str(path),
            f"--results={results_folder}",
            f"--runs={folder}",
            f"--data_dir={options.data_dir}",
        ]
        words += [f"--time_limit={options.time_limit}"]
        command = [sys.executable, "-m", "experiments.reproduce", *words]
        failed = workers.run(
            command,
            machine,
            options.num_workers,
            folder,
            lambda: len(queue.missing()),
            stop,
        )
    if results := queue.results():
        print(tables.render(results))
    if workdirs := queue.workdirs():
        report_page.write_report(
            [load.load(path) for path in workdirs], folder / "report.html"
        )
        print(f"\n{folder / 'report.html'}")
    if failed:
        return 1
    return runtime.STOPPED if stop.signal and queue.missing() else 0
