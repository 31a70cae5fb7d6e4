"""Configs checked and told apart: clear errors before any work, and the identity of a result."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import numpy as np

from configs import common
from ltkd_jax import methods, models
from ltkd_jax.data import augment, datasets, longtail, records
from ltkd_jax.training import hosts
from ltkd_jax.training.parallel import MODES

# How a run is carried out, not what it computes: no part of a result's identity. (A teacher from elsewhere is one, by
# its hash and not by its folder.)
EXECUTION = (
    "data.dir",
    "data.workers",
    "teacher.cache",
    "teacher.checkpoint",
    "teacher.table",
    "teacher.table_memory",
    "teacher.table_runs",
    "platform",
    "devices",
    "parallel",
    "steps_per_call",
    "eval_batch",
    "eval_every",
    "checkpoint_every",
    "smoke",
)
# Parts of a config that are off unless chosen. At these values they are no part of an identity, so that a part that
# comes new changes no older result's.
OFF = {
    "weighting": {"name": "static"},
    "augment": dataclasses.asdict(augment.NOTHING),
    "data.image_size": 0,
    "data.subset": "exponential",
    "data.stream": False,
    "method.num_groups": 0,
}
# How a training set is made of a data set; anything else is the path of a list.
SUBSETS = ("exponential", "all")
_TEACHER_KEYS = ("data", "groups", "augment", "seed_split", "seed_teacher", "precision")


class ConfigError(ValueError):
    """A config that cannot be run; its message names the key, the value and the remedy."""


class InUse(ConfigError):
    """A work directory in which another process is at work."""


def validate(config) -> None:
    """Checks all that can be checked without the data.

    Raises:
      ConfigError: naming the key, its value and what it may be.
    """
    method, learned = config.method.to_dict(), _learns_weights(config.weighting.to_dict())
    try:
        known = {"name", *methods.hyperparameters(method["name"], learned_weights=learned)}
        known |= set() if learned else {"warmup_epochs"}
        for role in ("teacher", "student"):
            models.create(config[role].model, 1, precision=config.precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if known != set(method):
        raise ConfigError(
            f"config.method holds {sorted(method)}, but {method['name']!r} takes {sorted(known)}: "
            f"choose a method by the config's argument, --config=configs/….py:{method['name']}, or learned weights "
            f"by --config=configs/….py:bikd,terms={method['name']}"
        )
    if learned:
        _validate_bilevel(config)
    platforms = ("", "cpu", "gpu", "tpu")
    _require(config.platform in platforms, "platform", config.platform, f"must be one of {platforms}")
    _require(config.devices >= 0, "devices", config.devices, "must not be negative; 0 takes all")
    _require(config.parallel in MODES, "parallel", config.parallel, f"must be one of {', '.join(MODES)}")
    choices = ("auto", "always", "never")
    _require(config.teacher.table in choices, "teacher.table", config.teacher.table, f"must be one of {choices}")
    memory = config.teacher.table_memory
    _require(0 < memory <= 1, "teacher.table_memory", memory, "must lie in (0, 1]")
    _require(config.data.imbalance >= 1, "data.imbalance", config.data.imbalance, "must be at least 1 (balanced)")
    _validate_data(config)
    for key in ("data.n_max", "data.meta_per_class", "data.validation_per_class", "data.test_images", "data.workers"):
        _require(_at(config, key) >= 0, key, _at(config, key), "must not be negative")
    for key in ("eval_batch", "eval_every", "checkpoint_every", "teacher.table_runs"):
        _require(_at(config, key) >= 1, key, _at(config, key), "must be at least 1")
    for key in ("steps_per_call", "seed", "seed_split", "seed_teacher"):
        _require(0 <= _at(config, key) < 2**31, key, _at(config, key), "must not be negative, and below 2³¹")
    warmup = method.get("warmup_epochs", 0.0)
    _require(warmup >= 0, "method.warmup_epochs", warmup, "must not be negative")
    for path, value in _floats(config.to_dict()):
        _require(np.isfinite(value), path, value, "must be finite")
    temperature = method.get("temperature", 1.0)
    _require(temperature > 0, "method.temperature", temperature, "must be positive")
    for role, recipe in (("train", config.train), ("teacher.train", config.teacher.train)):
        _validate_recipe(role, recipe)


def _validate_data(config):
    size, streams = config.data.image_size, config.data.stream
    _require(size == 0 or 8 <= size <= 1024, "data.image_size", size, "must be 0 (as stored), or 8 to 1024 pixels")
    named_digits = config.data.name == "digits" and streams
    _require(not named_digits, "data.stream", streams, "must be False for digits, which have no files to stream from")
    name, wanted = (
        config.data.name,
        "must be the name of a data set, up to 100 letters: name=… in the config's argument",
    )
    _require(0 < len(name) <= 100, "data.name", name, wanted)
    _require(size or not streams, "data.image_size", size, "must be set for a stream, such as 224")
    subset = config.data.subset
    if subset not in SUBSETS and not os.path.isfile(subset):  # which a path that can't be is not, either
        raise ConfigError(f"config.data.subset={subset!r} must be one of {', '.join(SUBSETS)}, or the path of a list")
    try:
        extra = augment.Extra(**config.augment)
    except ValueError as error:
        raise ConfigError(f"config.augment: {error}") from None
    if extra.policy == "autoaugment" and config.data.name in ("digits", "fashion_mnist"):
        raise ConfigError("config.augment.policy='autoaugment' is a policy for photographs: leave it 'none' here")
    reason = no_table(config)
    if config.teacher.table == "always" and reason:
        raise ConfigError(
            f"config.teacher.table='always': there can be no table, since {reason}; give 'auto' or 'never'"
        )
    if given_teacher(config) == "logits" and (reason or config.teacher.table == "never"):
        reason = reason or "config.teacher.table='never'"
        raise ConfigError(
            f"config.teacher.checkpoint={config.teacher.checkpoint!r} holds logits of images, which are looked up, and "
            f"here they cannot be: {reason}; give a network, a folder or a .msgpack file"
        )


def no_table(config) -> str | None:
    """Why a run cannot read its teacher's table; None if it can. A table holds logits of a number of views."""
    if methods.create(config.method.name, np.ones(3)).needs_features:
        return "the method needs the teacher's features"
    if config.data.stream or augment.Extra(**config.augment) != augment.NOTHING:
        return "the views of an image have no end"
    return None


def _learns_weights(weighting):
    takes = {"static": OFF["weighting"], "bilevel": common.bilevel()}
    keys = set(takes[weighting["name"]]) if weighting["name"] in takes else None
    _require(keys is not None, "weighting.name", weighting["name"], "must be one of static, bilevel")
    if keys != set(weighting):
        raise ConfigError(
            f"config.weighting holds {sorted(weighting)}, but {weighting['name']!r} takes {sorted(keys)}: choose "
            "learned weights by the config's argument, --config=configs/….py:bikd,terms=METHOD"
        )
    return weighting["name"] == "bilevel"


def _validate_bilevel(config):
    weighting = config.weighting.to_dict()
    for key in ("lookahead", "every"):
        _require(weighting[key] >= 1, f"weighting.{key}", weighting[key], "must be at least 1")
    for key in ("lr", "decay"):
        _require(weighting[key] > 0, f"weighting.{key}", weighting[key], "must be positive")
    _require(
        weighting["weight_decay"] >= 0, "weighting.weight_decay", weighting["weight_decay"], "must not be negative"
    )
    hidden, scales = weighting["hidden"], weighting["scales"]
    sizes = all(type(size) is int and size > 0 for size in hidden)
    _require(sizes, "weighting.hidden", hidden, "must be sizes of layers, positive whole numbers")
    objective = methods.create(config.method.name, np.ones(3))
    positive = all(type(scale) in (int, float) and 0 < scale < np.inf for scale in scales)
    fits = len(scales) in (0, len(objective.terms)) and positive
    count = f"one for each of the {len(objective.terms)} terms ({', '.join(objective.names)}), or none"
    _require(fits, "weighting.scales", scales, f"must be positive numbers, {count}")
    for key, check in (("features", methods.features), ("outer", methods.outer_loss)):
        try:
            check(objective, weighting[key])
        except ValueError as error:
            raise ConfigError(f"config.weighting.{key}={weighting[key]!r}: {error}") from None
    meta = config.data.meta_per_class
    what = "must be at least 1 with learned weights: the meta set would miss every class"
    _require(meta >= 1, "data.meta_per_class", meta, what)


def _validate_recipe(role, recipe):
    for key in ("batch_size", "epochs", "lr", "decay"):
        _require(recipe[key] > 0, f"{role}.{key}", recipe[key], "must be positive")
    for key in ("max_steps", "weight_decay"):
        _require(recipe[key] >= 0, f"{role}.{key}", recipe[key], "must not be negative")
    _require(0 <= recipe.momentum < 1, f"{role}.momentum", recipe.momentum, "must lie in [0, 1)")
    inside = all(isinstance(m, (int, float)) and 0 < m <= 1 for m in recipe.milestones)
    _require(inside, f"{role}.milestones", recipe.milestones, "must be fractions of the run, in (0, 1]")


def validate_devices(config) -> None:
    """Checks what depends on the machine: it has the devices asked for, and a batch is spread evenly over them.

    Raises:
      ConfigError: naming what was asked for, what there is, and the remedy.
    """
    try:
        there, count = jax.default_backend(), jax.device_count()
    except (RuntimeError, AssertionError) as error:  # the latter where jax does not even know the platform
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"jax finds no device of JAX_PLATFORMS={asked!r}: unset it, or install the jax and the driver of that "
            f"device; {str(error).partition(chr(10))[0]}".rstrip("; ")
        ) from None
    missing = (
        f"but jax finds {count} × {there} here: install the jax of the machine (jax[cuda12], jax[tpu]), mend its "
        f"driver, or give {there!r}, or '' for whatever there is"
    )
    _require(config.platform in ("", there), "platform", config.platform, missing)
    _require(config.devices <= count, "devices", config.devices, f"is more than the {count} that there are")
    several = jax.process_count() > 1
    _require(not (several and config.devices), "devices", config.devices, "must be 0, all, with several processes")
    devices = config.devices or count
    for role, recipe in (("train", config.train), ("teacher.train", config.teacher.train)):
        size = recipe.batch_size
        fewer = max(n for n in range(1, devices + 1) if size % n == 0)
        remedy = f"must be a multiple of the {devices} devices: round it" + (
            "" if several else f", or use fewer by config.devices={fewer}"
        )
        _require(size % devices == 0, f"{role}.batch_size", size, remedy)


def validate_alike(config) -> None:
    """Checks that all processes of a run were started with the same config, folders apart.

    Raises:
      ConfigError: in every process, naming one that differs.
    """
    folders = ("data.dir", "data.workers", "teacher.cache", "teacher.checkpoint")
    mine = hosts.each(lambda: {"result": identity(config), "all": without(plain(config), folders)})
    hashes = hosts.gather(identity_hash(mine))
    for index, found in enumerate(hashes):
        if found != hashes[0]:
            raise ConfigError(
                f"process {index} of {len(hashes)} has another config, or other data, than the first: start all "
                "processes by the same command, from the same checkout, over the same data set"
            )


def _require(condition, key, value, what):
    if not condition:
        raise ConfigError(f"config.{key}={value!r} {what}")


def _floats(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def _at(config, path):
    *parents, leaf = path.split(".")
    for name in parents:
        config = config[name]
    return config.get(leaf)  # not every method has every hyperparameter


def identity(config) -> dict:
    """What the result depends on: the config without the keys of `EXECUTION`, and without what is `OFF`.

    A teacher from elsewhere counts by its hash, a list of images by its content, and so does a data set of one's own,
    as far as it is there. Where a set is not drawn by imbalance, what draws is no part of it.
    """
    tree = plain(config)
    off = [path for path, value in OFF.items() if _at(tree, path) == value]
    tree = without(tree, (*EXECUTION, *off))
    if config.data.subset not in SUBSETS:
        listed = longtail.read_list(config.data.subset)
        tree["data"]["subset"] = f"list {identity_hash({'paths': listed.paths, 'labels': listed.labels})}"
    if config.data.subset != "exponential":
        tree["data"] = without(tree["data"], ("imbalance", "n_max"))
    own = config.data.name not in datasets.NAMES  # of which a name does not say what is in it
    content = records.fingerprint(config.data.name, config.data.dir or None) if own else None
    if content:
        tree["data"]["content"] = content[:12]
    given = given_teacher(config)
    if given == "folder":
        tree["teacher"]["checkpoint"] = teacher_results(config.teacher.checkpoint)["hash"]
    elif given == "variables":
        tree["teacher"] = {"model": config.teacher.model, "variables": file_hash(config.teacher.checkpoint)}
    elif given == "logits":
        tree["teacher"] = {"model": f"logits {file_hash(config.teacher.checkpoint)}"}
    return tree


def given_teacher(config) -> str | None:
    """What `teacher.checkpoint` is: a "folder" of a cache, a file of "variables" or of "logits"; None for nothing."""
    kinds = {".msgpack": "variables", ".npz": "logits"}
    path = config.teacher.checkpoint
    return kinds.get(pathlib.Path(path).suffix.lower(), "folder") if path else None


def file_hash(path) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a file.

    Raises:
      ConfigError: there is no such file.
    """
    try:
        stat = os.stat(path)
        return _file_hash(str(path), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ConfigError(f"config.teacher.checkpoint={str(path)!r} cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=8)
def _file_hash(path, *changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def config_hash(config) -> str:
    """Twelve hexadecimal digits of the SHA-256 of `identity(config)`."""
    return identity_hash(identity(config))


def teacher_identity(config) -> dict:
    """What the teacher depends on: data, split, model, recipe and precision, and nothing of the student.

    Images held out are taken from the draw's other end: where n_max is given, they change no training image. Of a set
    that is taken as it is they do.
    """
    whole = identity(config)
    if config.data.subset == "exponential" and config.data.n_max:
        whole["data"] |= {"meta_per_class": 0, "validation_per_class": 0}
    own = {key: value for key, value in whole["teacher"].items() if key != "checkpoint"}
    return {**{key: whole[key] for key in _TEACHER_KEYS if key in whole}, "teacher": own}


def teacher_results(folder) -> dict:
    """The `results.json` of a finished teacher.

    Raises:
      ConfigError: the folder holds none.
    """
    path = pathlib.Path(folder) / "results.json"
    remedy = f"remove {folder}; where it is of the cache, the teacher is trained again"
    found = read_json(path, remedy) if os.path.isfile(path) else {}
    if not {"hash", "model", "step"} <= set(found):
        raise ConfigError(
            f"{folder} holds no finished teacher: give config.teacher.checkpoint a folder of config.teacher.cache, a "
            "file of variables (.msgpack) or of logits (.npz); where the folder is of the cache, remove it and the "
            "teacher is trained again"
        )
    return found


def read_json(path, remedy: str = "remove it") -> dict:
    """A JSON object from a file.

    Raises:
      ConfigError: the file is damaged.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged (no JSON object): {remedy}")
    return found


def teacher_hash(config) -> str:
    """The hash of `teacher_identity(config)`."""
    return identity_hash(teacher_identity(config))


def identity_hash(tree: dict) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a tree, as JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def plain(config) -> dict:
    """A ConfigDict as JSON has it: dicts, lists and scalars."""
    return json.loads(json.dumps(config.to_dict()))


def without(tree: dict, paths, prefix="") -> dict:
    """The tree without the dotted paths."""
    return {
        key: without(value, paths, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in paths
    }
