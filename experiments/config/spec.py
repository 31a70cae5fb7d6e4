"""The frozen specification of a run.

A config is resolved once, by `resolve`; nothing below takes a config. Whatever a
compiled training depends on is hashable, so runs that differ only in their seeds share
it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import common
from experiments.config import identity as identities
from experiments.config import validation
from experiments.config.names import check_key
from experiments.config.trees import flatten, without
from experiments.config.validation import ConfigError
from ltkd_jax import files, methods, names
from ltkd_jax.data import augment
from ltkd_jax.groups import ClassGroups

# Keys whose values are paths.
_PATH_KEYS = ("data.dir", "data.subset", "teacher.dir", "teacher.checkpoint")


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Describes a long-tailed data set; see `data` in configs/common.py."""

    name: str
    dir: str
    subset: str
    imbalance: float
    n_max: int
    outer_per_class: int
    validation_per_class: int
    test_images: int
    image_size: int
    stream: bool
    split_seed: int
    group_fractions: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Describes SGD and its schedule; see `recipe` in configs/common.py."""

    batch_size: int
    epochs: float
    max_steps: int
    lr: float
    lr_warmup_epochs: float
    momentum: float
    weight_decay: float
    milestones: tuple[float, ...]
    lr_decay: float

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of steps of the complete run."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps) if self.max_steps else steps


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """Describes a method of `ltkd_jax.methods`.

    Attributes:
      name: of the method.
      values: its hyperparameters as (name, value) pairs, which unlike a dict are
        hashable.
      warmup_epochs: epochs over which its static weights are warmed up.
    """

    name: str
    values: tuple[tuple[str, float | str], ...] = ()
    warmup_epochs: float = 0.0

    @property
    def hyperparameters(self) -> dict[str, float | str]:
        """The hyperparameters by name."""
        return dict(self.values)

    @property
    def needs_teacher(self) -> bool:
        """Returns whether a term compares with a teacher."""
        return methods.METHODS[self.name].needs_teacher

    @property
    def needs_features(self) -> bool:
        """Returns whether a term compares with the teacher's features."""
        return methods.METHODS[self.name].needs_features

    def objective(
        self, class_counts: Any, groups: ClassGroups, steps_per_epoch: int
    ) -> methods.Objective:
        """Returns the loss terms and their static weights for a training set."""
        return methods.create(
            self.name,
            class_counts,
            groups,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            **self.hyperparameters,
        )


@dataclasses.dataclass(frozen=True)
class LearnedWeights:
    """Describes weights that a net learns; see `bilevel` in configs/common.py."""

    lookahead: int
    update_every: int
    outer_loss: str
    features: tuple[str, ...]
    hidden: tuple[int, ...]
    scales: tuple[float, ...]
    lr: float
    weight_decay: float
    lr_decay: float

    @property
    def outer_loss_needs_teacher(self) -> bool:
        """Returns whether the loss on the outer set compares with the teacher."""
        return self.outer_loss != "hard"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Describes how a training is executed; only `precision` affects its results."""

    precision: str
    devices: int
    parallel: str
    steps_per_call: int
    eval_batch_size: int
    num_workers: int


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """Describes the training of one network, without its seed.

    Equal specifications share their compiled functions.

    Attributes:
      teacher_source: where the step reads the teacher's outputs. "none": it reads none;
        "table": looked up by image and view; "network": the teacher runs in the step;
        "features": it runs in the step and returns its features too.
    """

    model: str
    recipe: Recipe
    method: MethodSpec
    loss_weighting: LearnedWeights | None
    teacher_model: str
    teacher_source: str
    data: DatasetSpec
    augment: augment.Extra
    execution: Execution


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """Describes the teacher and its origin; see `teacher` in configs/common.py.

    Attributes:
      kind: its origin, see `identity.teacher_kind`.
    """

    model: str
    train: Recipe
    dir: str
    checkpoint: str
    table: str
    table_memory: float
    table_runs: int
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class RunSpec:
    """Describes a run: a student, and the teacher if the method needs one.

    Attributes:
      config: the complete config, nested, for `results.json`; its `data.dir` is empty,
        since it differs between machines.
      content: hashes of the files that the config names, see `identity.content_hashes`.
      identity: what the result depends on.
      teacher_identity: what the teacher depends on.
    """

    config: dict
    content: dict
    identity: dict
    teacher_identity: dict
    seed: int
    teacher_seed: int
    data: DatasetSpec
    augment: augment.Extra
    method: MethodSpec
    loss_weighting: LearnedWeights | None
    student_model: str
    train: Recipe
    teacher: TeacherSpec
    execution: Execution
    eval_every: int
    checkpoint_every: int

    @functools.cached_property
    def hash(self) -> str:
        """The hash of the identity, by which a result is looked up."""
        return identities.hash_tree(self.identity)

    @functools.cached_property
    def teacher_hash(self) -> str:
        """The hash of the teacher's identity, by which a teacher is looked up."""
        return identities.hash_tree(self.teacher_identity)

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return method_label(self.config)

    @property
    def name(self) -> str:
        """The name of the run's folder.

        It is <data>-<imbalance>-<method>-<teacher>-<student>-s<seed>, with -smoke at
        the end of a smoke run. Unless the training set is drawn by imbalance, "all" or
        the name of the list replaces the imbalance.
        """
        if self.data.subset == "exponential":
            subset = f"{self.data.imbalance:g}"
        else:
            subset = pathlib.Path(self.data.subset).stem
        if self.teacher.kind in ("variables", "logits"):
            teacher = pathlib.Path(self.teacher.checkpoint).stem
        elif self.teacher.kind == "run":
            teacher = pathlib.Path(self.teacher.checkpoint).resolve().name
        else:
            teacher = self.teacher.model
        fields = [
            self.data.name,
            subset,
            self.label.replace(" over ", "-"),
            teacher,
            self.student_model,
            f"s{self.seed}",
        ]
        if self.config["smoke"]:
            fields.append("smoke")
        return "-".join(fields)

    @property
    def needs_teacher(self) -> bool:
        """Returns whether a term of the method compares with a teacher."""
        return self.method.needs_teacher

    @property
    def outer_loss_needs_teacher(self) -> bool:
        """Returns whether there is an outer loss that compares with the teacher."""
        return (
            self.loss_weighting is not None
            and self.loss_weighting.outer_loss_needs_teacher
        )

    @property
    def can_use_table(self) -> bool:
        """Returns whether a table of all views can hold the teacher's logits."""
        return self.needs_teacher and validation.no_table(self.config) is None

    def student_training(self, teacher_source: str) -> TrainingSpec:
        """Returns the student's training; see `TrainingSpec` for `teacher_source`."""
        return TrainingSpec(
            model=self.student_model,
            recipe=self.train,
            method=self.method,
            loss_weighting=self.loss_weighting,
            teacher_model=self.teacher.model,
            teacher_source=teacher_source,
            data=self.data,
            augment=self.augment,
            execution=self.execution,
        )

    def teacher_training(self) -> TrainingSpec:
        """Returns the teacher's training: plain cross-entropy on the same data."""
        return dataclasses.replace(
            self.student_training("none"),
            model=self.teacher.model,
            recipe=self.teacher.train,
            method=MethodSpec("ce"),
            loss_weighting=None,
        )


def resolve(config: ml_collections.ConfigDict | Mapping) -> RunSpec:
    """Checks a config and returns the specification of its run.

    Args:
      config: from a config file, or the `config` of a `results.json` (with a `data.dir`
        of this machine).

    Raises:
      ConfigError: with the key, its value and the remedy.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    tree = identities.add_new_options(_with_tuples(config))
    _check_keys(tree)
    # Recorded with its ~, so that the record does not depend on the user.
    recorded_config = tree
    tree = _with_home(tree)
    validation.validate(tree)
    try:
        content = identities.content_hashes(tree)
    except ConfigError:
        raise
    except ValueError as error:  # a list of images that cannot be read
        raise ConfigError(str(error)) from error
    # Tuples become lists, as in JSON, so that it equals an identity read from a file.
    identity = json.loads(json.dumps(identities.run_identity(tree, content)))

    weighting = without(tree["loss_weighting"], ["name"])
    teacher = TeacherSpec(
        **without(tree["teacher"], ["train"]),
        train=Recipe(**tree["teacher"]["train"]),
        kind=identities.teacher_kind(tree["teacher"]["checkpoint"], content["teacher"]),
    )
    return RunSpec(
        config=recorded_config | {"data": recorded_config["data"] | {"dir": ""}},
        content=content,
        identity=identity,
        teacher_identity=identities.teacher_identity(tree, identity),
        seed=tree["seed"],
        teacher_seed=tree["teacher_seed"],
        data=DatasetSpec(
            **without(tree["data"], ["num_workers"]),
            split_seed=tree["split_seed"],
            group_fractions=tree["groups"]["fractions"],
        ),
        augment=augment.Extra(**tree["augment"]),
        method=_method_spec(tree["method"]),
        # Static weights have no key but their name.
        loss_weighting=LearnedWeights(**weighting) if weighting else None,
        student_model=tree["student"]["model"],
        train=Recipe(**tree["train"]),
        teacher=teacher,
        execution=Execution(
            precision=tree["precision"],
            devices=tree["devices"],
            parallel=tree["parallel"],
            steps_per_call=tree["steps_per_call"],
            eval_batch_size=tree["eval_batch_size"],
            num_workers=tree["data"]["num_workers"],
        ),
        eval_every=tree["eval_every"],
        checkpoint_every=tree["checkpoint_every"],
    )


def _method_spec(section: dict) -> MethodSpec:
    hyperparameters = without(section, ["name", "warmup_epochs"])
    return MethodSpec(
        name=section["name"],
        values=tuple(sorted(hyperparameters.items())),
        warmup_epochs=section.get("warmup_epochs", 0.0),
    )


def method_label(config: Mapping) -> str:
    """Returns the name of a config's method in tables; with learned weights it is BiKD.

    >>> weighting = {"name": "bilevel"}
    >>> method_label({"method": {"name": "ltkd"}, "loss_weighting": weighting})
    'bikd over ltkd'
    """
    name = config["method"]["name"]
    if config["loss_weighting"]["name"] != "bilevel":
        return name
    return "bikd" if name == "kd" else f"bikd over {name}"


def _check_keys(tree: dict) -> None:
    """Raises ConfigError unless the keys and types are those of configs/common.py."""
    config = common.base("", teacher="", student="", imbalance=1.0)
    defaults = flatten(config.to_dict())
    # The keys of these sections depend on the name of the method or the weighting, and
    # are checked where those are.
    open_sections = ("method", "loss_weighting")
    prefixes = tuple(f"{section}." for section in open_sections)
    keys = set(flatten(tree))
    for key in sorted(keys - set(defaults)):
        check_key(key)
        if not key.startswith(prefixes):
            hint = names.suggestion(key, defaults)
            raise ConfigError(f"the config has an unknown key {key!r}{hint}")
    required = {key for key in defaults if not key.startswith(prefixes)}
    missing = sorted(required - keys)
    for section in open_sections:
        if f"{section}.name" not in keys:
            missing.append(f"{section}.name")
    if missing:
        raise ConfigError(
            f"the config lacks the key {missing[0]!r}: configs/common.py has all keys "
            "and defaults"
        )
    _check_types(flatten(tree), defaults)


def _check_types(values: dict, defaults: dict) -> None:
    """Raises ConfigError for a value whose type differs from its default's.

    A ConfigDict refuses such values itself; a plain dictionary does not.
    """
    weighting = {f"loss_weighting.{key}": x for key, x in common.bilevel().items()}
    defaults = defaults | weighting | {"method.num_groups": 0, "method.mass": ""}
    for key, value in values.items():
        # All other hyperparameters of methods are floats.
        expected = type(defaults.get(key, 0.0))
        if type(value) is not expected:
            raise ConfigError(
                f"config.{key}={value!r} must be of type {expected.__name__}"
            )


def _with_home(tree: dict) -> dict:
    """Returns the config with the home directory in place of ~ in its paths."""
    sections = {name: dict(tree[name]) for name in ("data", "teacher")}
    for path in _PATH_KEYS:
        name, key = path.split(".")
        try:
            sections[name][key] = files.expand_user(sections[name][key])
        except FileNotFoundError as error:
            raise ConfigError(f"config.{path}: {error}") from None
    return tree | sections


def _with_tuples(value: Any) -> Any:
    """Returns nested mappings as dicts and sequences as tuples.

    JSON has lists for tuples, but the specification must be hashable.
    """
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_with_tuples(item) for item in value)
    return value
