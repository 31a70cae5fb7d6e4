"""Writes the metrics of work directories as TensorBoard event files.

It needs `pip install -e ".[tensorboard]"`.

    python -m experiments.tensorboard runs/… --output=runs/tensorboard
    tensorboard --logdir=runs/tensorboard

It reads metrics.jsonl, which has each epoch once, however often the run was resumed.
"""

import argparse
import collections
import pathlib
import sys

from experiments.reporting import load, tensorboard
from ltkd_jax import console


def main(argv: list[str] | None = None) -> None:
    """Writes the event files of the work directories that the arguments name."""
    console.replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tensorboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "paths",
        type=console.path_argument,
        nargs="+",
        metavar="PATH",
        help="work directories, or folders of them",
    )
    parser.add_argument(
        "--output",
        type=console.path_argument,
        default="runs/tensorboard",
        metavar="DIR",
    )
    options = parser.parse_args(argv)
    try:
        # A result file by itself has no metrics.
        runs = [run for run in load.load_all(options.paths) if run["metrics"]]
        if not runs:
            raise load.ReportError(
                f"no work directory with a metrics.jsonl in {', '.join(options.paths)}"
            )
        counts = collections.Counter(run["source"] for run in runs)
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise load.ReportError(
                f"several runs are called {name!r}: give them one at a time, each with "
                "an --output of its own"
            )
        for run in runs:
            folder = pathlib.Path(options.output) / run["source"]
            num_epochs = tensorboard.write(run, folder)
            print(f"{folder}: {num_epochs} epochs")
    except ModuleNotFoundError:
        sys.exit(
            'error: tensorboardX is not installed: pip install -e ".[tensorboard]"'
        )
    except (load.ReportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
