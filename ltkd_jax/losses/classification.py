"""Losses of labels: cross-entropy, and two adjustments of it for long-tailed data."""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax.typing import ArrayLike

from ltkd_jax.losses import _common
from ltkd_jax.losses._common import Scalar


def cross_entropy(
    student_logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Computes the cross-entropy with integer labels: −log softmax(z)_y.

    Args:
      student_logits: `[..., C]`.
      labels: int `[...]`, in `[0, C)`.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)
    1.3863
    """
    logits = _common.as_float(student_logits)
    _common.check_logits(logits)
    return _common.cross_entropy(logits, labels, where)


def logit_adjusted(
    student_logits: ArrayLike,
    labels: ArrayLike,
    class_counts: npt.ArrayLike,
    *,
    tau: Scalar = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the cross-entropy of logits shifted by the log class prior.

        −log softmax(z + τ log π)_y,  with π_c = n_c / Σ n

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.

    Args:
      student_logits: `[..., C]`.
      labels: int `[...]`, in `[0, C)`.
      class_counts: `[C]`, training images of each class, positive.
      tau: τ; for 0 this is `cross_entropy`.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> loss = logit_adjusted(jnp.zeros((1, 2)), jnp.array([1]), [9, 1])
    >>> round(float(loss[0]), 4)  # −log(1 / 10)
    2.3026
    """
    logits = _common.as_float(student_logits)
    _common.check_logits(logits)
    counts = _common.class_vector(class_counts, logits, "class_counts")
    shift = tau * jnp.log(counts / counts.sum())
    # The maximum goes first: next to a large offset the shift would be rounded away.
    adjusted = _common.subtract_max(logits, where) + shift
    return _common.cross_entropy(adjusted, labels, where)


def balanced_softmax(
    student_logits: ArrayLike,
    labels: ArrayLike,
    class_counts: npt.ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes balanced softmax, the cross-entropy of logits shifted by log counts.

        −log softmax(z + log n)_y

    This is `logit_adjusted` with τ = 1: the softmax ignores the factor 1 / Σ n.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition",
    NeurIPS 2020.

    Args:
      student_logits: `[..., C]`.
      labels: int `[...]`, in `[0, C)`.
      class_counts: `[C]`, training images of each class, positive.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> loss = balanced_softmax(jnp.zeros((1, 2)), jnp.array([0]), [9, 1])
    >>> round(float(loss[0]), 4)  # −log(9 / 10)
    0.1054
    """
    return logit_adjusted(student_logits, labels, class_counts, where=where)
