"""One device, eight by `jit`, eight by `pmap`: the same training."""

import functools
import types

import jax
import numpy as np
import pytest
from helpers.small_net import (
    CLASSES,
    IMAGES,
    LABELS,
    N,
    SmallNet,
    assert_close,
    double,
    parameters,
    preprocess,
    teacher_variables,
    train,
)

from experiments.trainer import build
from ltkd_jax.data.records import Images
from ltkd_jax.training import steps
from ltkd_jax.training.parallel import Parallel

# LTKD's terms have batch statistics over all devices; KD's compile sooner, which matters for three virtual steps.
CASES = {
    "ce": dict(method="ce"),
    "ltkd": dict(method="ltkd"),
    "bikd, K = 1": dict(method="ltkd", ahead=1),
    "bikd, K = 3": dict(method="kd", ahead=3),
}
SLOW = pytest.mark.slow
FIRST_STEPS = [pytest.param(case, marks=() if case == "ltkd" else SLOW) for case in CASES]


def trained(case, parallel, num_steps):
    """With a teacher in the step, in float64 where that is enabled."""
    teacher = double(teacher_variables()) if jax.config.jax_enable_x64 else teacher_variables()
    teaching = dict(teacher_fn=steps.network_teacher(SmallNet()), teacher=jax.device_get(teacher))
    return train(parallel=parallel, num_steps=num_steps, **CASES[case], **teaching)


@functools.cache
def on_one_device(case, num_steps):
    return trained(case, Parallel("jit", jax.devices()[:1]), num_steps)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("case", ["ce", "ltkd", "bikd, K = 1", pytest.param("bikd, K = 3", marks=SLOW)])
def test_eight_devices_are_one(case, mode):
    """Batch norm, group rebalancing, virtual and outer gradients over the global batch; 1e-9 after 20 steps."""
    with jax.enable_x64(True):
        expected, got = on_one_device(case, 20), trained(case, Parallel(mode), 20)
    assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)
    assert_close(got.sums, expected.sums, rtol=1e-6)
    assert got.step == 20


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_an_evaluation_counts_every_image_once(devices, mode):
    """Whatever the set's size and the number of devices, with the predictions of the network itself."""
    parallel = Parallel(mode, jax.devices()[:devices])
    whole = Images(IMAGES, LABELS, np.arange(N).astype(str))
    data = types.SimpleNamespace(train=whole, test=whole, preprocess=preprocess)
    evaluator = build.Evaluator(SmallNet(), data, parallel, 16)
    variables = teacher_variables()
    predicted = np.argmax(SmallNet().apply(variables, preprocess(IMAGES), train=False), axis=-1)
    replicated = parallel.replicate(variables)
    for size in (1, 15, 16, 17, N):
        expected = np.zeros((CLASSES, CLASSES))
        np.add.at(expected, (LABELS[-size:], predicted[-size:]), 1)
        sums = evaluator.evaluate(replicated, whole.subset(np.arange(N - size, N)))
        np.testing.assert_array_equal(sums.confusion, expected)
        assert sums.mass.sum() == pytest.approx(size)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("case", FIRST_STEPS)
def test_in_float32_the_first_gradients_are_the_same(case, mode):
    """To 1e-5 of the largest: of the student, in its momentum, and of the weight net."""
    expected, got = on_one_device(case, 1), trained(case, Parallel(mode), 1)
    gradients = [(state.opt_state, state.meta.gradients if state.meta else ()) for state in (got, expected)]
    for ours, theirs in zip(*gradients):
        leaves = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)))
        floats = [(a, b) for a, b in leaves if a.dtype == np.float32]
        largest = max((np.abs(b).max() for _, b in floats), default=1.0)
        assert largest > 1e-3
        for a, b in floats:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
