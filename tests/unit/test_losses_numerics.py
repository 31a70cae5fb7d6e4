"""Values and gradients of every loss against the reference in extended precision."""

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


def variants(case, *, dtype=np.float32, temperatures=TEMPERATURES):
    """Yields (inputs, losses, message) for every grouping, masking and temperature."""
    for grouping, masking, temperature in itertools.product(
        truth.GROUPINGS, truth.MASKINGS, temperatures
    ):
        variant = dict(grouping=grouping, masking=masking, temperature=temperature)
        family = list(truth.FAMILY.values())
        # Losses without groups are evaluated once.
        if grouping != "thirds":
            family = [loss for loss in family if loss.needs_groups]
        yield truth.draw(case, dtype=dtype, **variant), family, f"{case} {variant}"


def assert_value(loss, x, actual, rtol, atol, message=""):
    expected = loss.call(truth, x)
    message = f"{loss.name} {message}"
    assert actual.dtype == x.student.dtype, message
    assert np.isfinite(expected).all() and np.isfinite(actual).all(), message
    np.testing.assert_allclose(
        np.asarray(actual, truth.REAL), expected, rtol, atol, err_msg=message
    )


def rounding_error(loss, x):
    """Returns the absolute tolerance: 1e-6 for each unit of weight.

    A term near 0 is a difference of logs, each rounded at 1e-7. A rebalanced mass is a
    difference of log masses of the batch, which are rounded at 1e-7 of about 200.
    """
    tolerance = 1e-6 * loss.weight
    if loss.uses_batch:
        tolerance *= 4
    if loss.has_tau_squared:
        tolerance *= float(x.temperature) ** 2
    return tolerance


@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_float32(case):
    """Gradients are finite, and 0 where no class or no example exists."""
    for x, family, message in variants(case):
        results = evaluate(x)
        for loss in family:
            value, gradient = map(np.asarray, results[loss.name])
            tolerance = 1e-5
            if case in truth.EXTREME:
                # A rebalanced mass has the relative error of a log mass, which is
                # rounded at 1e-3 where it is 2e4.
                tolerance = 1e-3 if loss.uses_batch else 1e-4
            assert_value(loss, x, value, tolerance, rounding_error(loss, x), message)
            loss_message = f"{loss.name} {message}"
            assert np.isfinite(gradient).all(), loss_message
            assert (gradient[~x.where] == 0).all(), loss_message
            if loss.uses_batch:
                assert (gradient[~x.example_mask] == 0).all(), loss_message


@every_case
def test_float64(case):
    with jax.enable_x64(True):
        for x, family, message in variants(case, dtype=np.float64):
            results = evaluate(x)
            for loss in family:
                value, _ = results[loss.name]
                assert_value(loss, x, value, 1e-10, 1e-12, message)


def reference_gradient(loss, x, step=1e-5):
    """Returns central differences of the reference.

    Losses of different examples do not mix, so one class is moved in all of them.
    """
    moves = step * np.eye(truth.C, dtype=truth.REAL)[:, None, :]  # [C, 1, C] on [B, C]
    options = {"factor_logits": x.student} if loss.has_constant_factor else {}
    up = loss.call(truth, x._replace(student=x.student + moves), **options)
    down = loss.call(truth, x._replace(student=x.student - moves), **options)
    return ((up - down) / (2 * step)).T


@every_case
def test_gradients_float64(case):
    for x, family, message in variants(case, dtype=np.float64, temperatures=(1.0, 4.0)):
        x = x._replace(
            student=np.clip(x.student, -50, 50), teacher=np.clip(x.teacher, -50, 50)
        )
        with jax.enable_x64(True):
            results = evaluate(x)
        for loss in family:
            _, actual = results[loss.name]
            expected = np.where(x.where, reference_gradient(loss, x), 0).astype(float)
            np.testing.assert_allclose(
                actual, expected, 1e-7, 1e-8, err_msg=f"{loss.name} {message}"
            )


@every_case
def test_gradients_float32(case):
    for x, family, message in variants(case, temperatures=(4.0,)):
        results = evaluate(x)
        wide = {}
        for field in ("student", "teacher", "weights", "temperature"):
            wide[field] = getattr(x, field).astype(np.float64)
        with jax.enable_x64(True):
            wide_results = evaluate(x._replace(**wide))
        for loss in family:
            _, actual = results[loss.name]
            _, expected = wide_results[loss.name]
            np.testing.assert_allclose(
                actual,
                expected,
                1e-5,
                rounding_error(loss, x),
                err_msg=f"{loss.name} {message}",
            )


def test_batch_of_padding():
    x = truth.draw("random")._replace(example_mask=np.zeros(truth.B, bool))
    results = evaluate(x)
    for name in ("rebalanced_inter_group", "ltkd"):
        value, gradient = results[name]
        assert not np.any(value) and not np.any(gradient)


def test_effective_number_weights():
    counts = np.array([1, 5, 48, 500, 4900, 100_000])
    expected = truth.effective_number_weights(counts)
    actual = losses.effective_number_weights(counts)
    np.testing.assert_allclose(actual, expected.astype(float), 1e-5)
    assert float(np.sum(actual)) == pytest.approx(len(counts))


@pytest.mark.parametrize("masking", truth.MASKINGS)
@pytest.mark.parametrize("spread", [1.0, 50.0, 2000.0])
def test_rebalance(masking, spread):
    """For masses that no float32 probability can represent, too."""
    rng = np.random.default_rng(0)
    log_mass = np.asarray(truth.normalize(rng.uniform(-spread, 0, (8, 4))), np.float32)
    where = np.ones((8, 4), bool)
    example_mask = np.ones(8, bool)
    if masking == "classes":
        where[:, 2] = False
    elif masking == "examples":
        where = rng.random((8, 4)) < 0.7
        example_mask = rng.random(8) < 0.7
        where[:, 0] = True
        example_mask[0] = True
    log_mass = np.where(where, log_mass, -np.inf).astype(np.float32)
    masks = dict(where=where, example_mask=example_mask)
    expected = truth.rebalance(log_mass, **masks)[example_mask]
    actual = jax.jit(losses.rebalance)(log_mass, **masks)[example_mask]
    np.testing.assert_array_equal(np.isneginf(actual), ~where[example_mask])
    # The scaled log masses are as large as 2 · spread, and are rounded accordingly.
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
        loss = truth.FAMILY[name]
        assert_value(loss, x, value, 1e-5, rounding_error(loss, x))
        assert np.isfinite(gradient).all(), name
