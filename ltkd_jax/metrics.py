"""Evaluation as sums: masked counts on the device that add up over batches and devices, then one summary."""

from __future__ import annotations  # so that help() shows ArrayLike, not all that it stands for

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltkd_jax.groups import ClassGroups

NUM_BINS = 15  # of the expected calibration error


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
    probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    weight = mask.astype(jnp.float32)
    prediction = jnp.argmax(logits, axis=-1)
    confidence = jnp.max(probabilities, axis=-1)
    hit = weight * (prediction == labels)
    bin_index = jnp.clip((confidence * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    by_bin = jnp.stack([weight, weight * confidence, hit], axis=-1)
    return EvalSums(
        confusion=jnp.zeros((num_classes, num_classes)).at[labels, prediction].add(weight),
        bins=jnp.zeros((NUM_BINS, 3)).at[bin_index].add(by_bin).T,
        mass=jnp.sum(probabilities * weight[:, None], axis=0),
    )


def summarize(sums: EvalSums, groups: ClassGroups, shots: dict[str, np.ndarray]) -> dict[str, Any]:
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
    count, confidence, hits = np.asarray(sums.bins, np.float64)
    between = np.array([[confusion[np.ix_(a, b)].sum() for b in members.values()] for a in members.values()])
    return {
        "all": _accuracy(confusion, slice(None)),
        "per_class": [_accuracy(confusion, np.array([c])) for c in range(len(confusion))],
        "groups": {name: _accuracy(confusion, mask) for name, mask in members.items()},
        "shots": {name: _accuracy(confusion, mask) for name, mask in shots.items()},
        "ece": 100 * float(np.abs(confidence - hits).sum() / max(count.sum(), 1)),
        "confusion": (100 * between / np.maximum(between.sum(axis=1, keepdims=True), 1)).tolist(),
    }


def group_mass(sums: EvalSums, groups: ClassGroups) -> dict[str, float]:
    """The mean predicted probability of each group: LTKD's measure of a teacher's bias, as a share of 1."""
    mass = np.asarray(sums.mass, np.float64)
    assignment = np.asarray(groups.assignment)
    return {name: float(mass[assignment == g].sum() / mass.sum()) for g, name in enumerate(groups.names)}


def _accuracy(confusion: np.ndarray, classes: slice | np.ndarray) -> float | None:
    total = confusion[classes].sum()
    return 100 * float(np.diag(confusion)[classes].sum() / total) if total else None
