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
    Training,
    assert_close,
    parameters,
    preprocess,
    teacher_variables,
)

from experiments.trainer.evaluator import Evaluator
from ltkd_jax.data.records import Images
from ltkd_jax.training.parallel import Parallel

# LTKD's terms have batch statistics over all devices; KD's compile sooner, which matters for three virtual steps.
CASES = {
    "ce": dict(method="ce"),
    "ltkd": dict(method="ltkd"),
    "one virtual step": dict(method="ltkd", lookahead=1),
    "three virtual steps": dict(method="kd", lookahead=3),
}


@functools.cache
def on_one_device(case, num_steps):
    return Training(**CASES[case]).run(num_steps)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_are_one(case, mode):
    """Batch norm, group rebalancing, virtual and outer gradients over the global batch; to 1e-9 after 20 steps."""
    with jax.enable_x64(True):
        expected = on_one_device(case, 20)
        state = Training(parallel=Parallel(mode), **CASES[case]).run(20)
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)
    assert_close(state.sums, expected.sums, rtol=1e-6)
    assert state.step == 20


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_evaluation_counts_every_image_once(devices, mode):
    """Whatever the set's size and the number of devices, with the predictions of the network itself."""
    parallel = Parallel(mode, jax.devices()[:devices])
    whole = Images(IMAGES, LABELS, np.arange(N).astype(str))
    data = types.SimpleNamespace(train=whole, test=whole, preprocess=preprocess)
    evaluator = Evaluator(SmallNet(), data, parallel, 16)
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
@pytest.mark.parametrize("case", CASES)
def test_first_gradients_in_float32(case, mode):
    """To 1e-5 of the largest: of the student, in its momentum, and of the weight net."""
    states = on_one_device(case, 1), Training(parallel=Parallel(mode), **CASES[case]).run(1)
    gradients = [(state.opt_state, state.meta.gradients if state.meta else ()) for state in states]
    for part, expected_part in zip(*reversed(gradients)):
        leaves = zip(jax.tree.leaves(part), jax.tree.leaves(expected_part))
        floats = [(x, expected) for x, expected in leaves if x.dtype == np.float32]
        largest = max((np.abs(expected).max() for _, expected in floats), default=1.0)
        assert largest > 1e-3
        for x, expected in floats:
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * largest)
