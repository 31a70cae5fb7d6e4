"""Turns work directories and result files into a page, tables for a paper, or the results page of the repository.

    python -m experiments.report PATH… [--out report.html] [--title TITLE] [--table text|markdown|latex]
    python -m experiments.report PATH… --table latex > tables.tex
    python -m experiments.report --results results/ [--queue experiments/queues/*.json]

PATH is a work directory, a result JSON, or a folder of either. The page is one file that needs no network; beside it,
in report_files/, stand its figures as SVG files and its tables as Markdown and LaTeX. --table says how the tables are
printed. The last form writes README.md into the results folder: the papers' numbers (published.json) beside ours.
"""

import argparse
import html
import json
import pathlib
import sys

from experiments.reporting import comparison, page, setting_figures, tables, weight_figures, writers


class ReportError(ValueError):
    """A file that cannot be reported on; the message names it and says why."""


# Reading.


def load(path):
    """Reads a work directory or a result JSON into one dictionary.

    It is results.json's content with `source` (a name to show), `finished`, and `metrics` (a list, one entry a logged
    epoch). A work directory without results.json is an unfinished run and has `config` and `metrics` only.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _checked(read(path), path) | {"source": path.stem, "finished": True, "metrics": []}
    if not path.is_dir():
        raise ReportError(f"{path}: no such file or folder")
    extra = {"source": path.resolve().name, "metrics": _read_lines(path / "metrics.jsonl")}
    results = path / "results.json"
    if results.exists():
        return _checked(read(results), results) | extra | {"finished": True}
    config = path / "config.json"
    return {"config": read(config) if config.exists() else {}} | extra | {"finished": False}


def read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: not readable as JSON ({error})") from error


def _read_lines(path):
    """Reads metrics.jsonl; a last line that an interruption cut short is left out."""
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{path}, line {number}: not readable as JSON ({error})") from error
    return found


def _checked(results, path):
    """Checks that a JSON file holds a run's results, as far as everything below relies on it."""
    needed = {"config": dict, "seeds": dict, "test": dict}
    for key, kind in needed.items():
        if not isinstance(results, dict) or not isinstance(results.get(key), kind):
            raise ReportError(f"{path}: not a result file, it has no {key!r}")
    config, counts = results["config"], results.get("class_counts")
    sound = {
        "config.data": isinstance(config.get("data"), (dict, type(None))),
        "config.method": isinstance(config.get("method"), (dict, type(None))),
        "teacher": isinstance(results.get("teacher"), (dict, type(None))),
        "seeds": all(isinstance(seed, (int, type(None))) for seed in results["seeds"].values()),
        "class_names": isinstance(results.get("class_names"), (list, type(None))),
        "class_counts": counts is None or _are_counts(counts),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise ReportError(f"{path}: not a result file, its {key!r} is not what a run writes")
    if tables.value(results["test"], "all") is None:
        raise ReportError(f"{path}: not a result file, it has no test accuracy")
    return results


def _are_counts(counts):
    numbers = isinstance(counts, list) and all(isinstance(n, (int, float)) and n >= 0 for n in counts)
    return numbers and sum(counts) > 0


def is_work_directory(path):
    """Says whether a folder is a run's work directory."""
    return any((path / name).exists() for name in ("results.json", "config.json", "metrics.jsonl"))


def find(paths):
    """Loads every run in the paths; a folder is searched, and JSON files in it that are not results are passed over."""
    return [load(found) for path in paths for found in _runs_in(pathlib.Path(path))]


def _runs_in(path):
    if not path.is_dir() or is_work_directory(path):
        return [path]
    found = []
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child.name != "teachers":
            found += _runs_in(child)
        elif child.suffix == ".json":
            content = read(child)
            found += [child] if isinstance(content, dict) and {"config", "test"} <= content.keys() else []
    return found


# The page.


def write_page(runs, out_path, title=None):
    """Writes one self-contained HTML page about the runs, be it one or many.

    Beside it, in `report_files` for `report.html`: every figure as an SVG file, tables.md and tables.tex.
    """
    settings = tables.gather(runs)
    unfinished = [run for run in runs if not run.get("finished", True)]
    title, titles = title or _title(settings), tables.titles(settings)
    anchors = _anchors(titles)
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="small">{_size(settings, unfinished)}</p>']
    if len(settings) > 1:
        entries = [("settings", "All settings side by side"), *zip(anchors, titles)]
        entries = "".join(f'<li><a href="#{to}">{html.escape(words)}</a></li>' for to, words in entries)
        body.append(f"<nav><ul>{entries}</ul></nav>")
    body.append(comparison.section(settings))
    body += [_section(setting, *named, alone=len(settings) == 1) for setting, *named in zip(settings, titles, anchors)]
    body += [_unfinished(unfinished)] if unfinished else []
    if any("ltkd" in method.name for setting in settings for method in setting.methods):
        body.append(f'<p class="small">{tables.RECONSTRUCTED}</p>')
    beside = {f"tables.{ending}": tables.console(runs, form) for form, ending in (("markdown", "md"), ("latex", "tex"))}
    page.write(out_path, title, body, beside)


def _anchors(titles):
    """Returns a distinct name for each section."""
    found = []
    for name in map(page.anchor, titles):
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def _title(settings):
    methods = [method.label for setting in settings for method in setting.methods]
    if len(methods) == 1:
        return f"{methods[0]} on {settings[0].data}, imbalance {settings[0].imbalance:g}"
    data = sorted({setting.data for setting in settings})
    return f"{len(set(methods))} methods on {', '.join(data)}" if methods else "No finished run"


def _size(settings, unfinished):
    counts = [(sum(len(s.runs) for s in settings), "finished run"), (len(settings), "setting")]
    counts += [(len(unfinished), "unfinished run")] if unfinished else []
    return ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts)


def _unfinished(runs):
    rows = [[run["source"], tables.progress(run)] for run in runs]
    return f"<h2>Unfinished runs</h2>{writers.as_html(writers.Table(['run', 'progress'], rows, left=2))}"


def _section(setting, title, anchor, *, alone):
    parts = [
        f'<section id="{anchor}"><h2>{html.escape(title)}</h2>',
        f'<p class="lead">{html.escape(tables.headline(setting))}</p>',
        writers.as_html(tables.accuracy_table(setting)),
        f'<p class="small">{html.escape(setting.note())}. {tables.COLUMNS}</p>',
    ]
    compared = tables.comparisons(setting)
    if compared:
        parts.append(f'<h3>What can be told apart</h3><p class="small">{tables.RULE}</p>')
        parts += [f'<p class="key">On {html.escape(t)}:</p>{writers.as_html(table)}' for t, table in compared]
    parts += [comparison.tail_against_head([setting])] if alone else []  # else it stands beside those of the others
    parts += [*setting_figures.sections(setting), weight_figures.section(setting), _how(setting)]
    return "\n".join(parts) + "</section>"


def duration(seconds):
    """Writes a wall time: "2 h 05 min", "3 min 12 s"."""
    if not isinstance(seconds, (int, float)):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _how(setting):
    rows, commands, configs = [], [], []
    for method in setting.methods:
        runs = [method.runs[seeds] for seeds in sorted(method.runs)]
        rows += [[method.label, *_told(run)] for run in runs]
        commands += [run.get("command") or "not recorded" for run in runs]
        first = html.escape(json.dumps(runs[0]["config"], indent=1, sort_keys=True, ensure_ascii=False))
        configs.append(f"<details><summary>{html.escape(method.label)}</summary><pre>{first}</pre></details>")
    header = ["method", "hardware", "precision", "commit", "config", "seeds", "wall time", "images/s"]
    table = writers.as_html(writers.Table(header, rows, left=6))
    versions = {name: v for run in setting.runs for name, v in (run.get("versions") or {}).items()}
    listed = "".join(f"; {name} {v}" for name, v in sorted(versions.items()))
    told = html.escape(f"Seeds: split / teacher / student{listed}.{_logits(setting)}")
    return (
        f'<h3>How it was run</h3>{table}<p class="small">{told}</p>'
        f"<details><summary>Commands</summary><pre>{html.escape(chr(10).join(commands))}</pre></details>"
        f"<details><summary>Full configs, of each method’s first seed</summary>{''.join(configs)}</details>"
    )


def _logits(setting):
    """Says where the steps had the teacher's logits from, where there was one."""
    sources = {}
    for method in setting.methods:
        for run in method.runs.values():
            if tables.logits_source(run):
                sources.setdefault(tables.logits_source(run), {})[method.label] = None
    told = "; ".join(f"{', '.join(labels)} from the {source}" for source, labels in sources.items())
    return f" Teacher’s logits: {told}." if told else ""


def _told(run):
    seeds, timing = run["seeds"], run.get("timing") or {}
    speed = timing.get("images_per_second")
    told = [str(run.get(key) or "–") for key in ("device", "precision", "commit", "config_hash")]
    told.append(" / ".join(str(seeds.get(key, "–")) for key in ("split", "teacher", "student")))
    return [*told, duration(timing.get("seconds")), f"{speed:,.0f}" if speed else "–"]


# The command.


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("paths", nargs="*", metavar="PATH", help="work directories, result JSONs, or folders of them")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--title", help="of the page (default: the methods and the data)")
    parser.add_argument("--table", default="text", choices=writers.FORMS, help="what is printed (default: text)")
    parser.add_argument("--results", metavar="FOLDER", help="write README.md into this folder of result JSONs instead")
    parser.add_argument("--queue", nargs="*", default=[], metavar="FILE",
                        help="queues, for --results: what is not yet run is listed as such")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.results):
        parser.error("give either PATHs or --results")
    try:
        if args.results:
            from experiments.reporting import results_page

            print(results_page.write_results(args.results, args.queue))
            return
        runs = find(args.paths)
        if not runs:
            raise ReportError(f"no runs in {', '.join(args.paths)}")
        write_page(runs, args.out, args.title)
    except (ValueError, OSError) as error:  # what cannot be reported on, a queue that cannot be read, a place to write
        sys.exit(f"error: {error}")
    print(tables.console(runs, args.table))
    print(f"\n{args.out}", file=sys.stderr)  # so that the tables can be sent into a file


if __name__ == "__main__":
    main()
