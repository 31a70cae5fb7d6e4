"""Reading of runs: result files and work directories, found in folders and checked."""

import json
import pathlib

from experiments.config import names
from experiments.config.trees import flatten

_REQUIRED = (
    "config.data.name", "config.data.imbalance", "config.data.n_max", "config.data.subset", "config.method.name",
    "config.loss_weighting.name", "config.teacher.model", "config.teacher.checkpoint", "config.student.model",
    "content.teacher", "content.subset", "content.data",
)  # fmt: skip


class ReportError(ValueError):
    """A file that cannot be reported on; the message names it and says why."""


def load(path):
    """Returns a work directory or a result file as one dictionary, which the other modules call a run.

    It has the content of results.json, and `source` (a name to show), `finished`, and `metrics` (a list with one entry
    for each logged epoch). A work directory without results.json is an unfinished run, which has
    neither `config` nor results.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _read_results(path) | {
            "source": path.stem,
            "finished": True,
            "metrics": [],
        }
    if not path.is_dir():
        raise ReportError(f"{path}: no such file or folder")
    extra = {
        "source": path.resolve().name,
        "metrics": _read_lines(path / "metrics.jsonl"),
    }
    if (path / "results.json").exists():
        return _read_results(path / "results.json") | extra | {"finished": True}
    return extra | {"finished": False}


def find(paths):
    """Loads every run in the paths; folders are searched, and JSON files in them that hold no results are ignored."""
    return [
        load(run_path) for path in paths for run_path in _run_paths(pathlib.Path(path))
    ]


def read_json(path):
    """Returns the content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: not readable as JSON ({error})") from error


def _run_paths(path):
    is_work_directory = any(
        (path / name).exists()
        for name in ("results.json", "config.json", "metrics.jsonl")
    )
    if is_work_directory or not path.is_dir():
        return [path]
    paths = []
    for child in sorted(path.iterdir()):
        if (
            child.is_dir()
            and not child.name.startswith(".")
            and child.name != "teachers"
        ):
            paths += _run_paths(child)
        elif child.suffix == ".json":
            content = read_json(child)
            paths += (
                [child]
                if isinstance(content, dict) and {"config", "test"} <= content.keys()
                else []
            )
    return paths


def _read_lines(path):
    """Returns the records of metrics.jsonl without a last line that an interruption cut short."""
    records = []
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines()
        if path.exists()
        else []
    )
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise ReportError(
                    f"{path}, line {number}: not readable as JSON ({error})"
                ) from error
    return records


def _read_results(path):
    """Returns the content of a result file, checked as far as the other modules rely on it."""
    results = read_json(path)
    flat = flatten(results) if isinstance(results, dict) else {}
    for key in flat:
        new_name = (
            names.new_name(key.removeprefix("config."))
            if key.startswith("config.")
            else None
        )
        if new_name:
            raise ReportError(
                f"{path}: {key} is now called config.{new_name}; rename it there, or repeat the run"
            )
    for key in _REQUIRED:
        if key not in flat:
            raise ReportError(f"{path}: not a result file, it has no {key!r}")
    if not isinstance(flat.get("test.all"), (int, float)):
        raise ReportError(f"{path}: not a result file, it has no test accuracy")
    seeds = results.get("seeds")
    is_valid = {
        "teacher": isinstance(results.get("teacher"), (dict, type(None))),
        "seeds": isinstance(seeds, dict)
        and all(isinstance(seed, (int, type(None))) for seed in seeds.values()),
        "class_names": isinstance(results.get("class_names"), (list, type(None))),
        "class_counts": _are_counts(results.get("class_counts")),
    }
    for key, valid in is_valid.items():
        if not valid:
            raise ReportError(
                f"{path}: not a result file, its {key!r} is not what a run writes"
            )
    return results


def _are_counts(counts):
    if counts is None:
        return True
    are_numbers = isinstance(counts, list) and all(
        isinstance(n, (int, float)) and n >= 0 for n in counts
    )
    return are_numbers and sum(counts) > 0
