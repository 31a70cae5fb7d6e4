"""Evaluation as sums: masked counts on the device that add up over batches and devices, then one summary."""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltkd_jax.groups import ClassGroups

NUM_BINS = 15  # of the expected calibration error
_Array = TypeVar("_Array", jax.Array, np.ndarray)


class EvalSums(NamedTuple):
    """Sums over examples; those of two batches, or of two devices, add up.

    Attributes:
      confusion: `[C, C]`, number of examples by (label, prediction).
      bins: `[3, NUM_BINS]`, number, sum of confidences and number of hits, by confidence of the prediction.
      mass: `[C]`, sum of the predicted probabilities.
    """

    confusion: jax.Array
    bins: jax.Array
    mass: jax.Array


def eval_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> EvalSums:
    """The sums of one batch.

    Args:
      logits: `[B, C]`.
      labels: int `[B]`.
      mask: bool `[B]`, false for padding.

    >>> sums = eval_sums(jnp.eye(3), jnp.array([0, 1, 0]), jnp.array([True, True, False]))
    >>> jnp.diag(sums.confusion).tolist()
    [1.0, 1.0, 0.0]
    """
    num_classes = logits.shape[-1]
    probabilities = jax.nn.softmax(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    )
    weight = mask.astype(jnp.float32)
    prediction = jnp.argmax(logits, axis=-1)
    confidence = jnp.max(probabilities, axis=-1)
    hit = weight * (prediction == labels)
    by_bin = jnp.stack([weight, weight * confidence, hit], axis=-1)
    return EvalSums(
        confusion=jnp.zeros((num_classes, num_classes))
        .at[labels, prediction]
        .add(weight),
        bins=jnp.zeros((NUM_BINS, 3)).at[bin_of(confidence)].add(by_bin).T,
        mass=jnp.sum(probabilities * weight[:, None], axis=0),
    )


def bin_of(confidence: _Array) -> _Array:
    """The bin, int32, of each confidence in [0, 1]; all bins are of one width, and 1 falls into the last."""
    return (confidence * NUM_BINS).astype(np.int32).clip(0, NUM_BINS - 1)


def calibration_error(bins: ArrayLike) -> np.ndarray:
    """The expected calibration error in percent, of sums as `EvalSums.bins`.

        100 / N · Σ_b |confidence_b − hits_b|

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
      bins: `[..., 3, NUM_BINS]`.

    Returns:
      `[...]`; 0 where there is no example.

    >>> float(calibration_error([[2.0, 2.0], [0.5, 1.75], [1.0, 2.0]]))  # |0.5 − 1| + |1.75 − 2| of 4
    18.75
    """
    count, confidence, hits = np.moveaxis(np.asarray(bins, np.float64), -2, 0)
    return (
        100 * np.abs(confidence - hits).sum(axis=-1) / np.maximum(count.sum(axis=-1), 1)
    )


def calibration_error_by_chance(bins: ArrayLike) -> np.ndarray:
    """The calibration error in percent that a perfectly calibrated model is expected to show on so few examples.

    Of n examples with confidence p, hits are binomial, and their mean distance from n·p is, with k = ⌊np⌋ + 1,
    2k (1−p) C(n, k) p^k (1−p)^(n−k). Source: De Moivre 1730, in Diaconis and Zabell, "Closed form summation for
    classical distributions", 1991. All of a bin are taken at their mean confidence, which is a little too much.

    Args:
      bins: `[..., 3, NUM_BINS]`, as `EvalSums.bins`.

    Returns:
      `[...]`; 0 where there is no example.

    >>> float(calibration_error_by_chance([[1.0], [0.5], [1.0]]))  # one example is right or wrong: 0.5 off
    50.0
    """
    count, confidence, _ = np.moveaxis(np.asarray(bins, np.float64), -2, 0)
    p = confidence / np.maximum(count, 1)
    inside = (p > 0) & (p < 1)
    n, p = np.where(inside, count, 1.0), np.where(inside, p, 0.5)
    k = np.minimum(np.floor(n * p) + 1, n)  # n·p may be rounded up to n
    choose = _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
    distance = 2 * k * (1 - p) * np.exp(choose + k * np.log(p) + (n - k) * np.log1p(-p))
    return (
        100
        * np.where(inside, distance, 0).sum(axis=-1)
        / np.maximum(count.sum(axis=-1), 1)
    )


_log_factorial = np.vectorize(lambda n: math.lgamma(n + 1), otypes=[np.float64])


def summarize(
    sums: EvalSums, groups: ClassGroups, shots: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Accuracies in percent: overall, per class, per group and per shot; calibration; confusion between groups.

    Args:
      sums: `EvalSums` over a whole set.
      groups: a `ClassGroups`.
      shots: bool masks `[C]` by name, see `groups.shots`.

    Returns:
      A dict for JSON. A set of classes without examples gets None. `confusion[g][h]` is the percentage of group
      g's examples that are predicted in group h. `ece` is the expected calibration error over 15 bins.
    """
    confusion = np.asarray(sums.confusion, np.float64)
    assignment = np.asarray(groups.assignment)
    members = {name: assignment == g for g, name in enumerate(groups.names)}
    between = np.array(
        [
            [confusion[np.ix_(a, b)].sum() for b in members.values()]
            for a in members.values()
        ]
    )
    return {
        "all": _accuracy(confusion, slice(None)),
        "per_class": [
            _accuracy(confusion, np.array([c])) for c in range(len(confusion))
        ],
        "groups": {name: _accuracy(confusion, mask) for name, mask in members.items()},
        "shots": {name: _accuracy(confusion, mask) for name, mask in shots.items()},
        "ece": float(calibration_error(sums.bins)),
        "confusion": (
            100 * between / np.maximum(between.sum(axis=1, keepdims=True), 1)
        ).tolist(),
    }


def group_mass(sums: EvalSums, groups: ClassGroups) -> dict[str, float]:
    """The mean predicted probability of each group: LTKD's measure of a teacher's bias, as a share of 1."""
    mass = np.asarray(sums.mass, np.float64)
    assignment = np.asarray(groups.assignment)
    return {
        name: float(mass[assignment == g].sum() / mass.sum())
        for g, name in enumerate(groups.names)
    }


def _accuracy(confusion: np.ndarray, classes: slice | np.ndarray) -> float | None:
    total = confusion[classes].sum()
    return 100 * float(np.diag(confusion)[classes].sum() / total) if total else None
