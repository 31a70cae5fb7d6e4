"""What a result depends on, and its hash: the name under which results and teachers are found again."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

from experiments.config.trees import at, without
from experiments.config.validation import SUBSETS, ConfigError
from ltkd_jax import files
from ltkd_jax.data import augment, datasets, longtail, records

# How a run is executed, not what it computes: no part of a result's identity. A given teacher is part of it by the
# hash of its file, not by its path.
EXECUTION = (
    "data.dir",
    "data.num_workers",
    "teacher.dir",
    "teacher.checkpoint",
    "teacher.table",
    "teacher.table_memory",
    "teacher.table_runs",
    "platform",
    "devices",
    "parallel",
    "steps_per_call",
    "eval_batch_size",
    "eval_every",
    "checkpoint_every",
    "smoke",
)
# Options that are off unless chosen. At these values they are no part of an identity, so that a new option changes no
# older result's hash.
OFF = {
    "loss_weighting": {"name": "static"},
    "augment": dataclasses.asdict(augment.NO_EXTRA),
    "data.image_size": 0,
    "data.subset": "exponential",
    "data.stream": False,
    "method.num_groups": 0,
}
_TEACHER_KEYS = ("data", "groups", "augment", "split_seed", "teacher_seed", "precision")


def content_of(config: dict) -> dict:
    """Returns hashes of the files that a config names: {"teacher", "subset", "data"}, None where there is none.

    A data set of the user's own is known by its content, as far as it is prepared; the names of the others say it.

    Raises:
      ConfigError: a file cannot be read.
    """
    data = config["data"]
    checkpoint = config["teacher"]["checkpoint"]
    content = {"teacher": None, "subset": None, "data": None}
    if teacher_kind(checkpoint) == "folder":
        content["teacher"] = teacher_results(checkpoint)["hash"]
    elif checkpoint:
        content["teacher"] = _file_hash_of(checkpoint)
    if data["subset"] not in SUBSETS:
        listed = longtail.read_list(data["subset"])
        content["subset"] = hash_of({"paths": listed.paths, "labels": listed.labels})
    if data["name"] not in datasets.NAMES:
        fingerprint = records.fingerprint(data["name"], data["dir"] or None)
        content["data"] = fingerprint and fingerprint[:12]
    return content


def identity_of(config: dict, content: dict) -> dict:
    """Returns what a result depends on: the config without `EXECUTION` and `OFF`, and the content of its files.

    Where the training set is not drawn by imbalance, the options of that draw are left out.

    Args:
      config: the whole config, nested.
      content: from `content_of`.
    """
    off = [path for path, value in OFF.items() if at(config, path) == value]
    tree = without(config, (*EXECUTION, *off))
    data = config["data"]
    if data["subset"] != "exponential":
        tree["data"] = without(tree["data"], ("imbalance", "n_max"))
    if content["subset"]:
        tree["data"]["subset"] = f"list {content['subset']}"
    if content["data"]:
        tree["data"]["content"] = content["data"]
    kind = teacher_kind(config["teacher"]["checkpoint"])
    if kind == "folder":
        tree["teacher"]["checkpoint"] = content["teacher"]
    elif kind == "variables":
        tree["teacher"] = {
            "model": config["teacher"]["model"],
            "variables": content["teacher"],
        }
    elif kind == "logits":
        tree["teacher"] = {"model": f"logits {content['teacher']}"}
    return tree


def of_results(results: dict) -> dict:
    """Returns the identity of a finished run from its `results.json`."""
    return identity_of(results["config"], results["content"])


def teacher_identity(config: dict, identity: dict) -> dict:
    """Returns what the teacher depends on: data, split, model, recipe and precision, and nothing of the student.

    Images held out are taken from the draw's other end: where n_max is given, they change no training image. Of a set
    that is taken as it is they do.

    Args:
      config: the whole config.
      identity: its identity.
    """
    tree = {key: identity[key] for key in _TEACHER_KEYS if key in identity}
    if config["data"]["subset"] == "exponential" and config["data"]["n_max"]:
        tree["data"] = tree["data"] | {"outer_per_class": 0, "validation_per_class": 0}
    return {**tree, "teacher": without(identity["teacher"], ["checkpoint"])}


def teacher_kind(checkpoint: str) -> str:
    """Returns what `teacher.checkpoint` is: a "folder", a file of "variables" or of "logits"; "trained" if empty."""
    if not checkpoint:
        return "trained"
    return {".msgpack": "variables", ".npz": "logits"}.get(
        pathlib.Path(checkpoint).suffix.lower(), "folder"
    )


def teacher_results(folder) -> dict:
    """Returns the `results.json` of a finished teacher.

    Raises:
      ConfigError: the folder holds none.
    """
    path = pathlib.Path(folder) / "results.json"
    remedy = (
        "if it lies in config.teacher.dir, remove it, and the teacher is trained again"
    )
    results = read_json(path, remedy) if path.is_file() else {}
    if not {"hash", "model", "step"} <= set(results):
        raise ConfigError(
            f"{folder} holds no finished teacher: give config.teacher.checkpoint a folder of config.teacher.dir, a "
            f"file of variables (.msgpack) or of logits (.npz); {remedy}"
        )
    return results


def read_json(path, remedy: str = "remove it") -> dict:
    """Returns `files.read_json`, with a damaged file as a ConfigError."""
    try:
        return files.read_json(path, remedy)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def hash_of(tree: dict) -> str:
    """Returns twelve hexadecimal digits of the SHA-256 of a tree, as JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _file_hash_of(path):
    try:
        stat = os.stat(path)
        return _cached_file_hash(str(path), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ConfigError(
            f"config.teacher.checkpoint={str(path)!r} cannot be read: {error.strerror}"
        ) from None


@functools.lru_cache(maxsize=8)
def _cached_file_hash(path, *_changed):
    # Time and size are part of the cache's key, so that a file that was written anew is read anew.
    return files.sha256(path)[:12]
