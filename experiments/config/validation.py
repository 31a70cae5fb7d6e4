"""Checks a config before any work is done.

Every error names the key, its value and the remedy.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from configs import common
from experiments.config.trees import at, flatten
from ltkd_jax import methods, models
from ltkd_jax.data import augment
from ltkd_jax.training.parallel import MODES

# How a training set is drawn from a data set. Any other value is the path of a list.
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
    """Reports a config that cannot be run: the key, its value and the remedy."""


def validate(config: dict) -> None:
    """Checks everything that can be checked without the data.

    Args:
      config: nested, with tuples where the config file has them.

    Raises:
      ConfigError: a value is not allowed, or does not fit another one.
    """
    learned = _learns_weights(config["loss_weighting"])
    _validate_method(config, learned)
    for key, choices in _CHOICES.items():
        allowed = ", ".join(map(repr, choices))
        _require(
            at(config, key) in choices,
            key,
            at(config, key),
            f"must be one of {allowed}",
        )
    _require_each(config, _NOT_NEGATIVE, lambda x: x >= 0, "must not be negative")
    _require_each(config, _AT_LEAST_ONE, lambda x: x >= 1, "must be at least 1")
    _require_each(
        config,
        _BELOW_2_TO_31,
        lambda x: 0 <= x < 2**31,
        "must be at least 0 and below 2³¹",
    )
    _require_each(
        config, ["teacher.table_memory"], lambda x: 0 < x <= 1, "must be in (0, 1]"
    )
    _validate_data(config)
    _validate_teacher(config)
    for key, value in flatten(config).items():
        finite = not isinstance(value, float) or bool(np.isfinite(value))
        _require(finite, key, value, "must be finite")
    for role in ("train", "teacher.train"):
        _validate_recipe(config, role)
    if learned:
        _validate_learned_weights(config)


def _validate_method(config: dict, learned: bool) -> None:
    method = config["method"]
    name = method["name"]
    try:
        hyperparameters = methods.hyperparameters(name, learned_weights=learned)
        for role in ("teacher", "student"):
            # Only the model's name and the precision matter: no parameters are made.
            models.create(config[role]["model"], 1, precision=config["precision"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    allowed_keys = {"name", *hyperparameters}
    if not learned:
        allowed_keys.add("warmup_epochs")
    if set(method) != allowed_keys:
        raise ConfigError(
            f"config.method has the keys {sorted(method)}, but {name!r} takes "
            f"{sorted(allowed_keys)}: choose a method by the config's argument, "
            f"--config=configs/….py:{name}, or learned weights by "
            f"--config=configs/….py:bikd,terms={name}"
        )
    warmup = method.get("warmup_epochs", 0.0)
    _require(warmup >= 0, "method.warmup_epochs", warmup, "must not be negative")
    mass = method.get("mass", "batch")
    choices = ", ".join(methods.MASSES)
    _require(mass in methods.MASSES, "method.mass", mass, f"must be one of {choices}")
    temperature = method.get("temperature", 1.0)
    _require(temperature > 0, "method.temperature", temperature, "must be positive")


def _validate_data(config: dict) -> None:
    data = config["data"]
    name = data["name"]
    size = data["image_size"]
    streamed = data["stream"]
    subset = data["subset"]
    _require(
        0 < len(name) <= 100,
        "data.name",
        name,
        "must be the name of a data set, up to 100 letters: name=… in the config's "
        "argument",
    )
    imbalance = data["imbalance"]
    _require(
        imbalance >= 1, "data.imbalance", imbalance, "must be at least 1 (balanced)"
    )
    _require(
        size == 0 or 8 <= size <= 1024,
        "data.image_size",
        size,
        "must be 0 (as stored), or 8 to 1024 pixels",
    )
    _require(
        size > 0 or not streamed,
        "data.image_size",
        size,
        "must be set for a stream, such as 224",
    )
    _require(
        name != "digits" or not streamed,
        "data.stream",
        streamed,
        "must be False for digits, which have no files to stream from",
    )
    if subset not in SUBSETS and not os.path.isfile(subset):
        raise ConfigError(
            f"config.data.subset={subset!r} must be one of {', '.join(SUBSETS)}, or "
            "the path of a list"
        )
    try:
        extra = augment.Extra(**config["augment"])
    except ValueError as error:
        raise ConfigError(f"config.augment: {error}") from None
    if extra.policy == "autoaugment" and name in ("digits", "fashion_mnist"):
        raise ConfigError(
            "config.augment.policy='autoaugment' is a policy for photographs: set it "
            f"to 'none' for {name}"
        )


def _validate_teacher(config: dict) -> None:
    table = config["teacher"]["table"]
    checkpoint = config["teacher"]["checkpoint"]
    reason = no_table(config)
    if table == "always" and reason:
        raise ConfigError(
            f"config.teacher.table='always': there can be no table, since {reason}; "
            "set it to 'auto' or 'never'"
        )
    if table == "never":
        reason = reason or "config.teacher.table='never'"
    # The logits in a file are themselves a table, so they need what a table needs.
    if checkpoint.lower().endswith(".npz") and reason:
        raise ConfigError(
            f"config.teacher.checkpoint={checkpoint!r} holds logits, which must be "
            f"looked up in a table, but there can be no table: {reason}; use a folder "
            "of a teacher or a .msgpack file"
        )


def no_table(config: dict) -> str | None:
    """Returns why a run cannot look its teacher's logits up, or None if it can.

    A table holds logits alone, and only a finite number of views of each image.
    """
    if methods.METHODS[config["method"]["name"]].needs_features:
        return "the method needs the teacher's features"
    extra = augment.Extra(**config["augment"])
    if config["data"]["stream"] or extra != augment.NO_EXTRA:
        return "an image has infinitely many views"
    return None


def _learns_weights(weighting: dict) -> bool:
    """Returns whether a weight net learns the weights; checks the section's keys."""
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
            f"config.loss_weighting has the keys {sorted(weighting)}, but {name!r} "
            f"takes {sorted(allowed_keys[name])}: choose learned weights by the "
            "config's argument, --config=configs/….py:bikd,terms=METHOD"
        )
    return name == "bilevel"


def _validate_learned_weights(config: dict) -> None:
    weighting = config["loss_weighting"]

    def require_each(
        keys: Iterable[str], is_valid: Callable[[Any], bool], message: str
    ) -> None:
        paths = [f"loss_weighting.{key}" for key in keys]
        _require_each(config, paths, is_valid, message)

    require_each(["lookahead", "update_every"], lambda x: x >= 1, "must be at least 1")
    require_each(["lr", "lr_decay"], lambda x: x > 0, "must be positive")
    require_each(["weight_decay"], lambda x: x >= 0, "must not be negative")
    require_each(
        ["hidden"],
        # type(), not isinstance(): True is an int, but no size.
        lambda sizes: all(type(size) is int and size > 0 for size in sizes),
        "must be sizes of layers, positive whole numbers",
    )

    objective = methods.METHODS[config["method"]["name"]].example_objective
    num_terms = len(objective.terms)

    def are_scales(scales: tuple) -> bool:
        positive = all(type(x) in (int, float) and 0 < x < np.inf for x in scales)
        return positive and len(scales) in (0, num_terms)

    require_each(
        ["scales"],
        are_scales,
        f"must be positive numbers, one for each of the {num_terms} terms "
        f"({', '.join(objective.names)}), or none",
    )
    checks: dict[str, Callable] = {
        "features": methods.features,
        "outer_loss": methods.outer_loss,
    }
    for key, check in checks.items():
        try:
            check(objective, weighting[key])
        except ValueError as error:
            raise ConfigError(
                f"config.loss_weighting.{key}={weighting[key]!r}: {error}"
            ) from None
    per_class = config["data"]["outer_per_class"]
    _require(
        per_class >= 1,
        "data.outer_per_class",
        per_class,
        "must be at least 1 with learned weights: the outer set would miss every class",
    )


def _validate_recipe(config: dict, role: str) -> None:
    def require_each(
        keys: Iterable[str], is_valid: Callable[[Any], bool], message: str
    ) -> None:
        _require_each(config, [f"{role}.{key}" for key in keys], is_valid, message)

    def are_fractions(milestones: tuple) -> bool:
        return all(isinstance(m, (int, float)) and 0 < m <= 1 for m in milestones)

    require_each(
        ["batch_size", "epochs", "lr", "lr_decay"], lambda x: x > 0, "must be positive"
    )
    require_each(
        ["max_steps", "weight_decay", "lr_warmup_epochs"],
        lambda x: x >= 0,
        "must not be negative",
    )
    require_each(["momentum"], lambda x: 0 <= x < 1, "must be in [0, 1)")
    require_each(
        ["milestones"], are_fractions, "must be fractions of the run, in (0, 1]"
    )


def validate_devices(config: dict) -> None:
    """Checks what depends on this machine: the platform, the devices and the batches.

    Raises:
      ConfigError: jax does not have the devices that the config names, or a batch
        cannot be split evenly over them.
    """
    backend, num_available = _available_devices()
    num_requested = config["devices"]
    several_processes = jax.process_count() > 1
    _require(
        config["platform"] in ("", backend),
        "platform",
        config["platform"],
        f"but jax has {num_available} × {backend}: install the jax for this machine "
        "(jax[cuda12], jax[tpu]), repair its driver, or set the platform to "
        f"{backend!r}, or to '' for whatever there is",
    )
    _require(
        num_requested <= num_available,
        "devices",
        num_requested,
        f"is more than the {num_available} that there are",
    )
    _require(
        not (several_processes and num_requested),
        "devices",
        num_requested,
        "must be 0 (all) with several processes",
    )
    num_devices = num_requested or num_available
    for role in ("train", "teacher.train"):
        size = at(config, role)["batch_size"]
        remedy = f"must be a multiple of the {num_devices} devices: round it"
        if not several_processes:
            divisors = [n for n in range(1, num_devices + 1) if size % n == 0]
            remedy += f", or use fewer by config.devices={max(divisors)}"
        _require(size % num_devices == 0, f"{role}.batch_size", size, remedy)


def _available_devices() -> tuple[str, int]:
    """Returns the platform of jax's default devices, and their number."""
    try:
        return jax.default_backend(), jax.device_count()
    # jax raises AssertionError for a platform whose name it does not know.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f"jax has no device of JAX_PLATFORMS={platforms!r}: unset it, or install "
            f"the jax and the driver of that device; {first_line}".rstrip("; ")
        ) from None


def _require_each(
    config: dict,
    paths: Iterable[str],
    is_valid: Callable[[Any], bool],
    message: str,
) -> None:
    for path in paths:
        value = at(config, path)
        _require(is_valid(value), path, value, message)


def _require(condition: bool, key: str, value: Any, message: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key}={value!r} {message}")
