"""Distillation losses that both papers compare with. Each is the soft part alone; add the hard loss yourself."""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax.typing import ArrayLike

from ltkd_jax.groups import check_counts
from ltkd_jax.losses import _common, ltkd
from ltkd_jax.losses._common import Scalar

_MIN_TEACHER_LOSS = (
    1e-7  # the divisor of WSL's ratio, for a teacher that is certain and right
)


def kd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Knowledge distillation: τ² KL(softmax(z^T/τ) ‖ softmax(z^S/τ)).

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> kd(jnp.ones((2, 3)), jnp.zeros((2, 3))).tolist()  # the softmax ignores a common offset
    [0.0, 0.0]
    """
    student, teacher = _common.logit_pair(
        student_logits, teacher_logits, temperature, where
    )
    log_p, log_q = (
        _common.log_softmax(teacher, where),
        _common.log_softmax(student, where),
    )
    return temperature**2 * _common.kl(log_p, log_q, where)


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
    """Decoupled distillation: τ² (α TCKD + β NCKD).

    TCKD is the KL of the binary (target, rest) distributions, NCKD the KL over the classes that are not the
    target, renormalised. It is the group split with the two groups {target} and {rest} of each example: TCKD is
    its `inter`, NCKD the `intra` of the rest.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      labels: int `[...]`, in `[0, C)`.
      alpha, beta: weights of TCKD and NCKD.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> dkd(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.array([0, 1])).shape
    (2,)
    """
    student, teacher = _common.pair(student_logits, teacher_logits, temperature, where)
    target, exists = (
        _common.is_label(labels, student),
        _common.class_mask(where, student),
    )
    member = jnp.stack([target & exists, ~target & exists], axis=-2)
    split = ltkd.membership_kl(student, teacher, member, temperature)
    loss = temperature**2 * (alpha * split.inter + beta * split.intra[..., 1])
    return jnp.where((target & exists).any(axis=-1), loss, jnp.nan)


def dive(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    power: Scalar = 0.5,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The soft part of DiVE: τ² KL(q ‖ p^S), with q the teacher's p^T raised to a power and renormalised.

    Source: He et al., "Distilling Virtual Examples for Long-tailed Recognition", ICCV 2021. DiVE is
    (1−a) · balanced softmax + a · this; power 1 is `kd`, a smaller one flattens the teacher.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      power: exponent of p^T.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> dive(jnp.zeros((2, 3)), jnp.eye(2, 3), power=1.0).shape
    (2,)
    """
    student, teacher = _common.logit_pair(
        student_logits, teacher_logits, temperature, where
    )
    log_q = _common.log_softmax(power * teacher, where)
    return temperature**2 * _common.kl(
        log_q, _common.log_softmax(student, where), where
    )


def bkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    class_weights: npt.ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The soft part of balanced knowledge distillation: τ² KL(q ‖ p^S), with q_c ∝ w_c p^T_c.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021. BKD is CE + a · this.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      class_weights: `[C]`, positive, such as `effective_number_weights(class_counts)`.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> bkd(jnp.zeros((2, 3)), jnp.eye(2, 3), effective_number_weights([100, 10, 1])).shape
    (2,)
    """
    student, teacher = _common.logit_pair(
        student_logits, teacher_logits, temperature, where
    )
    log_weights = jax.lax.stop_gradient(
        jnp.log(_common.class_vector(class_weights, student, "class_weights"))
    )
    log_q = _common.log_softmax(teacher + log_weights, where)
    return temperature**2 * _common.kl(
        log_q, _common.log_softmax(student, where), where
    )


def effective_number_weights(
    class_counts: npt.ArrayLike, *, beta: float = 0.9999
) -> jax.Array:
    """Class weights by effective number of samples: w_c ∝ (1−b) / (1−b^{n_c}), scaled to sum to C.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as BKD uses it.

    Args:
      class_counts: `[C]` training images of each class, positive, known on the host.
      beta: b, in (0, 1).

    Returns:
      `[C]`, summing to C.

    >>> effective_number_weights([10, 10]).tolist()
    [1.0, 1.0]
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie strictly between 0 and 1")
    counts = check_counts(class_counts)
    # −expm1(n log b) is 1 − bⁿ without the cancellation that loses the tail's digits. The factor 1−b cancels.
    weights = jnp.asarray([-1.0 / math.expm1(n * math.log(beta)) for n in counts])
    return weights * (len(counts) / weights.sum())


def _sure_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> jax.Array:
    """Cross-entropy as log(1 + Σ_{j≠y} exp(z_j − z_y)): right to rounding also where it is 1e-6, as a ratio needs.

    −log softmax(z)_y is then a difference of numbers rounded at 1e-7. For values; it carries no gradient.
    """
    logits = jax.lax.stop_gradient(_common.from_top(_common.as_float(logits), where))
    target, exists = _common.is_label(labels, logits), _common.class_mask(where, logits)
    rest = jax.nn.logsumexp(logits, axis=-1, where=exists & ~target)
    loss = jnp.logaddexp(0.0, rest - jnp.sum(logits, axis=-1, where=target))
    return jnp.where((target & exists).any(axis=-1), loss, jnp.nan)


def wsl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The soft part of weighted soft labels: τ² (1 − exp(−h^S/h^T)) · (−Σ p^T log p^S).

    h^S and h^T are the cross-entropies of student and teacher at temperature 1; the factor carries no gradient,
    and the divisor is at least 1e-7. WSL is CE + a · this.

    Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation", ICLR 2021.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      labels: int `[...]`, in `[0, C)`.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor. It is a cross-entropy, not a KL: not 0 at equality.

    >>> import jax.numpy as jnp
    >>> wsl(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.array([0, 1])).shape
    (2,)
    """
    student, teacher = _common.logit_pair(
        student_logits, teacher_logits, temperature, where
    )
    ratio = _sure_cross_entropy(student_logits, labels, where) / jnp.maximum(
        _sure_cross_entropy(teacher_logits, labels, where), _MIN_TEACHER_LOSS
    )
    factor = jax.lax.stop_gradient(-jnp.expm1(-ratio))
    exists = _common.class_mask(where, student)
    log_p, log_q = (
        _common.log_softmax(teacher, where),
        _common.log_softmax(student, where),
    )
    return (
        temperature**2
        * factor
        * -jnp.sum(jnp.exp(log_p) * log_q, axis=-1, where=exists)
    )
