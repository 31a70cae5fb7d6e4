"""Every loss against the truth in extended precision: values, gradients, extremes, and what stays finite."""

import itertools

import jax
import numpy as np
import pytest
from helpers import truth
from helpers.loss_family import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ltkd_jax import losses

every_case = pytest.mark.parametrize("case", truth.CASES)
TEMPERATURES = (1.0, 2.0, 4.0)


def draws(case, *, dtype=np.float32, temperatures=TEMPERATURES):
    """Yields the case under every grouping, masking and temperature, the losses that it is for, and a message."""
    for grouping, masking, temperature in itertools.product(
        truth.GROUPINGS, truth.MASKINGS, temperatures
    ):
        variant = dict(grouping=grouping, masking=masking, temperature=temperature)
        family = [
            loss
            for loss in truth.FAMILY.values()
            if loss.grouped or grouping == "thirds"
        ]
        yield truth.draw(case, dtype=dtype, **variant), family, f"{case} {variant}"


def assert_true(loss, x, actual, rtol, atol, message=""):
    expected = loss.call(truth, x)
    message = f"{loss.name} {message}"
    assert actual.dtype == x.student.dtype, message
    assert np.isfinite(expected).all() and np.isfinite(actual).all(), message
    np.testing.assert_allclose(
        np.asarray(actual, truth.REAL), expected, rtol, atol, err_msg=message
    )


def rounding(loss, x):
    """1e-6 for each unit of weight: a term near 0 is a difference of logs, each rounded at 1e-7.

    A rebalanced mass is a difference of log masses of the batch, which are rounded at 1e-7 of 200 here.
    """
    return (
        1e-6
        * loss.terms
        * (4 if loss.batch else 1)
        * (float(x.temperature) ** 2 if loss.squared else 1)
    )


@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_float32(case):
    """Values are the truth's; gradients are finite, and 0 where no class or no example exists."""
    for x, family, message in draws(case):
        results = evaluate(x)
        for loss in family:
            value, gradient = map(np.asarray, results[loss.name])
            tolerance = 1e-5
            if case in truth.EXTREME:
                # A rebalanced mass has the relative error of a log mass, which is rounded at 1e-3 where it is 2e4.
                tolerance = 1e-3 if loss.batch else 1e-4
            assert_true(loss, x, value, tolerance, rounding(loss, x), message)
            assert np.isfinite(gradient).all(), f"{loss.name} {message}"
            assert (gradient[~x.where] == 0).all(), f"{loss.name} {message}"
            assert not loss.batch or (gradient[~x.example_mask] == 0).all(), (
                f"{loss.name} {message}"
            )


@every_case
def test_float64(case):
    with jax.enable_x64(True):
        for x, family, message in draws(case, dtype=np.float64):
            results = evaluate(x)
            for loss in family:
                assert_true(loss, x, results[loss.name][0], 1e-10, 1e-12, message)


def true_gradient(loss, x, step=1e-5):
    """Central differences of the truth; examples do not mix, so one class moves in all of them at once."""
    moves = step * np.eye(truth.C, dtype=truth.REAL)[:, None, :]  # [C, 1, C] on [B, C]
    held = {"held_logits": x.student} if loss.held else {}
    up, down = (
        loss.call(truth, x._replace(student=x.student + move), **held)
        for move in (moves, -moves)
    )
    return ((up - down) / (2 * step)).T


@every_case
def test_gradients_float64(case):
    for x, family, message in draws(case, dtype=np.float64, temperatures=(1.0, 4.0)):
        x = x._replace(
            student=np.clip(x.student, -50, 50), teacher=np.clip(x.teacher, -50, 50)
        )
        with jax.enable_x64(True):
            results = evaluate(x)
        for loss in family:
            expected = np.where(x.where, true_gradient(loss, x), 0).astype(float)
            np.testing.assert_allclose(
                results[loss.name][1],
                expected,
                1e-7,
                1e-8,
                err_msg=f"{loss.name} {message}",
            )


@every_case
def test_gradients_float32(case):
    real = ("student", "teacher", "weights", "temperature")
    for x, family, message in draws(case, temperatures=(4.0,)):
        results = evaluate(x)
        with jax.enable_x64(True):
            expected = evaluate(
                x._replace(
                    **{field: getattr(x, field).astype(np.float64) for field in real}
                )
            )
        for loss in family:
            actual, exact = results[loss.name][1], expected[loss.name][1]
            np.testing.assert_allclose(
                actual, exact, 1e-5, rounding(loss, x), err_msg=f"{loss.name} {message}"
            )


def test_batch_of_padding():
    results = evaluate(
        truth.draw("random")._replace(example_mask=np.zeros(truth.B, bool))
    )
    for name in ("rebalanced_inter_group", "ltkd"):
        assert not np.any(results[name][0]) and not np.any(results[name][1])


def test_effective_number_weights():
    counts = np.array([1, 5, 48, 500, 4900, 100_000])
    expected = truth.effective_number_weights(counts)
    np.testing.assert_allclose(
        losses.effective_number_weights(counts), expected.astype(float), 1e-5
    )
    assert float(np.sum(losses.effective_number_weights(counts))) == pytest.approx(
        len(counts)
    )


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
    expected = truth.rebalance(log_mass, where=where, example_mask=example_mask)[
        example_mask
    ]
    actual = jax.jit(losses.rebalance)(
        log_mass, where=where, example_mask=example_mask
    )[example_mask]
    np.testing.assert_array_equal(np.isneginf(actual), ~where[example_mask])
    # The scaled masses are as large as 2 · spread, and are rounded as such.
    np.testing.assert_allclose(
        actual, expected.astype(float), 1e-6, 4e-7 * max(spread, 2)
    )
    np.testing.assert_allclose(np.exp(actual).sum(-1), 1, 1e-5)


LOGITS = hnp.arrays(
    np.float32,
    (2, truth.B, truth.C),
    elements=st.one_of(
        st.floats(-100, 100, width=32),
        st.sampled_from([-100.0, -15.0, 0.0, 15.0, 100.0]),
    ),
)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from(TEMPERATURES),
    masking=st.sampled_from(truth.MASKINGS),
)
def test_any_logits(logits, temperature, masking):
    x = truth.draw("random", temperature=temperature, masking=masking)
    x = x._replace(student=logits[0], teacher=logits[1])
    for name, (value, gradient) in evaluate(x).items():
        assert_true(truth.FAMILY[name], x, value, 1e-5, rounding(truth.FAMILY[name], x))
        assert np.isfinite(gradient).all(), name
