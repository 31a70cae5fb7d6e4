"""A set, a net and an optimizer so small that twenty steps on eight devices take seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltkd_jax import groups
from ltkd_jax.data import augment
from ltkd_jax.training import state as states
from ltkd_jax.training import steps, teacher_table

N, CLASSES, BATCH, SHAPE = 40, 5, 16, (6, 6, 1)
VIEWS = augment.Views(pad=1, flip=True)
COUNTS = np.array([16, 10, 7, 4, 3])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
LABELS = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)


class SmallNet(nn.Module):
    """A batch-norm net without convolutions, which XLA compiles in no time."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(12)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(CLASSES)(nn.relu(x))


def preprocess(images):
    return augment.normalize(images, (0.5,), (0.25,))


def double(tree):
    """The floats of a tree in float64, which flax then computes in."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def optimizer(schedule=0.05):
    return states.sgd(schedule, momentum=0.9, weight_decay=5e-4)


def teacher_variables():
    return SmallNet().init(jax.random.key(9), jnp.zeros((1, *SHAPE)), train=False)


def table(variables, images=IMAGES, labels=LABELS):
    out = np.zeros((len(images), VIEWS.num, CLASSES), np.float64 if jax.config.jax_enable_x64 else np.float32)
    fetch = functools.partial(
        steps.fetch, views=VIEWS, preprocess=preprocess, teacher_fn=steps.network_teacher(SmallNet())
    )
    data = steps.TrainData(jnp.asarray(images), jnp.asarray(labels), variables)
    logits = jax.jit(lambda rows: fetch(data, rows).teacher_logits)
    teacher_table.build(logits, out, batch_size=64)
    return out


def assert_close(got, want, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, want)
