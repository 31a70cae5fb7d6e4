"""The common part of the commands `reproduce` and `sweep`: they work on a queue."""

import argparse
import json
import os
import pathlib
import sys
import time

import jax

from experiments import runtime
from experiments.config import load as load_config
from experiments.config.validation import ConfigError
from experiments.jobs import workers
from experiments.jobs.queue_entry import read_queue
from experiments.jobs.queue_runner import Queue, Results, run_missing
from experiments.reporting import load, report_page, tables
from experiments.trainer.interrupts import StopRequest
from ltkd_jax import console, files


def parent_parser() -> argparse.ArgumentParser:
    """Returns a parser of the common options, for `parents` of another parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--data_dir",
        type=console.path_argument,
        default="",
        help="TFDS directory, for every run",
    )
    parser.add_argument(
        "--time_limit",
        type=float,
        default=0,
        metavar="MINUTES",
        help="save and stop after this time (default: never)",
    )
    parser.add_argument(
        "--num_workers",
        type=console.at_least(1),
        default=1,
        metavar="N",
        help="processes that share the queue, each on a device of its own (default: 1, "
        "which does one run at a time on all devices)",
    )
    load_config.add_import_argument(parser)
    parser.add_argument(
        "--list", action="store_true", help="only print what is missing"
    )
    return parser


def set_up(options: argparse.Namespace) -> workers.Machine | None:
    """Sets up jax before its first use.

    Args:
      options: parsed by `parent_parser`.

    Returns:
      The machine whose devices several workers share, None for a single process.

    Raises:
      ConfigError: there are more workers than devices.
    """
    runtime.initialize()
    load_config.import_modules(options.modules)
    if options.num_workers == 1 or options.list:
        return None
    machine = workers.count_devices()
    if options.num_workers > machine.slots:
        raise ConfigError(
            f"--num_workers={options.num_workers}: each worker needs a device of its "
            f"own, and there are {machine.slots}"
        )
    # This process must not open the devices, which are for the workers.
    jax.config.update("jax_platforms", "cpu")
    return machine


def run_queue(
    path: str | os.PathLike[str],
    results_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: argparse.Namespace,
    machine: workers.Machine | None,
    *,
    check_first: bool = False,
) -> int:
    """Does the runs of a queue file that have no result yet.

    Then it prints the table of all results, and writes the report.

    Args:
      path: the queue file.
      results_folder: the folder of result JSONs.
      folder: for work directories and report.html.
      options: parsed by `parent_parser`.
      machine: from `set_up`.
      check_first: whether to start no run if one of them cannot run; see `Queue.check`.

    Returns:
      The exit status: 1 if a run failed, 75 if a signal stopped the queue before all
      was done, else 0.
    """
    deadline = None
    if options.time_limit:
        deadline = time.monotonic() + 60 * options.time_limit
    stop = StopRequest(deadline)
    folder = pathlib.Path(folder)
    queue = Queue(read_queue(path), Results(results_folder), folder, options.data_dir)
    if options.list:
        for entry in queue.missing():
            print(f"{entry.config} seed={entry.seed} {json.dumps(entry.set)}")
        return 0
    # Before the runs, whose results would otherwise have no place.
    files.make_folder(results_folder, "give another --results")
    files.make_folder(folder, "give another --runs")
    if check_first:
        # Workers have other devices than this process.
        queue.check(devices=machine is None)
    if machine is None or not queue.missing():
        with stop.listening():
            num_failed = run_missing(queue, stop)
    else:
        # Each worker is a single process on the same queue and folders.
        command = [
            sys.executable,
            "-m",
            "experiments.reproduce",
            str(path),
            f"--results={results_folder}",
            f"--runs={folder}",
            f"--data_dir={options.data_dir}",
            f"--time_limit={options.time_limit}",
            f"--import={options.modules}",
        ]
        num_failed = workers.run(
            command,
            machine,
            options.num_workers,
            folder,
            lambda: len(queue.missing()),
            stop,
        )
    _report(queue, folder)
    if num_failed:
        return 1
    return runtime.STOPPED if stop.signal and queue.missing() else 0


def _report(queue: Queue, folder: pathlib.Path) -> None:
    # The page first: it is kept if the console has been closed.
    path = folder / "report.html"
    workdirs = queue.workdirs()
    if workdirs:
        report_page.write_report([load.load(workdir) for workdir in workdirs], path)
    results = queue.results()
    if results:
        print(tables.render(results))
    if workdirs:
        print(f"\n{path}")
