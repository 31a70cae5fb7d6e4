"""Configs and their checks, the identity of a result, the rule for the teacher's table."""

import importlib
import time

import pytest
from small import config_of

from experiments import build, checks
from ltkd_jax import objectives

CONFIGS = ("digits_lt", "cifar100lt")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", sorted(objectives.METHODS))
def test_every_config_takes_every_method(name, method):
    config = config_of(name, f"{method},imbalance=20,seed=3,teacher=resnet14,train.lr=0.1")
    checks.validate(config)
    assert (config.method.name, config.data.imbalance, config.seed) == (method, 20.0, 3)
    assert (config.teacher.model, config.train.lr) == ("resnet14", 0.1)
    checks.validate(config_of(name, f"{method},smoke"))
    assert f"configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__


@pytest.mark.parametrize(
    "argument, message",
    [
        ("ltkx", "unknown method 'ltkx'; did you mean 'ltkd'"),
        ("kd,dkd", "several methods"),
        ("kd,imbalanc=3", "did you mean 'imbalance'"),
        ("kd,alpha=3", "unknown key 'alpha'"),
        ("kd,imbalance=many", "imbalance='many' must be of type float"),
        ("kd,seed=1.5", "must be of type int"),
        ("kd,train.batch=3", "unknown key 'train.batch'"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        config_of("digits_lt", argument)


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.imbalance", 0.5), ("train.batch_size", 0), ("train.batch_size", 13), ("train.lr", 0.0),
        ("train.epochs", -1.0), ("teacher.train.momentum", 1.0), ("train.milestones", (0.5, 2.0)),
        ("precision", "float16"), ("parallel", "ddp"),
        ("teacher.table", "maybe"), ("teacher.table_memory", 2.0), ("eval_every", 0), ("seed", -1),
        ("seed_split", 2**31),
        ("data.n_max", -1), ("train.epochs", float("inf")), ("train.milestones", (0.5, "x")),
        ("student.model", "resnet9"), ("teacher.model", "vgg13"), ("method.temperature", 0.0),
        ("method.name", "kdd"), ("method.name", "kd"), ("method.warmup_epochs", -1.0),
    ],
)  # fmt: skip
def test_bad_values_are_named(key, value):
    config = config_of("digits_lt")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(checks.ConfigError) as caught:
        checks.validate(config)
    # A model or a method is named by its value; every other error names its key too.
    assert str(value) in str(caught.value)
    assert key.endswith((".model", ".name")) or key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.name": "cifar1000"}, "cifar1000"),
        (
            {"data.name": "cifar100", "data.dir": "/nowhere"},
            "python -m ltkd_jax.data.prepare cifar100 --data_dir /nowhere",
        ),
        ({"data.imbalance": 500.0}, "imbalance"),
        ({"data.n_max": 100_000}, "n_max"),
        ({"data.validation_per_class": 500}, "validation_per_class"),
        ({"groups.fractions": (1 / 11,) * 11}, "11 groups for 10 classes"),
        ({"groups.fractions": (0.5, 0.1)}, "sum to 1"),
    ],
)
def test_bad_data_is_told_within_a_second(values, message):
    config = config_of("digits_lt")
    build.dataset(config)  # the digits themselves are loaded once
    importlib.import_module("tensorflow_datasets")
    config.update_from_flattened_dict(values)
    start = time.monotonic()
    with pytest.raises(checks.ConfigError, match=message.replace("(", "\\(")):
        build.dataset(config)
    assert time.monotonic() - start < 1


def test_the_identity_of_a_result():
    """What is computed is in the hash, how it is carried out is not; a teacher does not depend on the student."""
    base, teacher = checks.config_hash(config_of("digits_lt")), checks.teacher_hash(config_of("digits_lt"))
    for key, value, same, same_teacher in [
        ("seed", 1, False, True), ("train.lr", 0.1, False, True), ("method.alpha", 2.0, False, True),
        ("student.model", "resnet14", False, True), ("seed_teacher", 1, False, False), ("seed_split", 1, False, False),
        ("teacher.train.lr", 0.1, False, False), ("data.imbalance", 10.0, False, False),
        ("precision", "tf32", False, False),
        ("data.dir", "x", True, True), ("teacher.table", "never", True, True), ("parallel", "pmap", True, True),
        ("checkpoint_every", 3, True, True), ("teacher.table_runs", 9, True, True), ("teacher.cache", "x", True, True),
    ]:  # fmt: skip
        config = config_of("digits_lt")
        config.update_from_flattened_dict({key: value})
        assert (checks.config_hash(config) == base) is same, key
        assert (checks.teacher_hash(config) == teacher) is same_teacher, key
    assert len({checks.teacher_hash(config_of("digits_lt", m)) for m in objectives.METHODS}) == 1


def test_the_rule_for_the_table():
    """auto: views <= epochs × runs, and it fits."""
    config = config_of("digits_lt", "kd")
    data = build.dataset(config)
    assert data.source.views.num == 9 and build.wants_table(config, data)
    config.train.epochs = 4.0
    assert not build.wants_table(config, data)
    config.teacher.table_runs = 3
    assert build.wants_table(config, data)
    config.train.max_steps = 1
    assert not build.wants_table(config, data)
    config.train.max_steps, config.teacher.table_memory = 0, 1e-9
    assert not build.wants_table(config, data)
    for choice, answer in (("always", True), ("never", False)):
        config.teacher.table = choice
        assert build.wants_table(config, data) is answer
