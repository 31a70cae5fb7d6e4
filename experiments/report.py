"""Turns work directories and result files into a page, tables for a paper, or the results page of the repository.

    python -m experiments.report PATH… [--output report.html] [--title TITLE] [--table text|markdown|latex]
    python -m experiments.report PATH… --table latex > tables.tex
    python -m experiments.report --results results/ [--queue experiments/queues/*.json]

PATH is a work directory, a result file, or a folder of either. The page is one file that needs no network; the folder
report_files/ beside it has its figures as SVG files and its tables as Markdown and LaTeX. --table chooses the form in
which the tables are printed. The last form writes README.md into the results folder: the papers' numbers beside ours.
"""

import argparse
import sys

from experiments.jobs import queue_entry
from experiments.reporting import load, report_page, results_page, tables, writers


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="work directories, result files, or folders of them",
    )
    parser.add_argument(
        "--output",
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
        help="what is printed (default: text)",
    )
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        help="write README.md into this folder of result files instead",
    )
    parser.add_argument("--queue", nargs="*", default=[], metavar="FILE",
                        help="queues, for --results: what is not run yet is listed as such")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.results):
        parser.error("give either PATHs or --results")
    try:
        if args.results:
            planned = [run for path in args.queue for run in planned_runs(path)]
            print(results_page.write_results(args.results, planned))
            return
        runs = load.load_all(args.paths)
        if not runs:
            raise load.ReportError(f"no runs in {', '.join(args.paths)}")
        report_page.write_report(runs, args.output, args.title)
    except (
        ValueError,
        OSError,
    ) as error:  # of a file to read, a queue, or a place to write
        sys.exit(f"error: {error}")
    print(tables.render(runs, args.table))
    print(f"\n{args.output}", file=sys.stderr)  # so that only the tables go into a file


def planned_runs(path):
    """Returns the runs of a queue as `results_page.render_results` takes them."""
    runs = []
    for entry in queue_entry.read_queue(path):
        spec = entry.resolve()
        run = {
            "data": spec.data.name,
            "imbalance": spec.data.imbalance,
            "epochs": spec.train.epochs,
        }
        run |= {
            "teacher": spec.teacher.model,
            "student": spec.student_model,
            "method": spec.label,
        }
        runs.append(run | {"set": entry.set, "group": entry.group})
    return runs


if __name__ == "__main__":
    main()
