"""Turns results into a page, tables for a paper, or a README of a results folder.

    python -m experiments.report PATH… [--output report.html] [--title TITLE]
    python -m experiments.report PATH… --table latex > tables.tex
    python -m experiments.report --results=results [--queue experiments/queues/*.json]

PATH is a work directory, a result file, or a folder of either. The page is one file
that needs no network. The folder report_files/ beside it has its figures as SVG files
and its tables as Markdown and LaTeX. --table (text, markdown or latex) chooses how the
tables are printed.

The last form writes README.md into the results folder: published numbers beside ours.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

from experiments.config import load as load_config
from experiments.config.trees import flatten
from experiments.jobs import queue_entry
from experiments.reporting import load, report_page, results_page, tables, writers
from ltkd_jax import console


def main(argv: list[str] | None = None) -> None:
    """Writes the page that the arguments describe, and prints its tables."""
    console.replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        type=console.path_argument,
        nargs="*",
        metavar="PATH",
        help="work directories, result files, or folders of them",
    )
    parser.add_argument(
        "--output",
        type=console.path_argument,
        default="report.html",
        metavar="FILE",
        help="the page (default: report.html)",
    )
    parser.add_argument(
        "--title", help="of the page (default: the methods and the data)"
    )
    parser.add_argument(
        "--table",
        default="text",
        choices=writers.FORMATS,
        help="how tables are printed (default: text)",
    )
    parser.add_argument(
        "--results",
        type=console.path_argument,
        metavar="FOLDER",
        help="write README.md into this folder of result files instead",
    )
    parser.add_argument(
        "--queue",
        type=console.path_argument,
        nargs="*",
        default=[],
        metavar="FILE",
        help="queues, for --results: their runs without a result are listed, too",
    )
    load_config.add_import_argument(parser)
    options = parser.parse_args(argv)
    if bool(options.paths) == bool(options.results):
        parser.error("give either PATHs or --results")
    try:
        load_config.import_modules(options.modules)
        if options.results:
            planned: list[dict[str, Any]] = []
            for path in options.queue:
                planned += planned_runs(path)
            print(results_page.write_results(options.results, planned))
            return
        folder = pathlib.Path(options.output).parent
        if not folder.is_dir():
            raise load.ReportError(
                f"--output={options.output}: there is no folder {folder}: make it first"
            )
        runs = load.load_all(options.paths)
        if not runs:
            raise load.ReportError(f"no runs in {', '.join(options.paths)}")
        report_page.write_report(runs, options.output, options.title)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(tables.render(runs, options.table))
    # To stderr, so that > writes only the tables.
    print(f"\n{options.output}", file=sys.stderr)


def planned_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the runs of a queue file, for `results_page.render_results`."""
    runs = []
    for entry in queue_entry.read_queue(path):
        spec = entry.resolve()
        runs.append(
            {
                "data": spec.data.name,
                "imbalance": spec.data.imbalance,
                "epochs": spec.train.epochs,
                "teacher": spec.teacher.model,
                "student": spec.student_model,
                "method": spec.label,
                "identity": flatten(spec.identity),
                "set": entry.set,
                "group": entry.group,
                "best_of": entry.best_of,
            }
        )
    return runs


if __name__ == "__main__":
    main()
