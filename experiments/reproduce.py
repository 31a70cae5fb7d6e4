r"""Does the runs of a queue file that have no result yet, each into a result JSON.

    python -m experiments.reproduce experiments/queues/demo.json \
        --results=runs/demo/results
    python -m experiments.reproduce experiments/queues/gpu.json --time_limit=25 \
        --data_dir=DIR

The table of the results, beside those of the papers:

    python -m experiments.report --results=results --queue experiments/queues/*.json

A queue is JSON:

    {"about": …, "set": {…}, "runs": [
      {"config": "configs/x.py:METHOD,…", "set": {"train.epochs": 60},
       "seeds": [0, 1, 2], "group": …, "best_of": …}]}

A run with "best_of" takes its hyperparameters (of the method and of learned weights)
from the run of that group with the best balanced validation accuracy; it waits until
all runs of the group are done. A result is looked up by the hash of its config, so
after a change of a default the run is done again.

The exit status is 1 if a run failed, and 75 if a signal stopped the queue before all
was done.
"""

import argparse
import pathlib
import sys

from experiments.config.validation import ConfigError
from experiments.jobs import command
from experiments.reporting.load import ReportError
from ltkd_jax import console


def main(argv: list[str] | None = None) -> None:
    """Does the runs of the queue that the arguments name, and exits."""
    console.replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[command.parent_parser()],
    )
    parser.add_argument(
        "queue",
        type=console.path_argument,
        help="a queue file, such as experiments/queues/demo.json",
    )
    parser.add_argument(
        "--results",
        type=console.path_argument,
        default="results",
        help="folder of result JSONs (default: results)",
    )
    parser.add_argument(
        "--runs",
        type=console.path_argument,
        help="folder of work directories (default: runs/<queue's name>)",
    )
    options = parser.parse_args(argv)
    folder = options.runs or pathlib.Path("runs") / pathlib.Path(options.queue).stem
    try:
        machine = command.set_up(options)
        status = command.run_queue(
            options.queue, options.results, folder, options, machine
        )
    except (ConfigError, ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
