"""Evaluation by sums, which are added up over batches and devices and then summarized.

The sums are computed on the device, the summary on the host.
"""

# So that help() shows ArrayLike, not all that it stands for.
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
    """Holds sums over examples; those of two batches, or of two devices, add up.

    Attributes:
      confusion: `[C, C]`, number of examples by (label, prediction).
      bins: `[3, NUM_BINS]`; for each bin of confidences, the number of its examples,
        the sum of their confidences and the number of hits.
      mass: `[C]`, sum of the predicted probabilities.
    """

    confusion: jax.Array
    bins: jax.Array
    mass: jax.Array


def eval_sums(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike) -> EvalSums:
    """Computes the sums of one batch.

    Args:
      logits: `[B, C]`.
      labels: int `[B]`, in `[0, C)`.
      mask: bool `[B]`, false for padding, which counts nowhere, whatever its logits and
        its label are.

    Raises:
      ValueError: concrete labels outside `[0, C)`, except of padding. A traced one
        makes all sums NaN.

    >>> logits, labels = jnp.eye(3), jnp.array([0, 1, 0])
    >>> sums = eval_sums(logits, labels, mask=jnp.array([True, True, False]))
    >>> jnp.diag(sums.confusion).tolist()
    [1.0, 1.0, 0.0]
    """
    num_classes = jnp.shape(logits)[-1]
    _check_labels(labels, mask, num_classes)
    logits = jnp.asarray(logits)
    labels = jnp.asarray(labels)
    mask = jnp.asarray(mask)
    # A NaN in padding would reach the sums as 0 · NaN.
    logits = jnp.where(mask[:, None], logits, 0)
    labels = jnp.where(mask, labels, 0)
    probabilities = jax.nn.softmax(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    )
    # An index of −1 would be the last class, and one of C or more would be dropped: NaN
    # as the weight makes either visible.
    is_label = (labels >= 0) & (labels < num_classes)
    weight = jnp.where(is_label, mask.astype(jnp.float32), jnp.nan)
    labels = jnp.where(is_label, labels, 0)
    prediction = jnp.argmax(logits, axis=-1)
    confidence = jnp.max(probabilities, axis=-1)
    hit = weight * (prediction == labels)

    confusion = jnp.zeros((num_classes, num_classes))
    confusion = confusion.at[labels, prediction].add(weight)
    bin_values = jnp.stack([weight, weight * confidence, hit], axis=-1)
    bins = jnp.zeros((NUM_BINS, 3)).at[bin_index(confidence)].add(bin_values)
    mass = jnp.sum(probabilities * weight[:, None], axis=0)
    return EvalSums(confusion, bins.T, mass)


def _check_labels(labels: ArrayLike, mask: ArrayLike, num_classes: int) -> None:
    """Raises a ValueError for concrete labels outside `[0, C)`, except of padding."""
    if isinstance(labels, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    counted = np.asarray(labels)[np.asarray(mask)]
    wrong = counted[(counted < 0) | (counted >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"labels has {wrong[0]}, which is outside [0, C) with C = {num_classes}: "
            "set mask to false for examples without a label"
        )


def bin_index(confidence: _Array) -> _Array:
    """Returns the index, int32, of the bin of each confidence in [0, 1].

    All bins have the same width; confidence 1 is in the last.
    """
    return (confidence * NUM_BINS).astype(np.int32).clip(0, NUM_BINS - 1)


def calibration_error(bins: ArrayLike) -> np.ndarray:
    """Computes the expected calibration error in percent.

        100 / N · Σ_b |confidence_b − hits_b|

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
      bins: `[..., 3, NUM_BINS]`, see `EvalSums.bins`.

    Returns:
      `[...]`; 0 where there is no example.

    >>> bins = [[2.0, 2.0], [0.5, 1.75], [1.0, 2.0]]  # |0.5 − 1| + |1.75 − 2| of 4
    >>> float(calibration_error(bins))
    18.75
    """
    count, confidence, hits = np.moveaxis(np.asarray(bins, np.float64), -2, 0)
    num_examples = np.maximum(count.sum(axis=-1), 1)
    return 100 * np.abs(confidence - hits).sum(axis=-1) / num_examples


def calibration_error_by_chance(bins: ArrayLike) -> np.ndarray:
    """Computes the calibration error expected of a perfectly calibrated model.

    It is not 0, because a bin has finitely many examples. The hits among n examples of
    confidence p are binomial, and their mean distance from n·p is, with k = ⌊np⌋ + 1,

        2k (1 − p) C(n, k) p^k (1 − p)^(n−k).

    All examples of a bin are taken at their mean confidence, which overestimates the
    distance a little.

    Source: De Moivre 1730, in Diaconis and Zabell, "Closed form summation for classical
    distributions", 1991.

    Args:
      bins: `[..., 3, NUM_BINS]`, see `EvalSums.bins`.

    Returns:
      `[...]`, in percent; 0 where there is no example.

    >>> bins = [[1.0], [0.5], [1.0]]  # one example is right or wrong: 0.5 off
    >>> float(calibration_error_by_chance(bins))
    50.0
    """
    count, confidence, _ = np.moveaxis(np.asarray(bins, np.float64), -2, 0)
    num_examples = np.maximum(count.sum(axis=-1), 1)
    p = confidence / np.maximum(count, 1)
    # For p = 0 and p = 1, and in empty bins, the distance is 0, but its formula has
    # log 0: it is evaluated at n = 1, p = 1/2 there, and the result is not used.
    inside = (p > 0) & (p < 1)
    n = np.where(inside, count, 1.0)
    p = np.where(inside, p, 0.5)
    k = np.minimum(np.floor(n * p) + 1, n)  # n·p may be rounded up to n
    # In logs, since C(n, k) overflows and p^k underflows for large n.
    log_binomial = _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
    log_power = log_binomial + k * np.log(p) + (n - k) * np.log1p(-p)
    distance = 2 * k * (1 - p) * np.exp(log_power)
    return 100 * np.where(inside, distance, 0).sum(axis=-1) / num_examples


_log_factorial = np.vectorize(lambda n: math.lgamma(n + 1), otypes=[np.float64])


def summarize(
    sums: EvalSums, groups: ClassGroups, shots: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Summarizes accuracies, calibration, and the confusion and mass of the groups.

    Args:
      sums: `EvalSums` over a data set.
      groups: a `ClassGroups`.
      shots: bool masks `[C]` by name, see `groups.shots`.

    Returns:
      A dict for JSON, with accuracies in percent, None for classes without examples:

      - `all`, and `per_class`, `groups` and `shots`, by class, group and shot;
      - `ece`, the expected calibration error over 15 bins;
      - `confusion[g][h]`, the percentage of group g's examples that are predicted in
        group h;
      - `group_mass`, see that function.
    """
    confusion = np.asarray(sums.confusion, np.float64)
    num_classes = len(confusion)
    assignment = np.asarray(groups.assignment)
    group_masks = {name: assignment == g for g, name in enumerate(groups.names)}
    return {
        "all": _accuracy(confusion, np.ones(num_classes, bool)),
        "per_class": [_accuracy(confusion, np.array([c])) for c in range(num_classes)],
        "groups": _accuracies(confusion, group_masks),
        "shots": _accuracies(confusion, shots),
        "ece": float(calibration_error(sums.bins)),
        "confusion": _group_confusion(confusion, list(group_masks.values())),
        "group_mass": group_mass(sums, groups),
    }


def group_mass(sums: EvalSums, groups: ClassGroups) -> dict[str, float]:
    """Computes the mean predicted probability of each group, by its name.

    This is LTKD's measure of a teacher's bias. The masses sum to 1; over balanced
    examples, an unbiased model's are proportional to the groups' numbers of classes.
    """
    mass = np.asarray(sums.mass, np.float64)
    assignment = np.asarray(groups.assignment)
    masses = {}
    for g, name in enumerate(groups.names):
        masses[name] = float(mass[assignment == g].sum() / mass.sum())
    return masses


def _accuracies(
    confusion: np.ndarray, masks: dict[str, np.ndarray]
) -> dict[str, float | None]:
    return {name: _accuracy(confusion, mask) for name, mask in masks.items()}


def _accuracy(confusion: np.ndarray, classes: np.ndarray) -> float | None:
    """Returns the accuracy in percent on some classes: a bool mask `[C]` or indices."""
    total = confusion[classes].sum()
    if not total:
        return None
    hits = np.diag(confusion)[classes].sum()
    return 100 * float(hits / total)


def _group_confusion(
    confusion: np.ndarray, group_masks: list[np.ndarray]
) -> list[list[float]]:
    """Returns the confusion between groups in percent of the examples of a group."""
    num_groups = len(group_masks)
    counts = np.zeros((num_groups, num_groups))
    for g, label_mask in enumerate(group_masks):
        for h, prediction_mask in enumerate(group_masks):
            counts[g, h] = confusion[np.ix_(label_mask, prediction_mask)].sum()
    num_examples = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return (100 * counts / num_examples).tolist()
