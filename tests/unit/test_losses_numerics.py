"""Every loss against the float64 truth: values, gradients, extremes, and what stays finite."""

import functools

import jax
import numpy as np
import pytest
from helpers import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ltkd_jax import losses

every_loss = pytest.mark.parametrize("loss", truth.FAMILY.values(), ids=truth.FAMILY)
TEMPERATURES = (1.0, 2.0, 4.0)


@functools.cache
def jitted(name):
    """One compilation for each loss, dtype and number of groups: the temperature and the masks are traced."""
    return jax.jit(lambda x: truth.FAMILY[name].call(losses, x))


@functools.cache
def gradient(name):
    """Per-example gradients by the student's logits. Examples meet in the teacher's statistics only."""

    def total(student, x):
        return truth.FAMILY[name].call(losses, x._replace(student=student)).sum()

    return jax.jit(lambda x: jax.grad(total)(x.student, x))


def variants(loss, case, dtype=np.float32, temperatures=TEMPERATURES):
    """The case under every grouping, masking and temperature."""
    for grouping in truth.groupings(loss):
        for masking in truth.MASKINGS:
            for temperature in temperatures:
                labels = dict(grouping=grouping, masking=masking, temperature=temperature)
                yield truth.draw(case, dtype=dtype, **labels), f"{loss.name} {case} {labels}"


def assert_true(loss, x, rtol, atol, message=""):
    expected = loss.call(truth, x)
    actual = jitted(loss.name)(x)
    assert actual.dtype == x.student.dtype
    assert np.isfinite(expected).all() and np.isfinite(actual).all(), message
    np.testing.assert_allclose(np.asarray(actual, truth.REAL), expected, rtol, atol, err_msg=message)


def rounding(loss, x):
    """1e-6 for each unit of weight: a term near 0 is a difference of logs, each rounded at 1e-7.

    A rebalanced mass is a difference of log masses of the batch, which are rounded at 1e-7 of 200 here.
    """
    return 1e-6 * loss.terms * (4 if loss.batch else 1) * (float(x.temperature) ** 2 if loss.squared else 1)


@every_loss
@pytest.mark.parametrize("case", truth.CASES)
def test_float32(loss, case):
    for x, message in variants(loss, case):
        assert_true(loss, x, 1e-5, rounding(loss, x), message)


@every_loss
@pytest.mark.parametrize("case", truth.EXTREME)
def test_float32_at_1e4(loss, case):
    for x, message in variants(loss, case):
        # A rebalanced mass has the relative error of a log mass, which is rounded at 1e-3 where it is 2e4.
        assert_true(loss, x, 1e-3 if loss.batch else 1e-4, rounding(loss, x), message)


@every_loss
@pytest.mark.parametrize("case", truth.CASES)
def test_float64(loss, case):
    with jax.enable_x64(True):
        for x, message in variants(loss, case, np.float64):
            assert_true(loss, x, 1e-10, 1e-12, message)


@every_loss
@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_gradients_are_finite_and_zero_where_nothing_exists(loss, case):
    for x, message in variants(loss, case, temperatures=(1.0,)):
        g = np.asarray(gradient(loss.name)(x))
        assert np.isfinite(g).all(), message
        assert (g[~x.where] == 0).all(), message
        if loss.batch:
            assert (g[~x.example_mask] == 0).all(), message


def true_gradient(loss, x, step=1e-5):
    """Central differences of the truth; examples do not mix, so one class moves in all of them at once."""
    moves = step * np.eye(truth.C, dtype=truth.REAL)[:, None, :]  # [C, 1, C] on [B, C]
    held = {"held_logits": x.student} if loss.held else {}
    up, down = (loss.call(truth, x._replace(student=x.student + m), **held) for m in (moves, -moves))
    return ((up - down) / (2 * step)).T


@every_loss
@pytest.mark.parametrize("case", truth.CASES)
def test_gradients_are_the_truths(loss, case):
    for x, message in variants(loss, case, np.float64, temperatures=(1.0, 4.0)):
        x = x._replace(student=np.clip(x.student, -50, 50), teacher=np.clip(x.teacher, -50, 50))
        expected = np.where(x.where, true_gradient(loss, x), 0)
        with jax.enable_x64(True):
            actual = gradient(loss.name)(x)
        np.testing.assert_allclose(actual, expected.astype(float), 1e-7, 1e-8, err_msg=message)


@every_loss
@pytest.mark.parametrize("case", truth.CASES)
def test_float32_gradients(loss, case):
    for x, message in variants(loss, case, temperatures=(4.0,)):
        with jax.enable_x64(True):
            real = ("student", "teacher", "weights", "temperature")
            expected = gradient(loss.name)(x._replace(**{f: getattr(x, f).astype(np.float64) for f in real}))
        np.testing.assert_allclose(gradient(loss.name)(x), expected, 1e-5, rounding(loss, x), err_msg=message)


def test_a_batch_of_padding_only_is_zero():
    x = truth.draw("random")._replace(example_mask=np.zeros(truth.B, bool))
    for name in ("rebalanced_inter_group", "ltkd"):
        np.testing.assert_array_equal(jitted(name)(x), np.zeros(truth.B))
        np.testing.assert_array_equal(gradient(name)(x), np.zeros((truth.B, truth.C)))


def test_effective_number_weights():
    counts = np.array([1, 5, 48, 500, 4900, 100_000])
    expected = truth.effective_number_weights(counts)
    np.testing.assert_allclose(losses.effective_number_weights(counts), expected.astype(float), 1e-5)
    assert float(np.sum(losses.effective_number_weights(counts))) == pytest.approx(len(counts))


@pytest.mark.parametrize("masking", truth.MASKINGS)
@pytest.mark.parametrize("spread", [1.0, 50.0, 2000.0])
def test_rebalance(masking, spread):
    """Against the truth for masses that no float32 probability can hold."""
    rng = np.random.default_rng(0)
    log_mass = np.asarray(truth.normalize(rng.uniform(-spread, 0, (8, 4))), np.float32)
    where, example_mask = np.ones((8, 4), bool), np.ones(8, bool)
    if masking == "classes":
        where[:, 2] = False
    elif masking == "examples":
        where, example_mask = rng.random((8, 4)) < 0.7, rng.random(8) < 0.7
        where[:, 0] = example_mask[0] = True
    log_mass = np.where(where, log_mass, -np.inf).astype(np.float32)
    expected = truth.rebalance(log_mass, where=where, example_mask=example_mask)
    actual = jax.jit(losses.rebalance)(log_mass, where=where, example_mask=example_mask)
    rows = example_mask
    np.testing.assert_array_equal(np.isneginf(actual)[rows], ~where[rows])
    # The scaled masses are as large as 2 · spread, and are rounded as such.
    np.testing.assert_allclose(actual[rows], expected[rows].astype(float), 1e-6, 4e-7 * max(spread, 2))
    np.testing.assert_allclose(np.exp(actual[rows]).sum(-1), 1, 1e-5)


LOGITS = hnp.arrays(
    np.float32,
    (2, truth.B, truth.C),
    elements=st.one_of(st.floats(-100, 100, width=32), st.sampled_from([-100.0, -15.0, 0.0, 15.0, 100.0])),
)


@every_loss
@settings(max_examples=15, derandomize=True, deadline=None)
@given(logits=LOGITS, temperature=st.sampled_from(TEMPERATURES), masking=st.sampled_from(truth.MASKINGS))
def test_any_logits(loss, logits, temperature, masking):
    x = truth.draw("random", temperature=temperature, masking=masking)
    x = x._replace(student=logits[0], teacher=logits[1])
    assert_true(loss, x, 1e-5, rounding(loss, x))
    assert np.isfinite(gradient(loss.name)(x)).all()
