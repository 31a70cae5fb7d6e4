"""Reading of runs: result files and work directories, found in folders and checked."""

import copy
import json
import pathlib

# Names that configs and result files had before version 1.
RENAMED = {
    "seed_split": "split_seed",
    "seed_teacher": "teacher_seed",
    "eval_batch": "eval_batch_size",
    "data.workers": "data.num_workers",
    "data.meta_per_class": "data.outer_per_class",
    "train.decay": "train.lr_decay",
    "teacher.train.decay": "teacher.train.lr_decay",
    "teacher.cache": "teacher.dir",
    "weighting": "loss_weighting",
    "method.strength": "method.tau",
}
# Keys of a config that do not change the result: they only say how a run is executed.
_EXECUTION = (
    "data.dir", "data.num_workers", "teacher.dir", "teacher.checkpoint",
    "teacher.table", "teacher.table_memory", "teacher.table_runs", "platform", "devices", "parallel", "steps_per_call",
    "eval_batch_size", "eval_every", "checkpoint_every", "smoke",
)  # fmt: skip
# Values at which a part of a config is off; a result does not depend on it.
_OFF = {
    "loss_weighting": {"name": "static"},
    "augment": {"policy": "none", "cutout": 0, "mixup": 0.0},
    "data.image_size": 0,
    "data.subset": "exponential",
    "data.stream": False,
    "method.num_groups": 0,
}
_REQUIRED = {"config": dict, "seeds": dict, "test": dict}


class ReportError(ValueError):
    """A file that cannot be reported on; the message names it and says why."""


def load(path):
    """Returns a work directory or a result file as one dictionary, which the other modules call a run.

    It has the content of results.json, and `source` (a name to show), `finished`, and `metrics` (a list with one entry
    for each logged epoch). A work directory without results.json is an unfinished run, which has only `config` and
    `metrics`.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _read_results(path) | {"source": path.stem, "finished": True, "metrics": []}
    if not path.is_dir():
        raise ReportError(f"{path}: no such file or folder")
    extra = {"source": path.resolve().name, "metrics": _read_lines(path / "metrics.jsonl")}
    if (path / "results.json").exists():
        return _read_results(path / "results.json") | extra | {"finished": True}
    config = path / "config.json"
    return {"config": read_json(config) if config.exists() else {}} | extra | {"finished": False}


def find(paths):
    """Loads every run in the paths; folders are searched, and JSON files in them that hold no results are ignored."""
    return [load(run_path) for path in paths for run_path in _run_paths(pathlib.Path(path))]


def read_json(path):
    """Returns the content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: not readable as JSON ({error})") from error


def is_work_directory(path):
    """Returns whether a folder is the work directory of a run."""
    return any((path / name).exists() for name in ("results.json", "config.json", "metrics.jsonl"))


def _run_paths(path):
    if not path.is_dir() or is_work_directory(path):
        return [path]
    paths = []
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child.name != "teachers":
            paths += _run_paths(child)
        elif child.suffix == ".json":
            content = read_json(child)
            paths += [child] if isinstance(content, dict) and {"config", "test"} <= content.keys() else []
    return paths


def _read_lines(path):
    """Returns the records of metrics.jsonl without a last line that an interruption cut short."""
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{path}, line {number}: not readable as JSON ({error})") from error
    return records


def _read_results(path):
    """Returns the content of a result file, checked as far as the other modules rely on it."""
    results = read_json(path)
    for key, kind in _REQUIRED.items():
        if not isinstance(results, dict) or not isinstance(results.get(key), kind):
            raise ReportError(f"{path}: not a result file, it has no {key!r}")
    config = results["config"]
    for old, new in RENAMED.items():
        if has_key(config, old):
            raise ReportError(f"{path}: config.{old} is now config.{new}; rename it in the file, or run it again")
    is_valid = {
        "config.data": isinstance(config.get("data"), (dict, type(None))),
        "config.method": isinstance(config.get("method"), (dict, type(None))),
        "teacher": isinstance(results.get("teacher"), (dict, type(None))),
        "seeds": all(isinstance(seed, (int, type(None))) for seed in results["seeds"].values()),
        "class_names": isinstance(results.get("class_names"), (list, type(None))),
        "class_counts": _are_counts(results.get("class_counts")),
    }
    for key, valid in is_valid.items():
        if not valid:
            raise ReportError(f"{path}: not a result file, its {key!r} is not what a run writes")
    if value(results["test"], "all") is None:
        raise ReportError(f"{path}: not a result file, it has no test accuracy")
    return results


def _are_counts(counts):
    if counts is None:
        return True
    are_numbers = isinstance(counts, list) and all(isinstance(n, (int, float)) and n >= 0 for n in counts)
    return are_numbers and sum(counts) > 0


# Nested dictionaries.


def value(result, column):
    """Returns the number at a dotted key ("groups.tail") of a `test` or `validation` dictionary, else None."""
    for part in column.split("."):
        result = result.get(part) if isinstance(result, dict) else None
    return result if isinstance(result, (int, float)) else None


def flatten(config, prefix=""):
    """Returns a nested config as {"train.epochs": 240, …}."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    flat = {}
    for key, inner in config.items():
        flat |= flatten(inner, f"{prefix}{key}.")
    return flat


def has_key(config, path):
    """Returns whether a nested config has a dotted key."""
    *parents, last = path.split(".")
    for parent in parents:
        config = config.get(parent) if isinstance(config, dict) else None
    return isinstance(config, dict) and last in config


def dependencies(run):
    """Returns the part of a run's config that the result depends on; files count by their content."""
    config = copy.deepcopy(run["config"])
    content = run.get("content") or {}
    if content.get("subset"):
        config["data"]["subset"] = f"list {content['subset']}"
    if content.get("data"):
        config["data"]["content"] = content["data"]
    if content.get("teacher"):
        is_logits = str(config["teacher"].get("checkpoint")).endswith(".npz")
        config["teacher"] |= {"model": f"logits {content['teacher']}"} if is_logits else {"content": content["teacher"]}
    for path in (*_EXECUTION, *_OFF):
        _remove(config, path)
    return config


def _remove(config, path):
    """Removes a dotted key, unless it is a part that is on."""
    *parents, last = path.split(".")
    for parent in parents:
        config = config.get(parent) or {}
    if last in config and (path not in _OFF or config[last] == _OFF[path]):
        del config[last]
