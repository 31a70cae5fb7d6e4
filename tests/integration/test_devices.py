"""Training and evaluation are the same on one device, by `jit` and by `pmap`."""

import types

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


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_evaluation_counts(num_devices, mode):
    """Every image counts once, whatever the size of the set."""
    parallel = Parallel(mode, jax.devices()[:num_devices])
    images = Images(IMAGES, LABELS, np.arange(N).astype(str))
    data = types.SimpleNamespace(train=images, test=images, preprocess=preprocess)
    evaluator = Evaluator(SmallNet(), data, parallel, 16)
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


def test_several_steps_a_call_by_pmap():
    """The device decides on the weight net's updates, as in a run on accelerators."""
    expected = on_one_device("one virtual step", 4)
    with jax.enable_x64(True):
        training = Training(parallel=Parallel("pmap"), **CASES["one virtual step"])
        state = training.run(4, steps_per_call=2)
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)
