"""Writes the metrics of work directories as TensorBoard event files (needs `pip install -e ".[tensorboard]"`).

    python -m experiments.tensorboard runs/… --out=runs/tensorboard
    tensorboard --logdir=runs/tensorboard

It reads metrics.jsonl, which an interrupted and resumed run writes exactly once, and needs no part in the training.
"""

import argparse
import pathlib
import sys

from experiments import report


def scalars(record: dict, prefix: str = ""):
    """(name, value) of every number in a record, dotted names with slashes."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value


def write(run: dict, folder: pathlib.Path) -> int:
    """Writes a run, as `report.load` returns it; gives back the number of records."""
    from tensorboardX import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):  # a second call replaces the first one's
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in run["metrics"]:
            for name, value in scalars(record):
                writer.add_scalar(name, value, record["step"])
    return len(run["metrics"])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.tensorboard", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="work directories, or folders of them")
    parser.add_argument("--out", default="runs/tensorboard")
    options = parser.parse_args(argv)
    try:
        found = [run for run in report.find(options.paths) if run["metrics"]]  # a result's JSON alone has none
        if not found:
            raise report.ReportError(f"no work directory with a metrics.jsonl in {', '.join(options.paths)}")
        names = [run["source"] for run in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise report.ReportError(f"several runs are called {twice!r}: give them one at a time, each its own --out")
        for run in found:
            folder = pathlib.Path(options.out) / run["source"]
            print(f"{folder}: {write(run, folder)} epochs")
    except ModuleNotFoundError:
        sys.exit('error: tensorboardX is not installed: pip install -e ".[tensorboard]"')
    except report.ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
