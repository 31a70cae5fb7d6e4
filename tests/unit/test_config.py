"""Configs: argument, validation, renamed keys, identities and the choice of a table."""

import copy
import dataclasses
import importlib
import json
import re
import sys

import numpy as np
import pytest
from helpers.small_runs import ROOT, changed, config_of, tiny

from configs import common
from experiments.config import identity, load, names, validation
from experiments.config.spec import resolve
from experiments.config.trees import flatten, without
from experiments.config.validation import ConfigError
from experiments.jobs.queue_entry import QueueEntry
from experiments.trainer import dataset, teacher
from ltkd_jax import methods, models
from ltkd_jax.data import longtail
from ltkd_jax.groups import DEFAULT_FRACTIONS

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*lt.py"))


def config_with_data(name, argument):
    """Returns a config; those for custom data sets get the name of one."""
    if name in ("folderlt", "featureslt"):
        argument = f"{argument},name=birds,subset=exponential"
    return config_of(name, argument)


def is_json(tree):
    return json.loads(json.dumps(tree)) == tree


@pytest.mark.parametrize("name", CONFIGS)
def test_config_of_every_method(name):
    assert f"configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__
    for method in methods.METHODS:
        argument = f"{method},imbalance=20,seed=3,teacher=resnet14,train.lr=0.1"
        spec = resolve(config_with_data(name, argument))
        assert spec.method.name == spec.label == method
        assert (spec.data.imbalance, spec.seed) == (20.0, 3)
        assert (spec.teacher.model, spec.train.lr) == ("resnet14", 0.1)
        assert spec.loss_weighting is None
        assert spec.name.endswith("-s3") and is_json(spec.identity)
        smoke = resolve(config_with_data(name, f"{method},smoke"))
        assert smoke.train.max_steps == smoke.teacher.train.max_steps == 20
        assert smoke.name.endswith("-smoke")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_of_learned_weights(name):
    for terms in ("kd", "ltkd", "dkd"):
        argument = f"bikd,terms={terms},seed=3,lookahead=2,update_every=4"
        config = config_with_data(name, argument)
        # There are no keys that the run does not use.
        keys = {"name", "temperature"} | (
            {"num_groups", "mass"} if terms == "ltkd" else set()
        )
        assert set(config.method) == keys
        spec = resolve(config)
        assert (spec.method.name, spec.seed) == (terms, 3)
        assert spec.loss_weighting.lookahead == 2
        assert spec.loss_weighting.update_every == 4
        assert spec.label == ("bikd" if terms == "kd" else f"bikd over {terms}")


@pytest.mark.parametrize(
    "name, n_max, outer_per_class, update_every, outer_loss, hidden",
    [
        ("cifar100lt", 490, 10, 5, "hard", (64, 64)),
        ("cifar10lt", 4900, 100, 1, "mix", (64,)),
    ],
)
def test_bikd_recipe(name, n_max, outer_per_class, update_every, outer_loss, hidden):
    spec = resolve(config_of(name, "bikd"))
    assert (spec.data.n_max, spec.data.outer_per_class) == (n_max, outer_per_class)
    weighting = spec.loss_weighting
    assert weighting.update_every == update_every
    assert weighting.outer_loss == outer_loss
    assert weighting.hidden == hidden
    assert weighting.features == ("student_ce", "teacher_ce")
    assert weighting.lookahead == 1
    assert (weighting.lr, weighting.lr_decay) == (1e-3, 0.8)
    assert weighting.weight_decay == 1e-4
    for recipe in (spec.train, spec.teacher.train):
        assert (recipe.epochs, recipe.batch_size) == (120.0, 100)
        assert (recipe.lr, recipe.lr_decay) == (0.1, 0.1)
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
        assert [round(120 * milestone) for milestone in recipe.milestones] == [80, 100]
    assert spec.method.hyperparameters["temperature"] == 4.0


def test_recipe_of_a_baseline():
    """With recipe=bikd it has BiKD's data and teacher, without it LTKD's recipe."""
    kd = resolve(config_of("cifar100lt", "kd,recipe=bikd"))
    bikd = resolve(config_of("cifar100lt", "bikd"))
    assert kd.data == bikd.data and kd.train == bikd.train
    assert kd.teacher_hash == bikd.teacher_hash
    # The paper's number of images.
    assert longtail.counts(490, bikd.data.imbalance, 100).sum() == 10_626
    cifar100_recipe = config_of("cifar100lt", "kd").train
    assert cifar100_recipe.epochs == 240.0
    assert config_of("cifar10lt", "kd").data == config_of("cifar10lt", "bikd").data
    assert config_of("cifar10lt", "kd,recipe=base").train == cifar100_recipe


@pytest.mark.parametrize(
    "argument, message",
    [
        ("bikdd", "'bikd'"),
        ("bikd,terms=kdd", "'kdd'.*'kd'"),
        ("bikd,terms=bikd", "'bikd'.*'bkd'"),
        ("bikd,alpha=2", "'alpha' is a static weight"),
        ("kd,recipe=ltkd", "recipe='ltkd'"),
        ("kd,update_every=2", "unknown key 'update_every'"),
        ("kd,terms=ltkd", "unknown key 'terms'"),
        ("bikd,update_every=2.5", "update_every='2.5' .*int"),
        ("ltkx", "'ltkx'.*'ltkd'"),
        ("kd,dkd", "several methods"),
        ("kd,imbalanc=3", "'imbalance'"),
        ("kd,alpha=3", "unknown key 'alpha'"),
        ("kd,imbalance=many", "imbalance='many' .*float"),
        ("kd,seed=1.5", "seed='1.5' .*int"),
        ("kd,train.batch=3", "unknown key 'train.batch'"),
        ("kd,temperature=2,temperature=9", "'temperature' twice"),
        ("kd,epochs=2,train.epochs=9", "'train.epochs' twice"),
        ("kd,subset=all,imbalance=5", "imbalance=5 .*subset='all'"),
        # Names of version 0.1.
        ("bikd,every=2", "'every' .*'update_every'"),
        ("bikd,outer=mix", "'outer' .*'outer_loss'"),
        ("logit_adjusted,strength=2", "'strength' .*'tau'"),
        ("kd,seed_split=1", "'seed_split' .*'split_seed'"),
        ("bikd,weighting.hidden=(8,)", "'weighting.hidden' .*'loss_weighting.hidden'"),
    ],
)
def test_bad_argument(argument, message):
    with pytest.raises(ValueError, match=message):
        config_of("digitslt", argument)


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.imbalance", 0.5),
        ("data.n_max", -1),
        ("data.num_workers", -1),
        ("data.image_size", 4),
        ("data.subset", "none.txt"),
        ("data.name", ""),
        ("augment.policy", "randaugment"),
        ("augment.mixup", -0.2),
        ("train.batch_size", 0),
        ("train.lr", 0.0),
        ("train.lr_warmup_epochs", -1.0),
        ("train.epochs", -1.0),
        ("train.epochs", float("inf")),
        ("train.milestones", (0.5, 2.0)),
        ("train.milestones", (0.5, "x")),
        ("teacher.train.momentum", 1.0),
        ("teacher.train.lr_decay", 0.0),
        ("teacher.table", "maybe"),
        ("teacher.table_memory", 2.0),
        ("precision", "float16"),
        ("parallel", "ddp"),
        ("platform", "cuda"),
        ("eval_every", 0),
        ("eval_batch_size", 0),
        ("seed", -1),
        ("split_seed", 2**31),
        ("student.model", "resnet9"),
        ("teacher.model", "vgg12"),
        ("method.temperature", 0.0),
        ("method.name", "kdd"),
        ("method.name", "kd"),
        ("method.mass", "epoch"),
        ("method.warmup_epochs", -1.0),
    ],
)
def test_bad_value(key, value):
    with pytest.raises(ConfigError) as error:
        resolve(changed(config_of("digitslt"), **{key: value}))
    message = str(error.value)
    assert str(value) in message
    # Errors about models and methods need not name the key.
    assert key.endswith((".model", ".name")) or key.split(".")[-1] in message


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lookahead", 0, "at least 1"),
        ("update_every", 0, "at least 1"),
        ("outer_loss", "harder", "hard, soft, mix"),
        (
            "features",
            ("student_ce", "inter"),
            "'inter'.* student_ce, teacher_ce, ce",
        ),
        ("features", (), "at least one"),
        ("features", ("ce", "ce"), "once"),
        ("hidden", (64, 0), "positive whole numbers"),
        ("hidden", (True,), "positive whole numbers"),
        ("scales", (1.0, 2.0, 3.0), "ce, kd"),
        ("scales", ("a", "b"), "positive numbers"),
        ("scales", (0.0, 1.0), "positive numbers"),
        ("lr", 0.0, "positive"),
        ("weight_decay", -1.0, "not be negative"),
        ("lr_decay", float("nan"), "must be"),
        ("name", "learned", "static, bilevel"),
        ("name", "static", ":bikd"),
    ],
)
def test_bad_learned_weights(key, value, message):
    config = config_of("digitslt", "bikd")
    with pytest.raises(ConfigError, match=message) as error:
        resolve(changed(config, **{f"loss_weighting.{key}": value}))
    assert "loss_weighting" in str(error.value)


@pytest.mark.parametrize(
    "argument, values, message",
    [
        ("kd", {"loss_weighting.name": "bilevel"}, ":bikd,terms=METHOD"),
        ("bikd", {"data.outer_per_class": 0}, "data.outer_per_class=0"),
        ("ltkd", {"augment.cutout": 3, "teacher.table": "always"}, "'always'.*views"),
        ("reviewkd", {"teacher.table": "always"}, "'always'.*features"),
        ("ltkd", {"augment.policy": "autoaugment"}, "policy='autoaugment'"),
        (
            "ltkd",
            {"data.stream": True, "data.image_size": 8},
            "data.stream=True .*digits",
        ),
        ("ltkd", {"data.stream": True, "data.name": "birds"}, "data.image_size=0"),
        (
            "kd",
            {"teacher.checkpoint": "x.npz", "teacher.table": "never"},
            "x.npz.*'never'",
        ),
    ],
)
def test_conflicting_values(argument, values, message):
    with pytest.raises(ConfigError, match=message):
        resolve(changed(config_of("digitslt", argument), **values))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"platform": "gpu"}, "platform='gpu' .*8 × cpu"),
        ({"devices": 9}, "devices=9 .* 8 "),
        (
            {"train.batch_size": 20},
            "train.batch_size=20 .* 8 devices.*config.devices=5",
        ),
        ({"teacher.train.batch_size": 20}, "teacher.train.batch_size=20 .* 8 devices"),
        ({"train.batch_size": 20, "devices": 6}, " 6 devices.*config.devices=5"),
    ],
)
def test_bad_devices(tmp_path, values, message):
    """Only the run fails: the config itself can be resolved on any machine."""
    spec = resolve(tiny(tmp_path, "ce", **values))
    with pytest.raises(ConfigError, match=message):
        validation.validate_devices(spec.config)


@pytest.mark.parametrize(
    "removed, added, message",
    [
        ("split_seed", {"seed_split": 0}, "'seed_split' .*'split_seed'"),
        ("train", {"train.decay": 0.1}, "'train.decay' .*'train.lr_decay'"),
        (
            "loss_weighting",
            {"weighting.name": "static"},
            "'weighting.name' .*'loss_weighting.name'",
        ),
        ("train.lr", {"train.ls": 0.1}, "'train.ls'.*'train.lr'"),
        ("data.n_max", {}, "lacks .*'data.n_max'"),
        ("method.name", {}, "lacks .*'method.name'"),
        ("seed", {"seed": "x"}, "seed='x' .*int"),
        ("train.lr", {"train.lr": None}, "train.lr=None .*float"),
        ("method.alpha", {"method.alpha": "1"}, "method.alpha='1' .*float"),
        ("train", {"train": 3}, "'train'"),
    ],
)
def test_bad_keys_and_types(removed, added, message):
    """In a dictionary written by hand, or by version 0.1."""
    tree = without(config_of("digitslt").to_dict(), [removed])
    for path, value in added.items():
        *sections, leaf = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_renamed_keys():
    """The new names are keys of a config, or short for one."""
    keys = {"tau", "loss_weighting", *common.SHORT}
    for method in ("bikd", "logit_adjusted"):
        keys |= set(flatten(config_of("digitslt", method).to_dict()))
    for old, new in common.RENAMED.items():
        assert new in keys and common.new_name(new) is None
        with pytest.raises(ConfigError, match=f"'{old}' .*'{new}'"):
            names.check_key(old)


@pytest.mark.parametrize(
    "key, value, same_result, same_teacher",
    [
        ("seed", 1, False, True),
        ("train.lr", 0.1, False, True),
        ("method.alpha", 2.0, False, True),
        ("method.mass", "dataset", False, True),
        ("method.mass", "batch", True, True),
        ("student.model", "resnet14", False, True),
        ("teacher_seed", 1, False, False),
        ("split_seed", 1, False, False),
        ("teacher.train.lr", 0.1, False, False),
        ("train.lr_warmup_epochs", 5.0, False, True),
        ("data.imbalance", 20.0, False, False),
        ("precision", "tf32", False, False),
        ("data.dir", "x", True, True),
        ("teacher.table", "never", True, True),
        ("parallel", "pmap", True, True),
        ("checkpoint_every", 3, True, True),
        ("teacher.table_runs", 9, True, True),
        ("teacher.dir", "x", True, True),
    ],
)
def test_identity(key, value, same_result, same_teacher):
    """It has what is computed, not how; a teacher's has nothing of the student."""
    spec = resolve(config_of("digitslt"))
    other = resolve(changed(config_of("digitslt"), **{key: value}))
    assert (other.hash == spec.hash) is same_result
    assert (other.teacher_hash == spec.teacher_hash) is same_teacher


def test_methods_share_their_teacher():
    hashes = set()
    for method in methods.METHODS:
        hashes.add(resolve(config_of("digitslt", method)).teacher_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "argument", ["ltkd", "bikd,terms=dkd,loss_weighting.scales=(1.0,2.0,3.0)"]
)
def test_recorded_config_resolves_to_the_same_run(argument, tmp_path):
    spec = resolve(tiny(tmp_path, argument, **{"data.dir": str(tmp_path)}))
    results = json.loads(json.dumps({"config": spec.config, "content": spec.content}))
    assert results["config"]["data"]["dir"] == ""
    again = resolve(results["config"])
    for field in dataclasses.fields(spec):
        if field.name != "data":
            assert getattr(again, field.name) == getattr(spec, field.name), field.name
    assert (
        identity.hash_tree(identity.recorded_identity(results))
        == again.hash
        == spec.hash
    )


def test_identity_without_unused_options():
    """Results stay valid if the program gets a new option."""
    static = resolve(config_of("digitslt", "kd,imbalance=50"))
    assert "loss_weighting" not in static.identity and "augment" not in static.identity
    assert "loss_weighting" in resolve(config_of("digitslt", "bikd")).identity
    assert static.hash == "0e68e06baf35"
    # As an older version recorded it.
    config = copy.deepcopy(static.config)
    del config["train"]["lr_warmup_epochs"]
    assert resolve(config).hash == static.hash
    ltkd = resolve(config_of("digitslt", "ltkd"))
    config = copy.deepcopy(ltkd.config)
    del config["method"]["mass"]
    assert resolve(config).hash == ltkd.hash
    assert "mass" not in ltkd.identity["method"]


def test_teacher_hash_and_held_out_images():
    """They make another teacher only if they change its training images."""

    def teacher_hash(**values):
        return resolve(changed(config_of("digitslt", "kd"), **values)).teacher_hash

    assert config_of("digitslt").data.n_max == 100
    assert teacher_hash() == teacher_hash(**{"data.outer_per_class": 8})
    assert teacher_hash() == teacher_hash(**{"data.validation_per_class": 3})
    for values in ({"data.n_max": 0}, {"data.subset": "all"}):
        with_outer_set = {**values, "data.outer_per_class": 8}
        assert teacher_hash(**values) != teacher_hash(**with_outer_set)
    kd = dataset.load(resolve(config_of("digitslt", "kd")).data)
    bikd = dataset.load(resolve(config_of("digitslt", "bikd")).data)
    np.testing.assert_array_equal(bikd.train.keys, kd.train.keys)


@pytest.mark.parametrize(
    "argument, values, source",
    [
        ("ce", {}, "none"),
        ("reviewkd", {}, "features"),
        ("bikd", {}, "table"),
        ("kd", {}, "table"),
        ("kd", {"train.epochs": 4.0}, "network"),
        ("kd", {"train.epochs": 4.0, "teacher.table_runs": 3}, "table"),
        ("kd", {"train.max_steps": 1, "teacher.table_runs": 3}, "network"),
        ("kd", {"teacher.table_memory": 1e-9}, "network"),
        ("kd", {"teacher.table_memory": 1e-9, "teacher.table": "always"}, "table"),
        ("kd", {"teacher.table": "never"}, "network"),
        ("kd", {"augment.cutout": 2}, "network"),
    ],
)
def test_choose_source(argument, values, source):
    """A table is used if views <= epochs × runs, and if it fits into memory."""
    spec = resolve(changed(config_of("digitslt", argument), **values))
    data = dataset.load(spec.data)
    assert data.source.views.num == 9
    assert teacher.choose_source(spec, data) == source


def test_groups_of_two_classes():
    """By default they are head and tail, by their counts."""
    groups = dataset.group_classes([3, 5], DEFAULT_FRACTIONS)
    assert groups.names == ("head", "tail")
    assert groups.assignment.tolist() == [1, 0]
    for fractions in ((0.2, 0.3, 0.5), (0.25,) * 4):
        with pytest.raises(ValueError, match="fractions=.* of 2 classes"):
            dataset.group_classes([3, 5], fractions)
    groups = dataset.group_classes([3, 5, 4], DEFAULT_FRACTIONS)
    assert groups.names == ("head", "medium", "tail")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.imbalance": 500.0}, "imbalance"),
        ({"data.n_max": 100_000}, "n_max"),
        (
            {"data.validation_per_class": 500},
            "config.data: .*validation_per_class=500: class 0 .*class 0 is '0'",
        ),
        ({"groups.fractions": (1 / 11,) * 11}, "groups.fractions.* 11 .*10 classes"),
        ({"groups.fractions": (0.5, 0.1)}, "groups.fractions.* sum"),
        ({"groups.fractions": (0.01, 0.99)}, "groups.fractions.* would be empty"),
        ({"data.image_size": 8}, "digits"),
    ],
)
def test_impossible_draws(values, message):
    with pytest.raises(ConfigError, match=message):
        dataset.load(resolve(changed(config_of("digitslt"), **values)).data)


@pytest.mark.parametrize("last_size, expected", [(20, False), (15, True), (0, True)])
def test_warning_of_a_test_set_that_is_not_balanced(
    tmp_path, caplog, last_size, expected
):
    labels = np.repeat([0, 1, 2], [24, 24, last_size])
    x = np.arange(len(labels), dtype=float)[:, None]
    values = dict(x=np.eye(3), y=[0, 1, 2], x_test=x * np.ones(3), y_test=labels)
    np.savez(tmp_path / f"points{last_size}.npz", **values)
    config = config_of("featureslt", f"ce,name=points{last_size}")
    spec = resolve(changed(config, **{"data.dir": str(tmp_path)}))
    dataset.load(spec.data)
    warning = f"{last_size} examples of class '2' and 24 of '0'"
    assert (warning in caplog.text) == expected


def test_warning_of_few_images(caplog):
    """It is given once, however often the data are loaded."""
    values = {"data.n_max": 9, "data.imbalance": 4.5}
    for validation_per_class in (0, 2, 2):
        values["data.validation_per_class"] = validation_per_class
        spec = resolve(changed(config_of("digitslt", "ce"), **values))
        dataset.load.cache_clear()
        assert dataset.load(spec.data).class_counts[-1] == 2
        expected = 1 if validation_per_class else 0
        assert caplog.text.count("remain for training") == expected
    message = r"class '7', 2 images .*\(3 of 10 .*validation_per_class=2"
    assert re.search(message, caplog.text)


def test_home_in_paths(monkeypatch, tmp_path):
    """`~` is expanded, and changes no hash and no record of the config."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("a 0\n")
    specs = []
    for home in ("~", str(tmp_path)):
        paths = {
            "data.subset": f"{home}/list.txt",
            "data.dir": f"{home}/data",
            "teacher.dir": f"{home}/teachers",
        }
        specs.append(resolve(changed(config_of("digitslt", "kd"), **paths)))
    short, absolute = specs
    assert short.data == absolute.data
    assert short.teacher == absolute.teacher
    assert short.teacher.dir == str(tmp_path / "teachers")
    assert short.hash == absolute.hash
    assert short.config["teacher"]["dir"] == "~/teachers"


@pytest.mark.parametrize(
    "key", ["data.dir", "data.subset", "teacher.dir", "teacher.checkpoint"]
)
def test_unknown_home_in_paths(key):
    config = changed(config_of("digitslt", "kd"), **{key: "~nobody-here/x"})
    with pytest.raises(ConfigError, match=rf"config.{key}: '~nobody-here/x'.* HOME"):
        resolve(config)


MODULE = """
from flax import linen as nn
from ltkd_jax import methods, models
from ltkd_jax.losses import cross_entropy

@methods.register
def custom_ce(info, *, weight=1.0):
    return (methods.hard_term("ce", cross_entropy, weight),)

class Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.num_classes)(images.reshape((images.shape[0], -1)))

models.register("custom_linear", lambda num_classes, **_: Linear(num_classes))
"""


@pytest.fixture
def custom_module(tmp_path, monkeypatch):
    """Returns the file of a module that registers a method and a model."""
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "custom_module.py"
    path.write_text(MODULE)
    load.import_modules("custom_module")
    yield path
    del sys.modules["custom_module"]


def test_identity_of_custom_code(custom_module):
    """It is part of the identity of what uses it, and of nothing else."""
    builtin = resolve(config_of("digitslt", "kd,imbalance=50"))
    assert builtin.hash == "0e68e06baf35" and "code" not in builtin.content
    spec = resolve(config_of("digitslt", "custom_ce,weight=2,student=custom_linear"))
    assert set(spec.content["code"]) == {"method", "student"}
    assert spec.content["code"]["method"].startswith("custom_module ")
    assert identity.custom_modules(spec.content) == "custom_module"
    assert identity.custom_modules(builtin.content) == ""
    library_teacher = resolve(config_of("digitslt", "ce")).teacher_hash
    assert spec.teacher_hash == library_teacher
    custom_teacher = resolve(config_of("digitslt", "custom_ce,teacher=custom_linear"))
    assert custom_teacher.teacher_hash != library_teacher

    custom_module.write_text(MODULE + "# changed")
    changed = resolve(config_of("digitslt", "custom_ce,weight=2,student=custom_linear"))
    assert changed.hash != spec.hash
    entry = QueueEntry("configs/digitslt.py:custom_ce", {}, seed=0)
    assert "--import=custom_module" in entry.command(entry.resolve())


def test_config_file_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="'configs/digitslt.py': run in the checkout"):
        load.load_config("configs/digitslt.py:ltkd")


def test_modules_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    load.import_modules("")
    with pytest.raises(
        ConfigError, match="--import=absent_module: .*PYTHONPATH.*without .py"
    ):
        load.import_modules("absent_module")
    with pytest.raises(ConfigError, match="broken_module .*ZeroDivisionError"):
        load.import_modules("broken_module")
