"""Writes the metrics of work directories as TensorBoard event files (needs `pip install -e ".[tensorboard]"`).

    python -m experiments.tensorboard runs/… --output=runs/tensorboard
    tensorboard --logdir=runs/tensorboard

It reads metrics.jsonl, which an interrupted and resumed run writes exactly once.
"""

import argparse
import collections
import pathlib
import sys

from experiments.reporting import load, tensorboard


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tensorboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="work directories, or folders of them"
    )
    parser.add_argument("--output", default="runs/tensorboard", metavar="DIR")
    args = parser.parse_args(argv)
    try:
        runs = [
            run for run in load.load_all(args.paths) if run["metrics"]
        ]  # a result file alone has none
        if not runs:
            raise load.ReportError(
                f"no work directory with a metrics.jsonl in {', '.join(args.paths)}"
            )
        name, count = collections.Counter(run["source"] for run in runs).most_common(1)[
            0
        ]
        if count > 1:
            raise load.ReportError(
                f"several runs are called {name!r}: give them one at a time, each its own --output"
            )
        for run in runs:
            folder = pathlib.Path(args.output) / run["source"]
            print(f"{folder}: {tensorboard.write(run, folder)} epochs")
    except ModuleNotFoundError:
        sys.exit(
            'error: tensorboardX is not installed: pip install -e ".[tensorboard]"'
        )
    except load.ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
