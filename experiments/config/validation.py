"""Checks of a config: a clear error before any work, naming the key, its value and the remedy."""

import os

import jax
import numpy as np

from configs import common
from experiments.config.trees import at, flatten
from ltkd_jax import methods, models
from ltkd_jax.data import augment
from ltkd_jax.training.parallel import MODES

# How a training set is made of a data set; anything else is the path of a list.
SUBSETS = ("exponential", "all")
_NOT_NEGATIVE = (
    "data.n_max",
    "data.outer_per_class",
    "data.validation_per_class",
    "data.test_images",
    "data.num_workers",
    "devices",
)
_AT_LEAST_ONE = (
    "eval_batch_size",
    "eval_every",
    "checkpoint_every",
    "teacher.table_runs",
)
_BELOW_2_TO_31 = ("steps_per_call", "seed", "split_seed", "teacher_seed")
_CHOICES = {
    "platform": ("", "cpu", "gpu", "tpu"),
    "parallel": MODES,
    "teacher.table": ("auto", "always", "never"),
}


class ConfigError(ValueError):
    """A config that cannot be run; its message names the key, the value and the remedy."""


def validate(config: dict) -> None:
    """Checks everything that can be checked without the data.

    Args:
      config: nested, with tuples where the config file has them.

    Raises:
      ConfigError: naming the key, its value and what it may be.
    """
    learned = _learns_weights(config["loss_weighting"])
    _validate_method(config, learned)
    for key, choices in _CHOICES.items():
        _require(
            at(config, key) in choices,
            key,
            at(config, key),
            f"must be one of {', '.join(map(repr, choices))}",
        )
    for key in _NOT_NEGATIVE:
        _require(at(config, key) >= 0, key, at(config, key), "must not be negative")
    for key in _AT_LEAST_ONE:
        _require(at(config, key) >= 1, key, at(config, key), "must be at least 1")
    for key in _BELOW_2_TO_31:
        _require(
            0 <= at(config, key) < 2**31,
            key,
            at(config, key),
            "must be at least 0 and below 2³¹",
        )
    memory = config["teacher"]["table_memory"]
    _require(0 < memory <= 1, "teacher.table_memory", memory, "must lie in (0, 1]")
    _validate_data(config)
    _validate_teacher(config)
    for key, value in flatten(config).items():
        _require(
            not isinstance(value, float) or np.isfinite(value),
            key,
            value,
            "must be finite",
        )
    for role in ("train", "teacher.train"):
        _validate_recipe(role, at(config, role))
    if learned:
        _validate_learned_weights(config)


def _validate_method(config, learned):
    method = config["method"]
    try:
        allowed = {
            "name",
            *methods.hyperparameters(method["name"], learned_weights=learned),
        }
        for role in ("teacher", "student"):
            models.create(config[role]["model"], 1, precision=config["precision"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not learned:
        allowed.add("warmup_epochs")
    if allowed != set(method):
        name = method["name"]
        raise ConfigError(
            f"config.method holds {sorted(method)}, but {name!r} takes {sorted(allowed)}: choose a method by the "
            f"config's argument, --config=configs/….py:{name}, or learned weights by "
            f"--config=configs/….py:bikd,terms={name}"
        )
    warmup = method.get("warmup_epochs", 0.0)
    _require(warmup >= 0, "method.warmup_epochs", warmup, "must not be negative")
    temperature = method.get("temperature", 1.0)
    _require(temperature > 0, "method.temperature", temperature, "must be positive")


def _validate_data(config):
    data = config["data"]
    name = data["name"]
    size = data["image_size"]
    streams = data["stream"]
    subset = data["subset"]
    remedy = "must be the name of a data set, up to 100 letters: name=… in the config's argument"
    _require(0 < len(name) <= 100, "data.name", name, remedy)
    _require(
        data["imbalance"] >= 1,
        "data.imbalance",
        data["imbalance"],
        "must be at least 1 (balanced)",
    )
    _require(
        size == 0 or 8 <= size <= 1024,
        "data.image_size",
        size,
        "must be 0 (as stored), or 8 to 1024 pixels",
    )
    _require(
        size or not streams,
        "data.image_size",
        size,
        "must be set for a stream, such as 224",
    )
    digits = name == "digits" and streams
    _require(
        not digits,
        "data.stream",
        streams,
        "must be False for digits, which have no files to stream from",
    )
    if subset not in SUBSETS and not os.path.isfile(subset):
        raise ConfigError(
            f"config.data.subset={subset!r} must be one of {', '.join(SUBSETS)}, or the path of a list"
        )
    try:
        extra = augment.Extra(**config["augment"])
    except ValueError as error:
        raise ConfigError(f"config.augment: {error}") from None
    if extra.policy == "autoaugment" and name in ("digits", "fashion_mnist"):
        raise ConfigError(
            "config.augment.policy='autoaugment' is a policy for photographs: leave it 'none' here"
        )


def _validate_teacher(config):
    table = config["teacher"]["table"]
    checkpoint = config["teacher"]["checkpoint"]
    reason = no_table(config)
    if table == "always" and reason:
        raise ConfigError(
            f"config.teacher.table='always': there can be no table, since {reason}; give 'auto' or 'never'"
        )
    if table == "never":
        reason = reason or "config.teacher.table='never'"
    if checkpoint.lower().endswith(".npz") and reason:
        raise ConfigError(
            f"config.teacher.checkpoint={checkpoint!r} holds logits of images, which are looked up, and here they "
            f"cannot be: {reason}; give a network, a folder or a .msgpack file"
        )


def no_table(config: dict) -> str | None:
    """Returns why a run cannot have a table of its teacher's logits, None if it can.

    A table holds the logits of a finite number of views.
    """
    if methods.METHODS[config["method"]["name"]].needs_features:
        return "the method needs the teacher's features"
    if (
        config["data"]["stream"]
        or augment.Extra(**config["augment"]) != augment.NO_EXTRA
    ):
        return "an image has infinitely many views"
    return None


def _learns_weights(weighting):
    """Returns whether the loss weights are learned, once the keys of `loss_weighting` are those of its name."""
    allowed_keys = {"static": {"name"}, "bilevel": set(common.bilevel())}
    name = weighting["name"]
    _require(
        name in allowed_keys,
        "loss_weighting.name",
        name,
        "must be one of static, bilevel",
    )
    if set(weighting) != allowed_keys[name]:
        raise ConfigError(
            f"config.loss_weighting holds {sorted(weighting)}, but {name!r} takes {sorted(allowed_keys[name])}: choose "
            "learned weights by the config's argument, --config=configs/….py:bikd,terms=METHOD"
        )
    return name == "bilevel"


def _validate_learned_weights(config):
    weighting = config["loss_weighting"]
    for key in ("lookahead", "update_every"):
        _require(
            weighting[key] >= 1,
            f"loss_weighting.{key}",
            weighting[key],
            "must be at least 1",
        )
    for key in ("lr", "lr_decay"):
        _require(
            weighting[key] > 0,
            f"loss_weighting.{key}",
            weighting[key],
            "must be positive",
        )
    decay = weighting["weight_decay"]
    _require(decay >= 0, "loss_weighting.weight_decay", decay, "must not be negative")
    sizes = weighting["hidden"]
    positive = all(type(size) is int and size > 0 for size in sizes)
    _require(
        positive,
        "loss_weighting.hidden",
        sizes,
        "must be sizes of layers, positive whole numbers",
    )

    objective = methods.METHODS[config["method"]["name"]].example_objective
    scales = weighting["scales"]
    positive = all(
        type(scale) in (int, float) and 0 < scale < np.inf for scale in scales
    )
    fits = positive and len(scales) in (0, len(objective.terms))
    number = f"one for each of the {len(objective.terms)} terms ({', '.join(objective.names)}), or none"
    _require(
        fits, "loss_weighting.scales", scales, f"must be positive numbers, {number}"
    )
    for key, check in (
        ("features", methods.features),
        ("outer_loss", methods.outer_loss),
    ):
        try:
            check(objective, weighting[key])
        except ValueError as error:
            raise ConfigError(
                f"config.loss_weighting.{key}={weighting[key]!r}: {error}"
            ) from None
    per_class = config["data"]["outer_per_class"]
    remedy = (
        "must be at least 1 with learned weights: the outer set would miss every class"
    )
    _require(per_class >= 1, "data.outer_per_class", per_class, remedy)


def _validate_recipe(role, recipe):
    for key in ("batch_size", "epochs", "lr", "lr_decay"):
        _require(recipe[key] > 0, f"{role}.{key}", recipe[key], "must be positive")
    for key in ("max_steps", "weight_decay"):
        _require(recipe[key] >= 0, f"{role}.{key}", recipe[key], "must not be negative")
    momentum = recipe["momentum"]
    _require(0 <= momentum < 1, f"{role}.momentum", momentum, "must lie in [0, 1)")
    milestones = recipe["milestones"]
    fractions = all(isinstance(m, (int, float)) and 0 < m <= 1 for m in milestones)
    _require(
        fractions,
        f"{role}.milestones",
        milestones,
        "must be fractions of the run, in (0, 1]",
    )


def validate_devices(config: dict) -> None:
    """Checks what depends on the machine: its devices, over which a batch must spread evenly.

    Raises:
      ConfigError: naming what was asked for, what there is, and the remedy.
    """
    try:
        backend = jax.default_backend()
        count = jax.device_count()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the latter where jax does not even know the platform
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"jax finds no device of JAX_PLATFORMS={platforms!r}: unset it, or install the jax and the driver of that "
            f"device; {str(error).partition(chr(10))[0]}".rstrip("; ")
        ) from None
    missing = (
        f"but jax finds {count} × {backend} here: install the jax of the machine (jax[cuda12], jax[tpu]), repair its "
        f"driver, or give {backend!r}, or '' for whatever there is"
    )
    wanted = config["devices"]
    several_processes = jax.process_count() > 1
    _require(
        config["platform"] in ("", backend), "platform", config["platform"], missing
    )
    _require(
        wanted <= count, "devices", wanted, f"is more than the {count} that there are"
    )
    _require(
        not (several_processes and wanted),
        "devices",
        wanted,
        "must be 0, all, with several processes",
    )
    devices = wanted or count
    for role in ("train", "teacher.train"):
        size = at(config, role)["batch_size"]
        fewer = max(n for n in range(1, devices + 1) if size % n == 0)
        alternative = (
            "" if several_processes else f", or use fewer by config.devices={fewer}"
        )
        remedy = f"must be a multiple of the {devices} devices: round it{alternative}"
        _require(size % devices == 0, f"{role}.batch_size", size, remedy)


def _require(condition, key, value, what):
    if not condition:
        raise ConfigError(f"config.{key}={value!r} {what}")
