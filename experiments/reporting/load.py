"""Loads runs from result files and work directories, and checks them.

A run is a dictionary with the content of results.json and three more keys:

- `source`: a name to show,
- `finished`: whether the run has results,
- `metrics`: a list with one record for each logged epoch.
"""

import json
import pathlib

from configs import common
from experiments.config.trees import flatten

# The keys that the other modules read without checking whether they exist.
_REQUIRED_KEYS = (
    "config.data.name",
    "config.data.imbalance",
    "config.data.n_max",
    "config.data.subset",
    "config.method.name",
    "config.loss_weighting.name",
    "config.teacher.model",
    "config.teacher.checkpoint",
    "config.student.model",
    "content.teacher",
    "content.subset",
    "content.data",
)
_WORK_DIRECTORY_FILES = ("results.json", "config.json", "metrics.jsonl")


class ReportError(ValueError):
    """Raised for a file that cannot be reported on; the message names it."""


def load(path):
    """Returns the run in a work directory or a result file.

    A work directory without results.json is an unfinished run, which has neither
    `config` nor results.
    """
    path = pathlib.Path(path)
    if path.is_file():
        run = {"source": path.stem, "finished": True, "metrics": []}
        return _read_results(path) | run
    if not path.is_dir():
        raise ReportError(f"{path}: no such file or folder")
    results_path = path / "results.json"
    run = {
        "source": path.resolve().name,
        "finished": results_path.exists(),
        "metrics": _read_metrics(path / "metrics.jsonl"),
    }
    results = _read_results(results_path) if run["finished"] else {}
    return results | run


def load_all(paths):
    """Returns every run in the paths, of which folders are searched recursively.

    JSON files in a folder that hold no results are ignored.
    """
    runs = []
    for path in paths:
        runs += map(load, _run_paths(pathlib.Path(path)))
    return runs


def read_json(path):
    """Returns the content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: not readable as JSON ({error})") from error


def _run_paths(path):
    """Returns the result files and work directories at or below a path."""
    is_work_directory = any((path / name).exists() for name in _WORK_DIRECTORY_FILES)
    if is_work_directory or not path.is_dir():
        return [path]
    paths = []
    for child in sorted(path.iterdir()):
        if child.is_dir():
            # The folder of trained teachers has files of the same names as a run.
            if not child.name.startswith(".") and child.name != "teachers":
                paths += _run_paths(child)
        elif child.suffix == ".json" and _looks_like_results(read_json(child)):
            paths.append(child)
    return paths


def _looks_like_results(content):
    return isinstance(content, dict) and {"config", "test"} <= content.keys()


def _read_metrics(path):
    """Returns the records of metrics.jsonl."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            # An interruption may cut the last line short, but no other.
            if number < len(lines):
                raise ReportError(
                    f"{path}, line {number}: not readable as JSON ({error})"
                ) from error
    return records


def _read_results(path):
    """Returns the content of a result file, checked as far as other modules need."""
    results = read_json(path)
    flat = flatten(results) if isinstance(results, dict) else {}
    _check_key_names(path, flat)
    for key in _REQUIRED_KEYS:
        if key not in flat:
            raise ReportError(f"{path}: not a result file, it has no {key!r}")
    if not isinstance(flat.get("test.all"), (int, float)):
        raise ReportError(f"{path}: not a result file, it has no test accuracy")
    is_valid = {
        # An external teacher has a hash.
        "content": not flat["config.teacher.checkpoint"]
        or isinstance(flat["content.teacher"], str),
        "teacher": isinstance(results.get("teacher"), (dict, type(None))),
        "seeds": _are_seeds(results.get("seeds")),
        "class_names": isinstance(results.get("class_names"), (list, type(None))),
        "class_counts": _are_counts(results.get("class_counts")),
    }
    for key, valid in is_valid.items():
        if not valid:
            raise ReportError(
                f"{path}: not a result file, its {key!r} is not what a run writes"
            )
    return results


def _check_key_names(path, flat):
    """Refuses a file whose config has a key that was renamed since."""
    for key in flat:
        if not key.startswith("config."):
            continue
        new_name = common.new_name(key.removeprefix("config."))
        if new_name:
            raise ReportError(
                f"{path}: {key} is now called config.{new_name}; rename it there, or "
                "repeat the run"
            )


def _are_seeds(seeds):
    if not isinstance(seeds, dict):
        return False
    return all(isinstance(seed, (int, type(None))) for seed in seeds.values())


def _are_counts(counts):
    if counts is None:
        return True
    if not isinstance(counts, list):
        return False
    are_numbers = all(isinstance(n, (int, float)) and n >= 0 for n in counts)
    return are_numbers and sum(counts) > 0
