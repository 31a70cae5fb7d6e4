"""Distillation losses of the methods that both papers compare with.

Each is the soft loss alone, to which a caller adds the hard loss.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax.typing import ArrayLike

from ltkd_jax.groups import check_counts
from ltkd_jax.losses import _common, _statistics
from ltkd_jax.losses._common import Scalar

# Keeps WSL's ratio finite for a teacher that is certain and right.
_MIN_TEACHER_LOSS = 1e-7


def kd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the knowledge distillation loss of Hinton et al.

        τ² KL(softmax(z^T/τ) ‖ softmax(z^S/τ))

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> kd(jnp.ones((2, 3)), jnp.zeros((2, 3))).tolist()  # softmax ignores an offset
    [0.0, 0.0]
    """
    student, teacher = _common.check_pair(
        student_logits, teacher_logits, temperature, where
    )
    exists = None if where is None else _common.class_mask(where, student)
    statistics = _statistics.of_set(student, teacher, temperature, exists)
    return temperature**2 * statistics.kl


def dkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the loss of decoupled knowledge distillation: τ² (α TCKD + β NCKD).

    TCKD is the KL between the binary distributions (target, all other classes), NCKD
    the KL over the other classes, renormalised. This is the group split, see
    `group_kl`, with two groups for each example: its target, and all other classes.
    TCKD is its `inter`, NCKD the `intra` of the second group.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      labels: int `[...]`, in `[0, C)`.
      alpha, beta: weights of TCKD and NCKD.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> dkd(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.array([0, 1])).shape
    (2,)
    """
    student, teacher = _common.check_pair(
        student_logits, teacher_logits, temperature, where
    )
    is_label = _common.label_mask(labels, student)
    exists = _common.class_mask(where, student)
    target = is_label & exists
    others = ~is_label & exists
    of_others = _statistics.of_set(student, teacher, temperature, others)

    def log_binary(
        logits: jax.Array, others_max: jax.Array, others_log_sum: jax.Array
    ) -> jax.Array:
        """Returns the log probabilities of the target and of all others, `[..., 2]`."""
        target_logit = jnp.sum(logits, axis=-1, where=target)
        log_odds = (target_logit - others_max) / temperature - others_log_sum
        return jax.nn.log_sigmoid(jnp.stack([log_odds, -log_odds], axis=-1))

    tckd = _common.kl(
        log_binary(teacher, of_others.teacher_max, of_others.teacher_log_sum),
        log_binary(student, of_others.student_max, of_others.student_log_sum),
    )
    # Without others the target has all of the mass.
    tckd = jnp.where(others.any(axis=-1), tckd, 0)
    _common.check_scalar(alpha, "alpha")
    _common.check_scalar(beta, "beta")
    loss = temperature**2 * (alpha * tckd + beta * of_others.kl)
    return jnp.where(target.any(axis=-1), loss, jnp.nan)


def dive(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    power: Scalar = 0.5,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the soft loss of DiVE: τ² KL(q ‖ p^S), with q_c ∝ (p^T_c)^power.

    DiVE is (1 − a) · `balanced_softmax` + a · this. Power 1 is `kd`; a smaller power
    flattens the teacher's distribution.

    Source: He et al., "Distilling Virtual Examples for Long-tailed Recognition",
    ICCV 2021.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      power: exponent of p^T.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> dive(jnp.zeros((2, 3)), jnp.eye(2, 3), power=1.0).shape
    (2,)
    """
    student, teacher = _common.scale_pair(
        student_logits, teacher_logits, temperature, where
    )
    log_q = _common.log_softmax(power * teacher, where)
    log_p_student = _common.log_softmax(student, where)
    return temperature**2 * _common.kl(log_q, log_p_student, where)


def bkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    class_weights: npt.ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the soft loss of balanced distillation: τ² KL(q ‖ p^S), q_c ∝ w_c p^T_c.

    BKD is `cross_entropy` + a · this.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning",
    2021.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      class_weights: `[C]`, w, positive, such as
        `effective_number_weights(class_counts)`.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> weights = effective_number_weights([100, 10, 1])
    >>> bkd(jnp.zeros((2, 3)), jnp.eye(2, 3), weights).shape
    (2,)
    """
    student, teacher = _common.scale_pair(
        student_logits, teacher_logits, temperature, where
    )
    weights = _common.class_vector(class_weights, student, "class_weights")
    log_weights = jax.lax.stop_gradient(jnp.log(weights))
    log_q = _common.log_softmax(teacher + log_weights, where)
    log_p_student = _common.log_softmax(student, where)
    return temperature**2 * _common.kl(log_q, log_p_student, where)


def effective_number_weights(
    class_counts: npt.ArrayLike, *, beta: float = 0.9999
) -> jax.Array:
    """Computes class weights from the effective number of samples.

        w_c ∝ (1 − b) / (1 − b^n_c),  scaled to sum to C

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
    CVPR 2019, as BKD uses it.

    Args:
      class_counts: `[C]`, training images of each class, positive, not traced.
      beta: b, in (0, 1).

    Returns:
      `[C]`, with sum C.

    >>> effective_number_weights([10, 10]).tolist()
    [1.0, 1.0]
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie strictly between 0 and 1")
    counts = check_counts(class_counts)
    # −expm1(n log b) is 1 − bⁿ without the cancellation that loses the digits of small
    # n. The factor 1 − b cancels in the scaling.
    weights = jnp.asarray([-1.0 / math.expm1(n * math.log(beta)) for n in counts])
    return weights * (len(counts) / weights.sum())


def wsl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the soft loss of weighted soft labels.

        τ² (1 − exp(−h^S / h^T)) · (−Σ_c p^T_c log p^S_c)

    h^S and h^T are the cross-entropies of student and teacher at temperature 1. The
    factor in front of the sum carries no gradient, and the divisor h^T is at least
    1e-7. WSL is `cross_entropy` + a · this.

    Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation", ICLR 2021.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      labels: int `[...]`, in `[0, C)`.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ². It is a cross-entropy, not a KL, so it is not 0 where
      student and teacher are equal.

    >>> import jax.numpy as jnp
    >>> wsl(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.array([0, 1])).shape
    (2,)
    """
    student, teacher = _common.scale_pair(
        student_logits, teacher_logits, temperature, where
    )
    student_loss = _accurate_cross_entropy(student_logits, labels, where)
    teacher_loss = _accurate_cross_entropy(teacher_logits, labels, where)
    ratio = student_loss / jnp.maximum(teacher_loss, _MIN_TEACHER_LOSS)
    factor = jax.lax.stop_gradient(-jnp.expm1(-ratio))
    exists = _common.class_mask(where, student)
    log_p_teacher = _common.log_softmax(teacher, where)
    log_p_student = _common.log_softmax(student, where)
    soft_loss = -jnp.sum(jnp.exp(log_p_teacher) * log_p_student, axis=-1, where=exists)
    return temperature**2 * factor * soft_loss


def _accurate_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> jax.Array:
    """Computes the cross-entropy as log(1 + Σ_{j≠y} exp(z_j − z_y)), without gradient.

    It keeps its relative precision where it is as small as 1e-6, which a ratio of two
    of them needs: −log softmax(z)_y is a difference of numbers that are rounded at
    1e-7.
    """
    logits = jax.lax.stop_gradient(
        _common.subtract_max(_common.as_float(logits), where)
    )
    is_label = _common.label_mask(labels, logits)
    exists = _common.class_mask(where, logits)
    label_logit = jnp.sum(logits, axis=-1, where=is_label)
    others = jax.nn.logsumexp(logits, axis=-1, where=exists & ~is_label)
    loss = jnp.logaddexp(0.0, others - label_logit)
    return jnp.where((is_label & exists).any(axis=-1), loss, jnp.nan)
