"""Every config at full size: its data, its networks and the shapes of its steps, of images that are all black."""

import jax
import numpy as np
import pytest
from helpers.small_runs import changed, config_of

from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset, teacher
from experiments.trainer.trainer import get_trainer, teacher_model
from ltkd_jax.data import augment, datasets, records, streaming
from ltkd_jax.training import steps

# Sides as they are stored (0: they differ), classes, channels, training images of a class.
STORED = {
    "digits": (8, 10, 1, 110),
    "fashion_mnist": (28, 10, 1, 6000),
    "cifar10": (32, 10, 3, 5000),
    "cifar100": (32, 100, 3, 500),
    "tiny_imagenet": (64, 200, 3, 500),
    "imagenet2012": (0, 1000, 3, 30),
    "birds": (0, 12, 3, 40),
}


def load_black(name, data_dir=None, *, size=0, margin=False):
    """Stands in for `datasets.load`: the true form of a data set, but for how many images there are."""
    stored, num_classes, channels, per_class = STORED[name]
    side = size or stored
    views = (
        augment.Views(pad=1, flip=False)
        if name == "digits"
        else augment.Views(pad=4, flip=True)
    )

    def images(per_class):
        labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
        keys = np.char.add("k", np.arange(len(labels)).astype(str))
        if margin:
            return records.Records(
                (),
                np.arange(len(labels)),
                labels,
                keys,
                (side, side, channels),
                "margin",
            )
        return records.Images(
            np.broadcast_to(np.uint8(0), (len(labels), side, side, channels)),
            labels,
            keys,
        )

    names = tuple(map(str, range(num_classes)))
    normal = (0.5,) * channels
    return datasets.Source(
        name, images(per_class), images(2), num_classes, names, normal, normal, views
    )


@pytest.fixture
def black(monkeypatch):
    """Every data set is there, and black; nothing made of it is kept."""
    monkeypatch.setattr(datasets, "load", load_black)
    for cache in (dataset.load, trainer):
        cache.cache_clear()
    yield
    for cache in (dataset.load, trainer):
        cache.cache_clear()


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def data_shapes(student, teacher):
    """Returns the `TrainData` of a trainer as shapes; `teacher` is what it holds of one."""

    def of(images, **outer):
        if student.data.is_streamed:
            return steps.TrainData(None, None, teacher, **outer)
        images_and_labels = (
            array(images.images.shape, np.uint8),
            array(images.labels.shape, np.int32),
        )
        return steps.TrainData(*images_and_labels, teacher, **outer)

    learned = student.loss_weighting is not None
    return of(student.data.train, outer=of(student.data.outer) if learned else None)


def input_shapes(student):
    """Returns the inputs of one step as shapes."""
    if not student.data.is_streamed:
        _, inputs = next(student.inputs(0, 0))
        return inputs

    def batch(*lookahead):
        lead = (1, student.recipe.batch_size, *lookahead)
        images = array((*lead, *student.data.image_shape), np.uint8)
        return streaming.StreamedBatch(
            images, array(lead, np.int32), array(lead, np.uint32)
        )

    learned = student.loss_weighting is not None
    return (
        steps.StepInputs(batch(1), outer=batch())
        if learned
        else steps.StepInputs(batch())
    )


def assert_keeps_shapes(student, teacher):
    state = jax.eval_shape(student.init, 0)
    after = jax.eval_shape(
        lambda *arguments: student.train_steps(0, *arguments),
        state,
        data_shapes(student, teacher),
        input_shapes(student),
    )
    as_pair = jax.tree.map(lambda x: (x.shape, x.dtype), (after, state))
    assert as_pair[0] == as_pair[1]


# At one run of a teacher a table is used where its epochs outnumber the views.
@pytest.mark.parametrize(
    "name, argument, side, source",
    [
        ("digitslt", "ltkd", 8, "table"),
        ("digitslt", "bikd", 8, "table"),
        ("cifar100lt", "ltkd", 32, "table"),
        ("cifar10lt", "ltkd", 32, "network"),
        ("fashionmnistlt", "ltkd", 28, "network"),
        ("tinyimagenetlt", "ltkd", 64, "table"),
        ("imagenetlt", "ltkd", 224, "network"),
        ("imagenetlt", "bikd", 224, "network"),
        ("folderlt", "ltkd,name=birds,subset=exponential", 64, "table"),
    ],
)
def test_step_keeps_its_shapes(name, argument, side, source, black):
    """With the config's own models: the step of the teacher and that of the student."""
    # Eight devices would not divide BiKD's 100.
    spec = resolve(
        changed(
            config_of(name, argument),
            **{"train.batch_size": 64, "teacher.train.batch_size": 64},
        )
    )
    data = dataset.load(spec.data)
    assert data.is_streamed is (name == "imagenetlt") and data.image_shape[0] == side
    assert teacher.choose_source(spec, data) == source
    student = get_trainer(spec.student_training(source))
    network = teacher_model(student.spec, data)
    images = array((2, *data.image_shape), np.float32)
    variables = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, train=False), images
    )
    logits = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=False), variables, images
    )
    assert logits.shape == (2, data.num_classes)
    table = array(
        (len(data.train), data.source.views.num, data.num_classes), np.float32
    )
    assert_keeps_shapes(student, table if source == "table" else variables)
    if argument != "bikd":
        assert_keeps_shapes(get_trainer(spec.teacher_training()), None)


@pytest.mark.parametrize(
    "argument, source, message",
    [
        ("reviewkd,student=vgg8", "features", "student has 4, the teacher 3"),
        ("ltkd,student=vgg8,image_size=0", "network", "VGG .*at least 8×8"),
        ("ltkd,cutout=64", "network", "augment.cutout=64"),
        ("bikd,data.outer_per_class=5", "network", "60 images.*data.outer_per_class"),
    ],
)
def test_parts_that_do_not_fit(argument, source, message, black, monkeypatch):
    monkeypatch.setitem(STORED, "birds", (4, *STORED["birds"][1:]))
    spec = resolve(config_of("folderlt", f"name=birds,subset=exponential,{argument}"))
    with pytest.raises(ConfigError, match=message):
        get_trainer(spec.student_training(source))
