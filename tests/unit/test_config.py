"""Configs and their checks, the identity of a result, the rule for the teacher's table."""

import importlib
import time

import jax
import numpy as np
import pytest
from helpers.small_runs import ROOT, config_of

from experiments.config import checks
from experiments.trainer import build, dataset, run
from ltkd_jax import methods
from ltkd_jax.data import augment, datasets, longtail, records, streaming
from ltkd_jax.training import bilevel_steps, steps

CONFIGS = (*("digitslt", "cifar100lt", "cifar10lt", "fashionmnistlt", "tinyimagenetlt", "imagenetlt", "folderlt"),)


def named(name, argument):
    """The argument, with a name for the config that has none of its own."""
    return f"{argument},name=birds,subset=exponential" if name == "folderlt" else argument


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_every_config_takes_every_method(name, method):
    config = config_of(name, named(name, f"{method},imbalance=20,seed=3,teacher=resnet14,train.lr=0.1"))
    checks.validate(config)
    assert (config.method.name, config.data.imbalance, config.seed) == (method, 20.0, 3)
    assert (config.teacher.model, config.train.lr) == ("resnet14", 0.1)
    checks.validate(config_of(name, named(name, f"{method},smoke")))
    assert f"configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("terms", ["kd", "ltkd", "dkd"])
def test_every_config_takes_learned_weights(name, terms):
    config = config_of(name, named(name, f"bikd,terms={terms},seed=3,lookahead=2,every=4"))
    checks.validate(config)
    assert (config.method.name, config.weighting.name, config.seed) == (terms, "bilevel", 3)
    assert (config.weighting.lookahead, config.weighting.every) == (2, 4)
    # Nothing is there that the run would not use.
    assert set(config.method) == {"name", "temperature", *({"num_groups"} if terms == "ltkd" else ())}
    checks.validate(config_of(name, named(name, f"bikd,terms={terms},smoke")))


# Sides as they are stored (0: they differ), classes, channels, training images of a class.
STORED = {
    "digits": (8, 10, 1, 110), "fashion_mnist": (28, 10, 1, 6000), "cifar10": (32, 10, 3, 5000),
    "cifar100": (32, 100, 3, 500), "tiny_imagenet": (64, 200, 3, 500), "imagenet2012": (0, 1000, 3, 30),
    "birds": (0, 12, 3, 40),
}  # fmt: skip
SIZES = dict(zip(CONFIGS, (8, 32, 32, 28, 64, 224, 64)))
# At one run of a teacher: where its epochs outnumber the views.
TABLES = {("digitslt", "ltkd"), ("digitslt", "bikd"), ("cifar100lt", "ltkd"), ("tinyimagenetlt", "ltkd")}
TABLES |= {("folderlt", "ltkd"), ("folderlt", "bikd")}  # of few images


def blank(name, data_dir=None, *, size=0, margin=False):
    """`sources.load`, of black images: in the data set's true form, but for how many there are."""
    stored, classes, channels, per_class = STORED[name]
    side = size or stored
    views = augment.Views(pad=1, flip=False) if name == "digits" else augment.Views(pad=4, flip=True)

    def images(per_class):
        labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
        keys = np.char.add("k", np.arange(len(labels)).astype(str))
        if margin:
            return records.Records((), np.arange(len(labels)), labels, keys, (side, side, channels), "margin")
        return records.Images(np.broadcast_to(np.uint8(0), (len(labels), side, side, channels)), labels, keys)

    names = tuple(map(str, range(classes)))
    return datasets.Source(
        name, images(per_class), images(2), classes, names, (0.5,) * channels, (0.5,) * channels, views
    )


@pytest.fixture
def black(monkeypatch):
    """Every data set is there, and black; nothing made of it is kept."""
    monkeypatch.setattr(datasets, "load", blank)
    for cache in (dataset._load, build._program):
        cache.cache_clear()
    yield
    for cache in (dataset._load, build._program):
        cache.cache_clear()


def shapes_of(program, teacher):
    """The data and the rows of a step, as shapes; `teacher` is what the data holds of one."""
    data, learned = program.data, program.weighting is not None

    def on_device(images):
        if data.streams:
            return steps.TrainData(None, None, teacher)
        return steps.TrainData(array(images.images.shape, np.uint8), array(images.labels.shape, np.int32), teacher)

    train_data = on_device(data.train)
    train_data = bilevel_steps.BilevelData(train_data, on_device(data.meta)) if learned else train_data
    if not data.streams:
        return train_data, next(program.chunks(0, 0))[1]

    def batch(*lead):
        lead = (1, program.recipe.batch_size, *lead)
        return streaming.Streamed(
            array((*lead, *data.image_shape), np.uint8), *(array(lead, d) for d in (np.int32, np.uint32))
        )

    return train_data, bilevel_steps.BilevelRows(batch(1), batch()) if learned else batch()


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("method", ["ltkd", pytest.param("bikd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_built_and_its_step_keeps_its_shapes(name, method, black):
    """At full size, with its own models: the data, and one step of the teacher's and of the student's program."""
    config = config_of(name, named(name, method))
    config.train.batch_size = config.teacher.train.batch_size = 64  # eight devices would not divide BiKD's 100
    data = dataset.load(config)
    assert data.streams is (name == "imagenetlt") and data.image_shape[0] == SIZES[name]
    kind = build.teacher_kind(config, data)
    assert kind == ("table" if (name, method) in TABLES else "network")
    image = array((2, *data.image_shape), np.float32)
    network = build.teacher_model(config, data)
    variables = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
    table = array((len(data.train), data.source.views.num, data.num_classes), np.float32)
    programs = [(build.student_program(config, kind), table if kind == "table" else variables)]
    programs += [(build.teacher_program(config), None)] if method == "ltkd" else []
    for program, teacher in programs:
        state = jax.eval_shape(program.init, 0)
        after = jax.eval_shape(lambda *x, run=program.chunk: run(0, *x), state, *shapes_of(program, teacher))
        assert jax.tree.map(array_of, after) == jax.tree.map(array_of, state)
    assert jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, image).shape == (
        2,
        data.num_classes,
    )


def array_of(x):
    return x.shape, x.dtype


def test_the_papers_recipe():
    for name, n_max, meta, every, outer, hidden, images in (
        ("cifar100lt", 490, 10, 5, "hard", (64, 64), 10_626),
        ("cifar10lt", 4900, 100, 1, "mix", (64,), None),
    ):
        config = config_of(name, "bikd")
        assert (config.data.n_max, config.data.meta_per_class) == (n_max, meta)
        assert (config.weighting.every, config.weighting.outer, config.weighting.hidden) == (every, outer, hidden)
        assert config.weighting.features == ("student_ce", "teacher_ce") and config.weighting.lookahead == 1
        assert (config.weighting.lr, config.weighting.weight_decay, config.weighting.decay) == (1e-3, 1e-4, 0.8)
        for recipe in (config.train, config.teacher.train):
            assert (recipe.epochs, recipe.batch_size, recipe.lr) == (120.0, 100, 0.1)
            assert (recipe.momentum, recipe.weight_decay, recipe.decay) == (0.9, 5e-4, 0.1)
            assert [round(120 * milestone) for milestone in recipe.milestones] == [80, 100]
        assert config.method.temperature == 4.0
        if images:
            assert longtail.counts(n_max, config.data.imbalance, 100).sum() == images
    # A baseline by the same recipe has the same data and the same teacher; without, it is LTKD's recipe.
    kd, bikd = config_of("cifar100lt", "kd,recipe=bikd"), config_of("cifar100lt", "bikd")
    assert kd.data == bikd.data and kd.train == bikd.train and checks.teacher_hash(kd) == checks.teacher_hash(bikd)
    assert config_of("cifar100lt", "kd").train.epochs == 240.0
    assert config_of("cifar10lt", "kd").data == config_of("cifar10lt", "bikd").data
    assert config_of("cifar10lt", "kd,recipe=base").train == config_of("cifar100lt", "kd").train
    assert config_of("cifar10lt", "bikd,weighting.hidden=(8, 8),seed=1").weighting.hidden == (8, 8)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("bikdd", "did you mean 'bikd'"),
        ("bikd,terms=kdd", "unknown method 'kdd'; did you mean 'kd'"),
        ("bikd,terms=bikd", "unknown method 'bikd'; did you mean 'bkd'?.*wsl, reviewkd, ltkd, ltkd_bs$"),
        ("bikd,alpha=2", "'alpha' is a static weight, which bikd learns instead"),
        ("kd,recipe=ltkd", "recipe='ltkd' must be one of base, bikd"),
        ("kd,every=2", "unknown key 'every'"),
        ("kd,terms=ltkd", "unknown key 'terms'"),
        ("bikd,every=2.5", "every='2.5' must be of type int"),
        ("ltkx", "unknown method 'ltkx'; did you mean 'ltkd'"),
        ("kd,dkd", "several methods"),
        ("kd,imbalanc=3", "did you mean 'imbalance'"),
        ("kd,alpha=3", "unknown key 'alpha'"),
        ("kd,imbalance=many", "imbalance='many' must be of type float"),
        ("kd,seed=1.5", "must be of type int"),
        ("kd,train.batch=3", "unknown key 'train.batch'"),
        ("kd,temperature=2,temperature=9", "gives 'temperature' twice"),
        ("kd,epochs=2,train.epochs=9", "gives 'train.epochs' twice"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        config_of("digitslt", argument)


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.imbalance", 0.5), ("train.batch_size", 0), ("train.lr", 0.0),
        ("train.epochs", -1.0), ("teacher.train.momentum", 1.0), ("train.milestones", (0.5, 2.0)),
        ("precision", "float16"), ("parallel", "ddp"),
        ("teacher.table", "maybe"), ("teacher.table_memory", 2.0), ("eval_every", 0), ("seed", -1),
        ("seed_split", 2**31),
        ("data.n_max", -1), ("train.epochs", float("inf")), ("train.milestones", (0.5, "x")),
        ("student.model", "resnet9"), ("teacher.model", "vgg12"), ("method.temperature", 0.0),
        ("method.name", "kdd"), ("method.name", "kd"), ("method.warmup_epochs", -1.0),
    ],
)  # fmt: skip
def test_bad_values_are_named(key, value):
    config = config_of("digitslt")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(checks.ConfigError) as caught:
        checks.validate(config)
    # A model or a method is named by its value; every other error names its key too.
    assert str(value) in str(caught.value)
    assert key.endswith((".model", ".name")) or key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("weighting.lookahead", 0, "must be at least 1"),
        ("weighting.every", 0, "must be at least 1"),
        ("weighting.outer", "harder", "must be one of hard, soft, mix"),
        ("weighting.features", ("student_ce", "inter"), "feature 'inter': these terms have student_ce, teacher_ce, ce"),
        ("weighting.features", (), "at least one of"),
        ("weighting.hidden", (64, 0), "positive whole numbers"),
        ("weighting.scales", (1.0, 2.0, 3.0), "one for each of the 2 terms .ce, kd."),
        ("weighting.scales", ("a", "b"), "must be positive numbers"),
        ("weighting.scales", (0.0, 1.0), "must be positive numbers"),
        ("weighting.hidden", (True,), "positive whole numbers"),
        ("weighting.features", ("ce", "ce"), "each once"),
        ("weighting.lr", 0.0, "must be positive"),
        ("weighting.weight_decay", -1.0, "must not be negative"),
        ("weighting.decay", float("nan"), "must be"),
        ("weighting.name", "learned", "must be one of static, bilevel"),
        ("weighting.name", "static", "choose learned weights by the config's argument"),
        ("data.meta_per_class", 0, "the meta set would miss every class"),
    ],
)
def test_bad_weighting_is_named(key, value, message):
    config = config_of("digitslt", "bikd")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(checks.ConfigError, match=message) as caught:
        checks.validate(config)
    assert key.split(".")[-1] in str(caught.value) or key == "weighting.name"


def test_a_batch_is_spread_evenly_over_the_devices():
    """A matter of the machine, so no part of what makes a queue or a page readable."""
    config = config_of("cifar100lt", "bikd")
    checks.validate(config)
    with pytest.raises(checks.ConfigError, match="config.train.batch_size=100 must be a multiple of the 8 devices"):
        checks.validate_devices(config)
    with pytest.raises(checks.ConfigError, match="multiple of the 8 devices"):
        run.run(config, "/nowhere", command="")


def test_learned_weights_need_the_argument():
    config = config_of("digitslt", "kd")
    config.weighting.name = "bilevel"
    with pytest.raises(checks.ConfigError, match=":bikd,terms=METHOD"):
        checks.validate(config)


def test_a_model_that_the_images_do_not_fit(black, monkeypatch):
    with pytest.raises(checks.ConfigError, match="the student has 4, the teacher 3"):
        build.student_program(config_of("folderlt", "reviewkd,name=birds,student=vgg8"), "features")
    monkeypatch.setitem(STORED, "birds", (4, *STORED["birds"][1:]))
    with pytest.raises(checks.ConfigError, match="VGG takes images .* of at least 8×8 pixels"):
        build.student_program(config_of("folderlt", "ltkd,name=birds,student=vgg8,image_size=0"), "network")


def test_a_meta_set_smaller_than_a_batch():
    config = config_of("digitslt", "bikd,data.meta_per_class=6")
    with pytest.raises(checks.ConfigError, match="60 images, fewer than a batch of 64: raise data.meta_per_class"):
        build.student_program(config, "none")


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
    config = config_of("digitslt")
    dataset.load(config)  # the digits themselves are loaded once
    importlib.import_module("tensorflow_datasets")
    config.update_from_flattened_dict(values)
    start = time.monotonic()
    with pytest.raises(checks.ConfigError, match=message.replace("(", "\\(")):
        dataset.load(config)
    assert time.monotonic() - start < 1


def test_the_identity_of_a_result():
    """What is computed is in the hash, how it is carried out is not; a teacher does not depend on the student."""
    base, teacher = checks.config_hash(config_of("digitslt")), checks.teacher_hash(config_of("digitslt"))
    for key, value, same, same_teacher in [
        ("seed", 1, False, True), ("train.lr", 0.1, False, True), ("method.alpha", 2.0, False, True),
        ("student.model", "resnet14", False, True), ("seed_teacher", 1, False, False), ("seed_split", 1, False, False),
        ("teacher.train.lr", 0.1, False, False), ("data.imbalance", 10.0, False, False),
        ("precision", "tf32", False, False),
        ("data.dir", "x", True, True), ("teacher.table", "never", True, True), ("parallel", "pmap", True, True),
        ("checkpoint_every", 3, True, True), ("teacher.table_runs", 9, True, True), ("teacher.cache", "x", True, True),
    ]:  # fmt: skip
        config = config_of("digitslt")
        config.update_from_flattened_dict({key: value})
        assert (checks.config_hash(config) == base) is same, key
        assert (checks.teacher_hash(config) == teacher) is same_teacher, key
    assert len({checks.teacher_hash(config_of("digitslt", m)) for m in methods.METHODS}) == 1


def test_what_is_off_is_no_part_of_the_identity():
    """So that results stay known when the program learns something new."""
    static, learned = config_of("digitslt", "kd"), config_of("digitslt", "bikd")
    assert "weighting" not in checks.identity(static) and "weighting" in checks.identity(learned)
    committed = ROOT / "results" / "digits-50-kd-resnet20-resnet8-s0-058e3663622d.json"
    assert committed.exists() and checks.config_hash(static) == "058e3663622d"


def test_images_held_out_make_another_teacher_only_where_they_change_its_images():
    def teacher(**values):
        config = config_of("digitslt", "kd")
        config.update_from_flattened_dict(values)
        return checks.teacher_hash(config)

    assert config_of("digitslt").data.n_max == 100
    assert teacher() == teacher(**{"data.meta_per_class": 8}) == teacher(**{"data.validation_per_class": 3})
    assert teacher(**{"data.n_max": 0}) != teacher(**{"data.n_max": 0, "data.meta_per_class": 8})
    assert teacher(**{"data.subset": "all"}) != teacher(**{"data.subset": "all", "data.meta_per_class": 8})
    held = config_of("digitslt", "bikd")
    np.testing.assert_array_equal(dataset.load(held).train.keys, dataset.load(config_of("digitslt")).train.keys)


def test_the_rule_for_the_table():
    """auto: views <= epochs × runs, and it fits."""
    config = config_of("digitslt", "kd")
    data = dataset.load(config)
    assert data.source.views.num == 9 and build.teacher_kind(config, data) == "table"
    config.train.epochs = 4.0
    assert build.teacher_kind(config, data) == "network"
    config.teacher.table_runs = 3
    assert build.teacher_kind(config, data) == "table"
    config.train.max_steps = 1
    assert build.teacher_kind(config, data) == "network"
    config.train.max_steps, config.teacher.table_memory = 0, 1e-9
    assert build.teacher_kind(config, data) == "network"
    for choice, answer in (("always", "table"), ("never", "network")):
        config.teacher.table = choice
        assert build.teacher_kind(config, data) == answer
