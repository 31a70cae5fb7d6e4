"""Identities: what a result or a teacher depends on, and the hash that names it.

A finished run or teacher is looked up by the hash of its identity. Two configs with the
same identity compute the same thing, however they are executed.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

from experiments.config.trees import at, without
from experiments.config.validation import SUBSETS, ConfigError
from ltkd_jax import files, inference, methods, models
from ltkd_jax.data import augment, datasets, features, longtail, records

# These keys decide how a run is executed, not what it computes, so an identity leaves
# them out. It has the hash of an external teacher's file instead of its path.
EXECUTION_KEYS = (
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
# Options with the values at which they have no effect. An identity leaves out an option
# with this value, so that a new option does not change the hashes of earlier results.
NO_EFFECT = {
    "loss_weighting": {"name": "static"},
    "augment": dataclasses.asdict(augment.NO_EXTRA),
    "data.image_size": 0,
    "data.subset": "exponential",
    "data.stream": False,
    "method.num_groups": 0,
    "method.mass": "batch",
    "train.lr_warmup_epochs": 0.0,
    "teacher.train.lr_warmup_epochs": 0.0,
}
# Precedes the hash of a teacher that is the student of a run.
_RUN_PREFIX = "run "
# The keys that a teacher depends on, besides `teacher` itself.
_TEACHER_KEYS = ("data", "groups", "augment", "split_seed", "teacher_seed", "precision")


def content_hashes(config: dict) -> dict[str, Any]:
    """Returns hashes of the files that a config names.

    A data set of the library is identified by its name, a custom one by its content.

    Args:
      config: the complete config, nested.

    Returns:
      `{"teacher", "subset", "data"}`: the hashes of the external teacher, of the list
      of training images and of a custom data set. Each is None if the config names no
      such file, or if the custom data set is not prepared yet. If the teacher is the
      student of a run, its hash is preceded by "run ". "code" is there for custom
      methods and models only, by their role.

    Raises:
      ConfigError: a file cannot be read, or the teacher is a run of another model.
    """
    data = config["data"]
    checkpoint = config["teacher"]["checkpoint"]
    content: dict[str, Any] = {"teacher": None, "subset": None, "data": None}
    if teacher_kind(checkpoint) == "folder":
        results = read_teacher_results(checkpoint)
        if _is_run(results):
            content["teacher"] = _hash_run(checkpoint, config["teacher"]["model"])
        else:
            content["teacher"] = results["hash"]
    elif checkpoint:
        content["teacher"] = _file_hash(
            checkpoint, f"config.teacher.checkpoint={checkpoint!r}"
        )
    if data["subset"] not in SUBSETS:
        image_list = longtail.read_list(data["subset"])
        content["subset"] = hash_tree(
            {"paths": image_list.paths, "labels": image_list.labels}
        )
    if data["name"] not in datasets.NAMES:
        content["data"] = _hash_data(data["name"], data["dir"] or None)
    code = _custom_code(config)
    if code:
        content["code"] = code
    return content


def _custom_code(config: dict) -> dict[str, str]:
    """Returns "module hash" of the method and the models that are not the library's."""
    module_names = {
        "method": methods.METHODS[config["method"]["name"]].terms_fn.__module__,
        "student": models.defining_module(config["student"]["model"]),
        "teacher": models.defining_module(config["teacher"]["model"]),
    }
    code = {}
    for role, name in module_names.items():
        if name.partition(".")[0] == "ltkd_jax":
            continue
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None:
            raise ConfigError(
                f"the {role} is of the module {name}, which has no file: put it into a "
                "file, so that its results can be repeated"
            )
        code[role] = f"{name} {files.sha256(path)[:12]}"
    return code


def custom_modules(content: dict) -> str:
    """Returns the modules of custom methods and models, as --import takes them.

    Args:
      content: from `content_hashes`.
    """
    code = content.get("code", {})
    return ",".join(sorted({entry.split()[0] for entry in code.values()}))


def run_identity(config: dict, content: dict) -> dict:
    """Returns what the result of a run depends on.

    This is the config without `EXECUTION_KEYS` and without options of no effect, with
    hashes in place of file names. If the training set is not drawn by imbalance, the
    options of that draw are left out.

    Args:
      config: the complete config, nested.
      content: from `content_hashes`.
    """
    no_effect = [path for path, value in NO_EFFECT.items() if at(config, path) == value]
    tree = without(config, (*EXECUTION_KEYS, *no_effect))
    if config["data"]["subset"] != "exponential":
        tree["data"] = without(tree["data"], ("imbalance", "n_max"))
    if content["subset"]:
        tree["data"]["subset"] = f"list {content['subset']}"
    if content["data"]:
        tree["data"]["content"] = content["data"]
    if content.get("code"):
        tree["code"] = content["code"]

    kind = teacher_kind(config["teacher"]["checkpoint"], content["teacher"])
    if kind == "folder":
        tree["teacher"]["checkpoint"] = content["teacher"]
    elif kind in ("variables", "run"):
        # The config's recipe did not train this teacher, so it is left out.
        tree["teacher"] = {
            "model": config["teacher"]["model"],
            "variables": _without_run(content["teacher"]),
        }
    elif kind == "logits":
        tree["teacher"] = {"model": f"logits {content['teacher']}"}
    return tree


def add_new_options(config: dict) -> dict:
    """Returns the config with the options that it lacks, at values of no effect.

    A `results.json` of an older version records a config without them.
    """
    complete = copy.deepcopy(config)
    for path, value in NO_EFFECT.items():
        section_path, _, key = path.rpartition(".")
        section = at(complete, section_path) if section_path else None
        if not isinstance(section, dict):
            continue
        # An option of a method is one of only some methods.
        if section_path != "method" or _takes(section.get("name"), key):
            section.setdefault(key, value)
    return complete


def _takes(method: Any, key: str) -> bool:
    """Returns whether there is such a method, and it has the hyperparameter."""
    is_method = isinstance(method, str) and method in methods.METHODS
    return is_method and key in methods.hyperparameters(method)


def recorded_identity(results: dict) -> dict:
    """Returns the identity that a `results.json` or `config.json` records."""
    return run_identity(results["config"], results["content"])


def teacher_identity(config: dict, identity: dict) -> dict:
    """Returns what a teacher depends on: data, split, model, recipe and precision.

    It does not depend on the student, so all methods and student seeds share a teacher.

    Args:
      config: the complete config, nested.
      identity: from `run_identity`.
    """
    tree = {key: identity[key] for key in _TEACHER_KEYS if key in identity}
    # The draw ranks the images of each class: training images come from the front,
    # held-out images from the back. With n_max set, holding images out therefore
    # changes no training image; in all other cases it does.
    if config["data"]["subset"] == "exponential" and config["data"]["n_max"]:
        tree["data"] = tree["data"] | {"outer_per_class": 0, "validation_per_class": 0}
    code = identity.get("code", {})
    if "teacher" in code:
        tree["code"] = {"teacher": code["teacher"]}
    # A teacher from a folder has the identity of the teacher that this config would
    # train, so the hash of the folder is left out.
    return {**tree, "teacher": without(identity["teacher"], ["checkpoint"])}


def teacher_kind(checkpoint: str, content: str | None = None) -> str:
    """Returns what `teacher.checkpoint` names.

    Args:
      checkpoint: its value.
      content: "teacher" of `content_hashes`; without it, a run counts as a folder.

    Returns:
      "folder" (of a finished teacher), "run" (the work directory of a finished run),
      "variables" or "logits" (a file of them), or "trained" if it is empty: then the
      run trains its teacher itself.
    """
    if not checkpoint:
        return "trained"
    if content and content.startswith(_RUN_PREFIX):
        return "run"
    suffix = pathlib.Path(checkpoint).suffix.lower()
    return {".msgpack": "variables", ".npz": "logits"}.get(suffix, "folder")


class ExternalTeacher(NamedTuple):
    """Describes a teacher that a run did not train.

    Attributes:
      name: of its file, or of the folder of the run or the teacher.
      content: the hash of its content.
      key: that has this hash in the section `teacher` of the run's identity.
    """

    name: str
    content: str
    key: str


def external_teacher(results: dict) -> ExternalTeacher | None:
    """Returns the external teacher that a `results.json` records, None without one.

    >>> config = {"teacher": {"checkpoint": "runs/a.msgpack"}}
    >>> external_teacher({"config": config, "content": {"teacher": "12ab"}})
    ExternalTeacher(name='a.msgpack', content='12ab', key='variables')
    """
    checkpoint = results["config"]["teacher"]["checkpoint"]
    content = results["content"]["teacher"]
    if not checkpoint:
        return None
    path = pathlib.PurePath(checkpoint)
    if path.name == inference.WEIGHTS_NAME:
        # Every run has a file of that name.
        path = path.parent
    kind = teacher_kind(checkpoint, content)
    key = {"folder": "checkpoint", "logits": "model"}.get(kind, "variables")
    return ExternalTeacher(path.name or checkpoint, _without_run(content), key)


def read_teacher_results(folder: str | os.PathLike[str]) -> dict:
    """Returns the `results.json` of a finished teacher, or of a finished run.

    Raises:
      ConfigError: the folder has none.
    """
    path = pathlib.Path(folder) / "results.json"
    remedy = (
        "if it is in config.teacher.dir, remove it, and the teacher is trained again"
    )
    results = read_json(path, remedy) if path.is_file() else {}
    if _is_run(results) or {"hash", "model", "step"} <= results.keys():
        return results
    if os.path.isfile(folder):
        remedy = "python -m ltkd_jax.models.convert converts a PyTorch checkpoint"
    elif (path.parent / "config.json").is_file():
        remedy = f"if it is of a run, finish it by its command; {remedy}"
    raise ConfigError(
        f"{folder} holds no finished teacher: set config.teacher.checkpoint to the "
        "work directory of a finished run, whose student then teaches, a folder of "
        "config.teacher.dir, a file of variables (.msgpack) or of logits (.npz); "
        f"{remedy}"
    )


def _without_run(content: str) -> str:
    """Returns the hash of a teacher, without the prefix of a run's student."""
    return content.removeprefix(_RUN_PREFIX)


def _is_run(results: dict) -> bool:
    """Returns whether a `results.json` is that of a run, not that of a teacher."""
    return {"config_hash", "config", "content"} <= results.keys()


def _hash_run(folder: str, model: str) -> str:
    """Returns the hash of the student in the work directory of a finished run."""
    path = pathlib.Path(folder) / inference.FILE_NAME
    if not path.is_file():
        raise ConfigError(
            f"config.teacher.checkpoint={folder!r} is a run without {path.name}, which "
            "earlier versions did not write: repeat the run"
        )
    run_model = read_json(path, "repeat the run").get("model")
    if run_model != model:
        raise ConfigError(
            f"config.teacher.checkpoint={folder!r} is a run of the student "
            f"{run_model!r}, but config.teacher.model={model!r}: set it to "
            f"{run_model!r}, or give another run"
        )
    weights = str(path.with_name(inference.WEIGHTS_NAME))
    return _RUN_PREFIX + _file_hash(weights, weights)


def read_json(path: str | os.PathLike[str], remedy: str = "remove it") -> dict:
    """Returns `files.read_json(path)`, and raises ConfigError for a damaged file."""
    try:
        return files.read_json(path, remedy)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def hash_tree(tree: dict) -> str:
    """Returns twelve hexadecimal digits of the SHA-256 of a tree, written as JSON."""
    # Sorted, so that the order in which keys were set does not matter.
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hash_data(name: str, data_dir: str | None) -> str | None:
    """Returns the hash of a custom data set, None if there is no such data set."""
    features_path = features.find(name, data_dir)
    if features_path:
        return _file_hash(str(features_path), str(features_path))
    fingerprint = records.fingerprint(name, data_dir)
    return fingerprint[:12] if fingerprint else None


def _file_hash(path: str, name: str) -> str:
    """Returns the hash of a file, which messages call `name`."""
    try:
        stat = os.stat(path)
        return _cached_file_hash(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=8)
def _cached_file_hash(path: str, *_version: int) -> str:
    # Time and size are arguments only to be part of the cache's key: a file that has
    # been rewritten is hashed again.
    return files.sha256(path)[:12]
