"""Evaluation sums against NumPy, with padding, over batches and devices."""

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


def draw(number=97, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, C)).astype(np.float32) * 2
    return logits, rng.integers(0, C, number).astype(np.int32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_summary_equals_numpy():
    logits, labels = draw()
    sums = eval_sums(logits, labels, np.ones(len(labels), bool))
    summary = metrics.summarize(sums, GROUPS, SHOTS)
    prediction = logits.argmax(-1)
    hit = prediction == labels
    assert summary["all"] == pytest.approx(100 * hit.mean())
    for c in range(C):
        assert summary["per_class"][c] == pytest.approx(100 * hit[labels == c].mean())
    assignment = np.asarray(GROUPS.assignment)
    mass = softmax(logits).mean(0)
    group_mass = {}
    for g, name in enumerate(GROUPS.names):
        in_group = assignment[labels] == g
        accuracy = 100 * hit[in_group].mean()
        assert summary["groups"][name] == pytest.approx(accuracy)
        for h in range(GROUPS.num_groups):
            share = (assignment[prediction][in_group] == h).mean()
            assert summary["confusion"][g][h] == pytest.approx(100 * share)
        group_mass[name] = mass[assignment == g].sum()
    assert summary["shots"]["many"] == pytest.approx(100 * hit[labels < 2].mean())
    assert summary["shots"]["few"] is None
    assert summary["group_mass"] == pytest.approx(group_mass, rel=1e-5)


def test_calibration_error():
    logits, labels = draw(500, seed=3)
    confidence = softmax(logits).max(-1)
    hit = logits.argmax(-1) == labels
    indices = (confidence * metrics.NUM_BINS).astype(int)
    indices = np.minimum(indices, metrics.NUM_BINS - 1)
    expected = 0
    for b in np.unique(indices):
        in_bin = indices == b
        gap = abs(confidence[in_bin].mean() - hit[in_bin].mean())
        expected += in_bin.mean() * gap
    sums = eval_sums(logits, labels, np.ones(500, bool))
    actual = metrics.summarize(sums, GROUPS, SHOTS)["ece"]
    assert actual == pytest.approx(100 * expected, rel=1e-4)


def test_padding_and_batches():
    logits, labels = draw()
    expected = eval_sums(logits, labels, np.ones(len(labels), bool))
    padded = (
        np.pad(logits, ((0, 31), (0, 0)), constant_values=7),
        np.pad(labels, (0, 31)),
        np.arange(128) < len(labels),
    )
    batches = jax.tree.map(lambda x: x.reshape(4, 32, *x.shape[1:]), padded)
    sums_of_batches = jax.jit(jax.vmap(metrics.eval_sums))(*batches)
    sums_of_devices = jax.pmap(
        lambda *batch: jax.lax.psum(metrics.eval_sums(*batch), "d"),
        axis_name="d",
        devices=jax.devices()[:4],
    )(*batches)
    for field in metrics.EvalSums._fields:
        total = getattr(expected, field)
        batch_sums = getattr(sums_of_batches, field)
        np.testing.assert_allclose(batch_sums.sum(0), total, rtol=1e-5)
        device_sums = getattr(sums_of_devices, field)
        np.testing.assert_allclose(device_sums[0], total, rtol=1e-5)


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("label", [0, -1, 7])
def test_padding_counts_nowhere(padding, label):
    logits = np.array([[1.0, 2.0, 3.0], [padding] * 3], np.float32)
    labels = np.array([2, label])
    mask = np.array([True, False])
    expected = metrics.eval_sums(logits[:1], labels[:1], mask[:1])
    for function in (metrics.eval_sums, jax.jit(metrics.eval_sums)):
        sums = function(logits, labels, mask)
        jax.tree.map(np.testing.assert_array_equal, sums, expected)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label):
    arguments = np.ones((2, 3)), np.array([label, 0]), np.array([True, True])
    with pytest.raises(ValueError, match=f"labels has {label}.*C = 3"):
        metrics.eval_sums(*arguments)
    # Under `jit` the values are not known: the sums must not look right.
    sums = jax.jit(metrics.eval_sums)(*arguments)
    assert np.isnan(sums.confusion).any()
    assert np.isnan(sums.bins).any()
    assert np.isnan(sums.mass).all()


def test_class_without_examples():
    sums = eval_sums(jnp.eye(C)[:2], jnp.array([0, 1]), jnp.array([True, True]))
    summary = metrics.summarize(sums, GROUPS, SHOTS)
    assert summary["per_class"] == [100.0, 100.0, None, None, None, None]
    assert summary["groups"]["tail"] is None


def bins_of(confidence, hit):
    """Returns the sums of `EvalSums.bins`."""
    indices = metrics.bin_index(confidence)
    values = (np.ones(len(hit)), confidence, hit)
    return np.stack([np.bincount(indices, v, metrics.NUM_BINS) for v in values])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40, 1000])
@pytest.mark.parametrize("p", [1e-9, 0.03, 0.5, 0.97, 1 - 1e-9])
def test_calibration_error_by_chance_of_a_bin(n, p):
    """It is the mean over all outcomes."""
    hits = np.arange(n + 1)
    choose = np.array([float(math.comb(n, k)) for k in hits])
    probability = choose * p**hits * (1 - p) ** (n - hits)
    outcomes = [100 * abs(n * p - k) / n for k in hits]
    actual = metrics.calibration_error_by_chance(bins_of(np.full(n, p), np.zeros(n)))
    assert actual == pytest.approx(float(probability @ outcomes), rel=1e-6, abs=1e-9)


def test_chance_calibration_error_many_draws():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, size=300)
    by_chance = metrics.calibration_error_by_chance(bins_of(confidence, confidence))
    drawn = []
    for _ in range(400):
        bins = bins_of(confidence, rng.random(300) < confidence)
        drawn.append(metrics.calibration_error(bins))
    assert by_chance == pytest.approx(np.mean(drawn), rel=0.05)


def test_calibration_error_empty():
    empty = np.zeros((2, 3, metrics.NUM_BINS))
    certain = bins_of(np.ones(5), np.ones(5))
    for error in (metrics.calibration_error, metrics.calibration_error_by_chance):
        assert error(empty).tolist() == [0, 0]
        assert error(certain) == 0
