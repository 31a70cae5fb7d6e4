"""Evaluation sums against NumPy, masked and spread over batches and devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import groups, metrics

C = 6
GROUPS = groups.ClassGroups.from_counts([50, 40, 30, 20, 10, 5])
SHOTS = groups.shots([150, 120, 30, 20, 25, 30])  # none is "few"
eval_sums = jax.jit(metrics.eval_sums)


def examples(number=97, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, C)).astype(np.float32) * 2
    return logits, rng.integers(0, C, number).astype(np.int32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_summary_is_that_of_numpy():
    logits, labels = examples()
    sums = eval_sums(logits, labels, np.ones(len(labels), bool))
    summary = metrics.summarize(sums, GROUPS, SHOTS)
    hit = logits.argmax(-1) == labels
    assert summary["all"] == pytest.approx(100 * hit.mean())
    for c in range(C):
        assert summary["per_class"][c] == pytest.approx(100 * hit[labels == c].mean())
    assignment = np.asarray(GROUPS.assignment)
    for g, name in enumerate(GROUPS.names):
        assert summary["groups"][name] == pytest.approx(
            100 * hit[assignment[labels] == g].mean()
        )
        for h in range(GROUPS.num_groups):
            inside = assignment[logits.argmax(-1)][assignment[labels] == g] == h
            assert summary["confusion"][g][h] == pytest.approx(100 * inside.mean())
    assert summary["shots"]["many"] == pytest.approx(100 * hit[labels < 2].mean())
    assert summary["shots"]["few"] is None
    mass = softmax(logits).mean(0)
    got = metrics.group_mass(sums, GROUPS)
    assert got == pytest.approx(
        {n: mass[assignment == g].sum() for g, n in enumerate(GROUPS.names)}, rel=1e-5
    )


def test_calibration_error():
    logits, labels = examples(500, seed=3)
    confidence, hit = softmax(logits).max(-1), logits.argmax(-1) == labels
    which = np.minimum(
        (confidence * metrics.NUM_BINS).astype(int), metrics.NUM_BINS - 1
    )
    expected = sum(
        (which == b).mean()
        * abs(confidence[which == b].mean() - hit[which == b].mean())
        for b in np.unique(which)
    )
    sums = eval_sums(logits, labels, np.ones(500, bool))
    assert metrics.summarize(sums, GROUPS, SHOTS)["ece"] == pytest.approx(
        100 * expected, rel=1e-4
    )


def test_padding_and_batches():
    logits, labels = examples()
    whole = eval_sums(logits, labels, np.ones(len(labels), bool))
    padded, mask = (
        np.pad(logits, ((0, 31), (0, 0)), constant_values=7),
        np.arange(128) < len(labels),
    )
    batched = jax.tree.map(
        lambda x: x.reshape(4, 32, *x.shape[1:]),
        (padded, np.pad(labels, (0, 31)), mask),
    )
    parts = jax.jit(jax.vmap(metrics.eval_sums))(*batched)
    for got, want in zip(parts, whole):
        np.testing.assert_allclose(got.sum(0), want, rtol=1e-5)
    mapped = jax.pmap(
        lambda *b: jax.lax.psum(metrics.eval_sums(*b), "d"),
        axis_name="d",
        devices=jax.devices()[:4],
    )
    for got, want in zip(mapped(*batched), whole):
        np.testing.assert_allclose(got[0], want, rtol=1e-5)


def test_class_without_examples():
    sums = eval_sums(jnp.eye(C)[:2], jnp.array([0, 1]), jnp.array([True, True]))
    summary = metrics.summarize(sums, GROUPS, SHOTS)
    assert summary["per_class"] == [100.0, 100.0, None, None, None, None]
    assert summary["groups"]["tail"] is None


def bins_of(confidence, hit):
    which = metrics.bin_of(confidence)
    return np.stack(
        [
            np.bincount(which, w, metrics.NUM_BINS)
            for w in (np.ones(len(hit)), confidence, hit)
        ]
    )


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40, 1000])
@pytest.mark.parametrize("p", [1e-9, 0.03, 0.5, 0.97, 1 - 1e-9])
def test_calibration_error_by_chance_is_the_mean_over_all_outcomes(n, p):
    hits = np.arange(n + 1)
    choose = np.array([float(math.comb(n, k)) for k in hits])
    chance = choose * p**hits * (1 - p) ** (n - hits)
    outcomes = [100 * abs(n * p - k) / n for k in hits]
    error = metrics.calibration_error_by_chance(bins_of(np.full(n, p), np.zeros(n)))
    assert error == pytest.approx(float(chance @ outcomes), rel=1e-6, abs=1e-9)


def test_calibration_error_by_chance_of_many_draws():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, size=300)
    by_chance = metrics.calibration_error_by_chance(bins_of(confidence, confidence))
    drawn = [
        metrics.calibration_error(bins_of(confidence, rng.random(300) < confidence))
        for _ in range(400)
    ]
    assert by_chance == pytest.approx(np.mean(drawn), rel=0.05)


def test_calibration_error_of_no_example():
    empty = np.zeros((2, 3, metrics.NUM_BINS))
    certain = bins_of(np.ones(5), np.ones(5))
    for error in (metrics.calibration_error, metrics.calibration_error_by_chance):
        assert error(empty).tolist() == [0, 0] and error(certain) == 0
