"""The frozen specification of a run: a config is resolved once, here, and below nothing takes a config.

The parts that a compiled training depends on are hashable, so that runs which differ in their seeds share it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import ml_collections

from configs import common
from experiments.config import identity as identities
from experiments.config import validation
from experiments.config.names import check_key
from experiments.config.trees import flatten, without
from experiments.config.validation import ConfigError
from ltkd_jax import methods, names
from ltkd_jax.data import augment
from ltkd_jax.groups import ClassGroups


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is drawn of which data set; see `data` in configs/common.py."""

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
    """SGD and its schedule; see `recipe` in configs/common.py."""

    batch_size: int
    epochs: float
    max_steps: int
    lr: float
    momentum: float
    weight_decay: float
    milestones: tuple[float, ...]
    lr_decay: float

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the steps of the whole run."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps or steps)


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method of `ltkd_jax.methods` with its hyperparameters, as (name, value) pairs."""

    name: str
    values: tuple[tuple[str, float], ...] = ()
    warmup_epochs: float = 0.0

    @property
    def hyperparameters(self) -> dict[str, float]:
        return dict(self.values)

    @property
    def needs_teacher(self) -> bool:
        return methods.METHODS[self.name].needs_teacher

    @property
    def needs_features(self) -> bool:
        return methods.METHODS[self.name].needs_features

    def objective(
        self, class_counts, groups: ClassGroups, steps_per_epoch: int
    ) -> methods.Objective:
        """Returns the terms and their weights for a training set."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return methods.create(
            self.name,
            class_counts,
            groups,
            warmup_steps=warmup_steps,
            **self.hyperparameters,
        )


@dataclasses.dataclass(frozen=True)
class LearnedWeights:
    """How a weight net learns the weights of the terms; see `bilevel` in configs/common.py."""

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
        return self.outer_loss != "hard"


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a training is executed, not what it computes (but for the precision)."""

    precision: str
    devices: int
    parallel: str
    steps_per_call: int
    eval_batch_size: int
    num_workers: int


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """One network's training, seed apart: equal ones share their compiled functions.

    Attributes:
      teacher_source: where the teacher's outputs come from: "none", "table" (looked up), "network" (in the step) or
        "features" (in the step, with its features).
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
    """The teacher and where it comes from; see `teacher` in configs/common.py."""

    model: str
    train: Recipe
    dir: str
    checkpoint: str
    table: str
    table_memory: float
    table_runs: int

    @property
    def kind(self) -> str:
        """Where it comes from: "trained" here, a "folder", a file of "variables" or of "logits"."""
        return identities.teacher_kind(self.checkpoint)


@dataclasses.dataclass(frozen=True, eq=False)
class RunSpec:
    """A run: a student, and the teacher that it needs.

    Attributes:
      config: the whole config, nested, for `results.json`; but for `data.dir`, which is of one machine.
      content: hashes of the files that it names, see `identity.content_of`.
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
        return identities.hash_of(self.identity)

    @functools.cached_property
    def teacher_hash(self) -> str:
        return identities.hash_of(self.teacher_identity)

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return method_label(self.config)

    @property
    def name(self) -> str:
        """The run's folder: <data>-<imbalance>-<method>-<teacher>-<student>-s<seed>, and -smoke for a smoke run.

        Of a set that was not drawn by imbalance, "all" or the list's name stands in its place.
        """
        data = self.data
        drawn = (
            f"{data.imbalance:g}"
            if data.subset == "exponential"
            else pathlib.Path(data.subset).stem
        )
        is_file = self.teacher.kind in ("variables", "logits")
        teacher = (
            pathlib.Path(self.teacher.checkpoint).stem
            if is_file
            else self.teacher.model
        )
        method = self.label.replace(" over ", "-")
        name = (
            f"{data.name}-{drawn}-{method}-{teacher}-{self.student_model}-s{self.seed}"
        )
        return f"{name}-smoke" if self.config["smoke"] else name

    @property
    def needs_teacher(self) -> bool:
        return self.method.needs_teacher

    @property
    def outer_loss_needs_teacher(self) -> bool:
        return (
            self.loss_weighting is not None
            and self.loss_weighting.outer_loss_needs_teacher
        )

    @property
    def can_use_table(self) -> bool:
        """Whether the teacher's logits can be looked up in a table of all views."""
        return self.needs_teacher and validation.no_table(self.config) is None

    def student_training(self, teacher_source: str) -> TrainingSpec:
        """Returns the student's training, with a `TrainingSpec.teacher_source`."""
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
        """Returns the teacher's: plain cross-entropy on the same long-tailed data."""
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
      config: from a config file, or the `config` of a `results.json` (with a `data.dir` of this machine).

    Raises:
      ConfigError: naming the key, its value and the remedy.
    """
    tree = _with_tuples(
        config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    )
    _check_keys(tree)
    validation.validate(tree)
    try:
        content = identities.content_of(tree)
    except ConfigError:
        raise
    except ValueError as error:  # a list of images that cannot be read
        raise ConfigError(str(error)) from error
    # As JSON has it, so that it equals what was read from a file.
    identity = json.loads(json.dumps(identities.identity_of(tree, content)))
    data = without(tree["data"], ["num_workers"])
    method = dict(tree["method"])
    weighting = without(tree["loss_weighting"], ["name"])
    teacher = tree["teacher"]
    execution_keys = [
        field.name
        for field in dataclasses.fields(Execution)
        if field.name != "num_workers"
    ]
    return RunSpec(
        config=tree | {"data": tree["data"] | {"dir": ""}},
        content=content,
        identity=identity,
        teacher_identity=identities.teacher_identity(tree, identity),
        seed=tree["seed"],
        teacher_seed=tree["teacher_seed"],
        data=DatasetSpec(
            **data,
            split_seed=tree["split_seed"],
            group_fractions=tree["groups"]["fractions"],
        ),
        augment=augment.Extra(**tree["augment"]),
        method=MethodSpec(
            name=method.pop("name"),
            warmup_epochs=method.pop("warmup_epochs", 0.0),
            values=tuple(sorted(method.items())),
        ),
        loss_weighting=LearnedWeights(**weighting) if weighting else None,
        student_model=tree["student"]["model"],
        train=Recipe(**tree["train"]),
        teacher=TeacherSpec(**{**teacher, "train": Recipe(**teacher["train"])}),
        execution=Execution(
            **{key: tree[key] for key in execution_keys},
            num_workers=tree["data"]["num_workers"],
        ),
        eval_every=tree["eval_every"],
        checkpoint_every=tree["checkpoint_every"],
    )


def method_label(config: Mapping) -> str:
    """Returns the name of a config's method; terms whose weights are learned are named after BiKD.

    >>> method_label({"method": {"name": "ltkd"}, "loss_weighting": {"name": "bilevel"}})
    'bikd over ltkd'
    """
    name = config["method"]["name"]
    if config["loss_weighting"]["name"] != "bilevel":
        return name
    return "bikd" if name == "kd" else f"bikd over {name}"


def _check_keys(tree):
    """Refuses a config that lacks a key of configs/common.py, or has another, such as one of an older version."""
    expected = flatten(common.base("", teacher="", student="", imbalance=1.0).to_dict())
    by_name = (
        "method.",
        "loss_weighting.",
    )  # their keys depend on the name of the method or weighting
    keys = set(flatten(tree))
    for key in sorted(keys - set(expected)):
        check_key(key)
        if not key.startswith(by_name):
            raise ConfigError(
                f"the config has an unknown key {key!r}{names.suggestion(key, expected)}"
            )
    missing = sorted(key for key in set(expected) - keys if not key.startswith(by_name))
    missing += [
        f"{section}.name"
        for section in ("method", "loss_weighting")
        if f"{section}.name" not in keys
    ]
    if missing:
        raise ConfigError(
            f"the config lacks the key {missing[0]!r}: configs/common.py has all keys and defaults"
        )
    _check_types(flatten(tree), expected)


def _check_types(values, defaults):
    """Refuses values that are not of their default's type, which no config file but a dictionary can hold."""
    of_learned_weights = {
        f"loss_weighting.{key}": value for key, value in common.bilevel().items()
    }
    defaults = defaults | of_learned_weights | {"method.num_groups": 0}
    for key, value in values.items():
        expected = type(
            defaults.get(key, 0.0)
        )  # the other hyperparameters of methods are floats
        if type(value) is not expected:
            raise ConfigError(
                f"config.{key}={value!r} must be of type {expected.__name__}"
            )


def _with_tuples(value):
    """Returns nested mappings as dicts and sequences as tuples, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return (
        tuple(_with_tuples(item) for item in value)
        if isinstance(value, (list, tuple))
        else value
    )
