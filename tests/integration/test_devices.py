"""Training and evaluation are the same on one device, by `jit` and by `pmap`."""

import gc
import types
import weakref

import jax
import numpy as np
import pytest
from helpers.small_net import (
    CASES,
    CLASSES,
    IMAGES,
    LABELS,
    N,
    SmallNet,
    Training,
    assert_close,
    assert_eight_devices_are_one,
    assert_same_first_gradients,
    on_one_device,
    parameters,
    preprocess,
    teacher_variables,
)

from experiments.trainer.evaluator import Evaluator
from ltkd_jax.data.records import Images
from ltkd_jax.training.parallel import Parallel


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("case", ["ce", "ltkd", "one virtual step"])
def test_eight_devices(case, mode):
    assert_eight_devices_are_one(case, mode)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_first_gradients_in_float32(mode):
    assert_same_first_gradients("ltkd", mode)


def evaluation_data(train):
    """Returns a data set of a training set, of which parts are the held-out sets."""
    return types.SimpleNamespace(
        train=train,
        test=train.subset(np.arange(20)),
        validation=train.subset(np.arange(20, 40)),
        preprocess=preprocess,
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_evaluation_counts(num_devices, mode):
    """Every image counts once, whatever the size of the set."""
    parallel = Parallel(mode, jax.devices()[:num_devices])
    images = Images(IMAGES, LABELS, np.arange(N).astype(str))
    evaluator = Evaluator(SmallNet(), evaluation_data(images), parallel, 16)
    variables = teacher_variables()
    logits = SmallNet().apply(variables, preprocess(IMAGES), train=False)
    predicted = np.argmax(logits, axis=-1)
    replicated = parallel.replicate(variables)
    for size in (1, 15, 16, 17, N):
        expected = np.zeros((CLASSES, CLASSES))
        np.add.at(expected, (LABELS[-size:], predicted[-size:]), 1)
        subset = images.subset(np.arange(N - size, N))
        sums = evaluator.evaluate(replicated, subset)
        np.testing.assert_array_equal(sums.confusion, expected)
        assert sums.mass.sum() == pytest.approx(size)


def test_evaluation_keeps_only_held_out_sets(monkeypatch):
    """A set that is evaluated once, such as the training set, leaves the devices."""
    parallel = Parallel("jit", jax.devices()[:1])
    data = evaluation_data(Images(IMAGES, LABELS, np.arange(N).astype(str)))
    evaluator = Evaluator(SmallNet(), data, parallel, 16)
    variables = parallel.replicate(teacher_variables())
    sent = []
    shard = parallel.shard

    def recording_shard(batch, batch_axis):
        batch_on_device = shard(batch, batch_axis)
        sent.append(weakref.ref(batch_on_device.images))
        return batch_on_device

    monkeypatch.setattr(parallel, "shard", recording_shard)
    for images in (data.test, data.validation, data.train) * 2:
        evaluator.evaluate(variables, images)
    gc.collect()
    is_kept = [batch() is not None for batch in sent]
    # In batches of 16: two of each held-out set, sent once, and three of all images.
    assert is_kept == [True] * 4 + [False] * 6


def test_several_steps_a_call_by_pmap():
    """The device decides on the weight net's updates, as in a run on accelerators."""
    expected = on_one_device("one virtual step", 4)
    with jax.enable_x64(True):
        training = Training(parallel=Parallel("pmap"), **CASES["one virtual step"])
        state = training.run(4, steps_per_call=2)
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)
