"""All configs at full size, on black images: data, networks and shapes of a step."""

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

# Side of the stored images (0: it differs), classes, channels, training images of each
# class.
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
    """Replaces `datasets.load`; all is as in the data set but the images."""
    stored_side, num_classes, channels, per_class = STORED[name]
    side = size or stored_side
    shape = (side, side, channels)

    def images(per_class):
        labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
        number = len(labels)
        keys = np.char.add("k", np.arange(number).astype(str))
        if margin:
            return records.Records((), np.arange(number), labels, keys, shape, "margin")
        # One byte for all images.
        black = np.broadcast_to(np.uint8(0), (number, *shape))
        return records.Images(black, labels, keys)

    is_digits = name == "digits"
    return datasets.Source(
        name,
        images(per_class),
        images(2),
        num_classes,
        tuple(map(str, range(num_classes))),
        (0.5,) * channels,
        (0.5,) * channels,
        augment.Views(pad=1 if is_digits else 4, flip=not is_digits),
    )


def clear_caches():
    dataset.load.cache_clear()
    get_trainer.cache_clear()


@pytest.fixture
def black(monkeypatch):
    """Makes all data sets available, with black images."""
    monkeypatch.setattr(datasets, "load", load_black)
    clear_caches()
    yield
    clear_caches()


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def data_shapes(trainer, teacher_data):
    """Returns the `TrainData` of a trainer as shapes."""

    def train_data(images, outer=None):
        if trainer.data.is_streamed:
            return steps.TrainData(None, None, teacher_data, outer)
        pixels = array(images.images.shape, np.uint8)
        labels = array(images.labels.shape, np.int32)
        return steps.TrainData(pixels, labels, teacher_data, outer)

    outer = None
    if trainer.loss_weighting is not None:
        outer = train_data(trainer.data.outer)
    return train_data(trainer.data.train, outer)


def input_shapes(trainer):
    """Returns the inputs of one step as shapes."""
    if not trainer.data.is_streamed:
        _, inputs = next(trainer.inputs(0, 0))
        return inputs

    def batch(*lookahead):
        leading_axes = (1, trainer.recipe.batch_size, *lookahead)
        return streaming.StreamedBatch(
            array((*leading_axes, *trainer.data.image_shape), np.uint8),
            array(leading_axes, np.int32),
            array(leading_axes, np.uint32),
        )

    if trainer.loss_weighting is None:
        return steps.StepInputs(batch())
    return steps.StepInputs(batch(1), outer=batch())


def assert_keeps_shapes(trainer, teacher_data):
    state = jax.eval_shape(trainer.init, 0)
    new_state = jax.eval_shape(
        lambda *arguments: trainer.train_steps(0, *arguments),
        state,
        data_shapes(trainer, teacher_data),
        input_shapes(trainer),
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == shapes


# For one run of a teacher, a table is used if there are more epochs than views.
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
def test_step_shapes(name, argument, side, source, black):
    """The step of the teacher and that of the student, with the config's own models."""
    # The eight devices do not divide BiKD's 100.
    batch_sizes = {"train.batch_size": 64, "teacher.train.batch_size": 64}
    spec = resolve(changed(config_of(name, argument), **batch_sizes))
    data = dataset.load(spec.data)
    assert data.is_streamed is (name == "imagenetlt")
    assert data.image_shape[0] == side
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
    table_shape = (len(data.train), data.source.views.num, data.num_classes)
    table = array(table_shape, np.float32)
    assert_keeps_shapes(student, table if source == "table" else variables)
    if argument != "bikd":
        assert_keeps_shapes(get_trainer(spec.teacher_training()), None)


@pytest.mark.parametrize(
    "argument, source, message",
    [
        ("reviewkd,student=vgg8", "features", "student has 4, the teacher 3"),
        ("ltkd,student=vgg8,image_size=0", "network", "VGG .*at least 8×8"),
        ("ltkd,cutout=64", "network", "augment.cutout=64"),
        (
            "bikd,data.outer_per_class=5",
            "network",
            "outer_per_class=5.* 60 images.* 8 devices: hold out 6 .*devices to 4",
        ),
    ],
)
def test_mismatched_parts(argument, source, message, black, monkeypatch):
    monkeypatch.setitem(STORED, "birds", (4, *STORED["birds"][1:]))
    spec = resolve(config_of("folderlt", f"name=birds,subset=exponential,{argument}"))
    with pytest.raises(ConfigError, match=message):
        get_trainer(spec.student_training(source))
