"""The group split of the distillation loss, and LTKD's two corrections of it.

With p = softmax(z/τ), group masses p_G = Σ_{i∈G} p_i and distributions within groups
p̃_{i|G} = p_i / p_G, the KL from teacher (T) to student (S) is

    KL(p^T ‖ p^S) = Σ_G p_G^T log(p_G^T / p_G^S)             (`inter`)
                  + Σ_G p_G^T KL(p̃^T_{·|G} ‖ p̃^S_{·|G}).     (p_G^T · `intra_G`)

LTKD rebalances the teacher's group masses over the batch, and gives the intra term of
every group the same weight.

Source: "Biased Teacher, Balanced Student" (arXiv 2506.18496). The split is an identity.
The idea of both corrections is known second-hand, and the formula of the rebalancing is
inferred: no official code is public.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltkd_jax.groups import ClassGroups
from ltkd_jax.losses import _common, _statistics
from ltkd_jax.losses._common import AxisName, Scalar


class GroupKL(NamedTuple):
    """Holds the KL from teacher to student, split by groups; without the factor τ².

    `inter + Σ_G exp(teacher_log_mass) · intra == KL(p^T ‖ p^S)`.

    Attributes:
      inter: `[...]`, KL between the group masses.
      intra: `[..., G]`, KL within each group; 0 for a group without existing classes.
      teacher_log_mass: `[..., G]`, log p_G^T, without gradient; −inf for a group
        without existing classes.
    """

    inter: jax.Array
    intra: jax.Array
    teacher_log_mass: jax.Array


def group_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 1.0,
    where: ArrayLike | None = None,
) -> GroupKL:
    """Splits the distillation KL into terms between and within groups of classes.

        inter = Σ_G p_G^T log(p_G^T / p_G^S)
        intra_G = KL(p̃^T_{·|G} ‖ p̃^S_{·|G})

    Source: LTKD (arXiv 2506.18496), an identity. There is no factor τ² here.

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      A `GroupKL` with inter `[...]`, intra `[..., G]` and teacher_log_mass `[..., G]`.

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups, losses
    >>> g = groups.ClassGroups.from_assignment([0, 0, 1])
    >>> student, teacher = jnp.array([[1., 2., 3.]]), jnp.array([[2., 0., 1.]])
    >>> split = losses.group_kl(student, teacher, g)
    >>> teacher_mass = jnp.exp(split.teacher_log_mass)
    >>> total = split.inter + (teacher_mass * split.intra).sum(-1)
    >>> bool(jnp.allclose(total, losses.kd(student, teacher, temperature=1.0)))
    True
    """
    student, teacher = _common.check_pair(
        student_logits, teacher_logits, temperature, where
    )
    split = _split(student, teacher, groups, temperature, where)
    inter = _common.kl(
        split.teacher_log_mass, split.student_log_mass, split.group_exists
    )
    teacher_log_mass = jnp.where(split.group_exists, split.teacher_log_mass, -jnp.inf)
    return GroupKL(inter, split.intra, teacher_log_mass)


def rebalance(
    teacher_log_mass: ArrayLike,
    *,
    axis_name: AxisName = None,
    where: ArrayLike | None = None,
    example_mask: ArrayLike | None = None,
    teacher_mass: ArrayLike | None = None,
) -> jax.Array:
    """Scales the teacher's group masses so that all groups have the same batch sum.

        s_G = Σ_b p_G(b)
        c_G = (Σ_G' s_G' / G) / s_G
        p̂_G(b) = c_G p_G(b) / Σ_G' c_G' p_G'(b)

    The numerator of c_G is the same for all groups, so it cancels in p̂. The target of
    an example therefore depends on the rest of its batch, and a batch of one has the
    target 1/G. With `teacher_mass`, s_G is given and p̂ depends on the example alone:

        p̂_G(b) = (p_G(b) / s_G) / Σ_G' (p_G'(b) / s_G')

    Small batches, and parts of a batch whose gradients are accumulated, then have the
    same targets as a large batch. That is this library's extension.

    Source: LTKD (arXiv 2506.18496); the idea is known second-hand, this formula is
    inferred.

    Args:
      teacher_log_mass: `[B, G]`, log p_G. Logs, because a group's mass can underflow.
      axis_name: name of the device axis (or axes) over which the batch is split, under
        `pmap` or `shard_map`.
      where: bool, broadcastable to `[B, G]`: the groups that exist. The others get −inf
        and are left out of the sums.
      example_mask: bool `[B]`: false for padding, which is left out of s_G.
      teacher_mass: `[G]`, s_G up to a common factor: such as the mean (or the sum) of
        p_G over the whole training set, at the temperature of p_G.

    Returns:
      `[B, G]`, log p̂_G, without gradient; of padding, any finite numbers.

    Raises:
      ValueError: a concrete `teacher_mass` that is not positive and finite.

    >>> import jax.numpy as jnp
    >>> mass = jnp.array([[0.9, 0.1], [0.7, 0.3]])  # s = (1.6, 0.4), so c is 1 : 4
    >>> rebalanced = jnp.exp(rebalance(jnp.log(mass)))
    >>> [[round(x, 2) for x in row] for row in rebalanced.tolist()]
    [[0.69, 0.31], [0.37, 0.63]]

    A part of the batch has the same targets with the sums of the whole:

    >>> part = rebalance(jnp.log(mass[1:]), teacher_mass=mass.sum(axis=0))
    >>> [round(x, 2) for x in jnp.exp(part)[0].tolist()]
    [0.37, 0.63]
    """
    log_mass = jax.lax.stop_gradient(_common.as_float(teacher_log_mass))
    chex.assert_rank(log_mass, 2, custom_message="teacher_log_mass must be [B, G]")
    exists = _common.class_mask(where, log_mass)
    counted = exists
    if example_mask is not None:
        log_mass = _mask_examples(log_mass, example_mask)
        counted &= _check_example_mask(example_mask, log_mass)[:, None]
    if teacher_mass is not None:
        log_sum = _log_given_mass(teacher_mass, log_mass)
        return _scale_groups(log_mass, log_sum, 0, exists)

    # A log mass of −∞ is that of a group that does not exist.
    counted &= log_mass != -jnp.inf

    # log s_G is a log-sum-exp over the batch.
    max_log_mass, scaled_sum = _statistics.max_and_scaled_sum(log_mass, counted)
    if axis_name is not None:
        # All devices scale by the same maximum, so that their sums add up.
        device_max = max_log_mass
        max_log_mass = jax.lax.pmax(device_max, axis_name)
        scaled_sum *= jnp.exp(device_max - max_log_mass)
        scaled_sum = jax.lax.psum(scaled_sum, axis_name)
    # A group without counted entries has the sum 0.
    is_counted = scaled_sum > 0
    max_log_mass = jnp.where(is_counted, max_log_mass, 0)[None]
    log_scaled_sum = jnp.log(jnp.where(is_counted, scaled_sum, 1))[None]

    # log s_G = max + log(scaled sum).
    return _scale_groups(log_mass, max_log_mass, log_scaled_sum, exists)


def _log_given_mass(teacher_mass: ArrayLike, log_mass: jax.Array) -> jax.Array:
    """Returns log s_G, `[1, G]`, without gradient."""
    if isinstance(teacher_mass, jax.core.Tracer):
        log_sum = jnp.log(_common.as_float(teacher_mass))
    else:
        # In float64, whose range is wider: a mass may be too small for float32.
        mass = np.asarray(teacher_mass, np.float64)
        valid = (mass > 0) & np.isfinite(mass)
        if not valid.all():
            raise ValueError(
                f"teacher_mass={mass.tolist()} must be positive and finite: give the "
                "teacher's mean mass of each group"
            )
        log_sum = jnp.asarray(np.log(mass), log_mass.dtype)
    chex.assert_shape(
        log_sum,
        log_mass.shape[1:],
        custom_message="teacher_mass must hold one number for each group, [G]",
    )
    return jax.lax.stop_gradient(log_sum).astype(log_mass.dtype)[None]


def _scale_groups(
    log_mass: jax.Array,
    log_sum: jax.Array,
    log_factor: jax.Array | float,
    exists: jax.Array,
) -> jax.Array:
    """Returns log p̂_G, `[B, G]`, for log s_G = `log_sum` + `log_factor`.

    The two large numbers, `log_mass` and `log_sum`, are subtracted first.
    """
    log_ratio = jnp.where(exists, log_mass - log_sum, 0) - log_factor
    # The softmax over groups normalises c_G p_G.
    return jnp.where(exists, _common.log_softmax(log_ratio, exists), -jnp.inf)


def rebalanced_inter_group(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 4.0,
    axis_name: AxisName = None,
    where: ArrayLike | None = None,
    example_mask: ArrayLike | None = None,
    teacher_mass: ArrayLike | None = None,
) -> jax.Array:
    """Computes the KL from the teacher's rebalanced to the student's group masses.

        τ² Σ_G p̂_G^T log(p̂_G^T / p_G^S)

    Source: LTKD (arXiv 2506.18496), the rebalanced inter-group loss. The formula of p̂
    is inferred, see `rebalance`.

    Args:
      student_logits, teacher_logits: `[B, C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      temperature: τ.
      axis_name: name of the device axis over which the batch is split.
      where: bool, broadcastable to `[B, C]`: the classes that exist.
      example_mask: bool `[B]`: false for padding, which gets a loss of 0 and is left
        out of the batch sums.
      teacher_mass: `[G]`, the teacher's mean group masses over the training set at
        temperature τ, in place of the batch sums, see `rebalance`.

    Returns:
      `[B]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups
    >>> g = groups.ClassGroups.from_assignment([0, 0, 1])
    >>> teacher = jnp.array([[5., 0., 0.], [4., 1., 0.]])
    >>> rebalanced_inter_group(jnp.zeros((2, 3)), teacher, g).shape
    (2,)
    """
    split = _split_batch(
        student_logits, teacher_logits, groups, temperature, where, example_mask
    )
    inter = _rebalanced_inter(split, axis_name, example_mask, teacher_mass)
    return temperature**2 * _mask_examples(inter, example_mask)


def uniform_intra_group(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the sum of the KLs within groups, all with the same weight.

        τ² Σ_G KL(p̃^T_{·|G} ‖ p̃^S_{·|G})

    Source: LTKD (arXiv 2506.18496), the uniform intra-group loss (known second-hand).

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups
    >>> g = groups.ClassGroups.from_assignment([0, 0, 1])
    >>> uniform_intra_group(jnp.zeros((2, 3)), jnp.zeros((2, 3)), g).tolist()
    [0.0, 0.0]
    """
    split = group_kl(
        student_logits, teacher_logits, groups, temperature=temperature, where=where
    )
    return temperature**2 * split.intra.sum(axis=-1)


def ltkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    temperature: Scalar = 4.0,
    axis_name: AxisName = None,
    where: ArrayLike | None = None,
    example_mask: ArrayLike | None = None,
    teacher_mass: ArrayLike | None = None,
) -> jax.Array:
    """Computes LTKD's distillation loss, to which a caller adds the hard loss.

        α · `rebalanced_inter_group` + β · `uniform_intra_group`

    Source: LTKD (arXiv 2506.18496), reconstructed from descriptions; the paper's values
    of τ, α and β are not known.

    Args:
      student_logits, teacher_logits: `[B, C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      alpha, beta: weights of the inter-group and of the intra-group loss.
      temperature: τ.
      axis_name: name of the device axis over which the batch is split.
      where: bool, broadcastable to `[B, C]`: the classes that exist.
      example_mask: bool `[B]`: false for padding, which gets a loss of 0 and is left
        out of the batch sums.
      teacher_mass: `[G]`, the teacher's mean group masses over the training set at
        temperature τ, in place of the batch sums, see `rebalance`.

    Returns:
      `[B]`, with the factor τ².

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups
    >>> g = groups.ClassGroups.from_counts([500, 300, 100, 50, 20, 10])
    >>> ltkd(jnp.zeros((4, 6)), jnp.eye(4, 6), g, alpha=1.0, beta=2.0).shape
    (4,)
    """
    split = _split_batch(
        student_logits, teacher_logits, groups, temperature, where, example_mask
    )
    _common.check_scalar(alpha, "alpha")
    _common.check_scalar(beta, "beta")
    inter = _rebalanced_inter(split, axis_name, example_mask, teacher_mass)
    loss = alpha * inter + beta * split.intra.sum(axis=-1)
    return temperature**2 * _mask_examples(loss, example_mask)


def _split_batch(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    temperature: Scalar,
    where: ArrayLike | None,
    example_mask: ArrayLike | None,
) -> _Split:
    """Returns the split of a batch of logits `[B, C]`."""
    student, teacher = _common.check_pair(
        student_logits, teacher_logits, temperature, where
    )
    chex.assert_rank(student, 2, custom_message="batch statistics need logits [B, C]")
    # Masked before anything is computed: a NaN in padding would otherwise reach the
    # gradient as 0 · NaN, although the loss of that example is replaced by 0.
    student = _mask_examples(student, example_mask)
    teacher = _mask_examples(teacher, example_mask)
    return _split(student, teacher, groups, temperature, where)


def _rebalanced_inter(
    split: _Split,
    axis_name: AxisName,
    example_mask: ArrayLike | None,
    teacher_mass: ArrayLike | None,
) -> jax.Array:
    """Returns the KL from the rebalanced to the student's group masses, without τ²."""
    target = rebalance(
        split.teacher_log_mass,
        axis_name=axis_name,
        where=split.group_exists,
        example_mask=example_mask,
        teacher_mass=teacher_mass,
    )
    # `kl` needs finite logs, also of groups that it leaves out.
    target = jnp.where(split.group_exists, target, 0)
    return _common.kl(target, split.student_log_mass, split.group_exists)


def _mask_examples(x: jax.Array, example_mask: ArrayLike | None) -> jax.Array:
    """Returns `x`, `[B, ...]`, with 0 for padding."""
    if example_mask is None:
        return x
    mask = _check_example_mask(example_mask, x)
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, 0)


def _check_example_mask(example_mask: ArrayLike, batch: jax.Array) -> jax.Array:
    mask = jnp.asarray(example_mask)
    if mask.dtype != bool:
        raise TypeError(
            f"example_mask must be bool, got {mask.dtype}{mask.shape}; multiply the "
            "losses by weights instead"
        )
    chex.assert_shape(mask, batch.shape[:1], custom_message="example_mask must be [B]")
    return mask


# --- The split in numerically stable form ---


class _Split(NamedTuple):
    """Holds group masses of student and teacher and KLs within groups, `[..., G]`.

    All values are finite; they are 0 for a group without existing classes.

    Attributes:
      student_log_mass: log p_G^S. Logs, because a group's mass can underflow.
      teacher_log_mass: log p_G^T.
      intra: KL(p̃^T_{·|G} ‖ p̃^S_{·|G}).
      group_exists: bool, whether the group has a class that exists.
    """

    student_log_mass: jax.Array
    teacher_log_mass: jax.Array
    intra: jax.Array
    group_exists: jax.Array


def _split(
    student: jax.Array,
    teacher: jax.Array,
    groups: ClassGroups,
    temperature: Scalar,
    where: ArrayLike | None,
) -> _Split:
    """Splits the distributions of student and teacher by groups.

    Let m_G = max_{i∈G} z_i be the largest logit of group G, and m = max_G m_G. With
    u_i = (z_i − m_G) / τ for i ∈ G, from the student's logits, the student has

        p̃_{i|G} = e^{u_i} / Σ_{j∈G} e^{u_j},
        log p_G = log softmax_G((m_G − m) / τ + log Σ_{j∈G} e^{u_j}).

    Each sum over a group contains e⁰ = 1, so no group underflows, however small its
    mass is. The teacher has the same from its logits; for the KL within groups see
    `_statistics`.

    Args:
      student, teacher: `[..., C]`, from `_common.check_pair`.
      groups: of the same C classes.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`.
    """
    if not isinstance(groups, ClassGroups):
        raise TypeError(
            f"groups must be a ClassGroups, got {type(groups).__name__}: make one by "
            "ClassGroups.from_counts(class_counts) or from_assignment"
        )
    chex.assert_shape(
        groups.assignment,
        student.shape[-1:],
        custom_message="groups must be of the same classes as the logits, [C]",
    )
    class_exists = None if where is None else _common.class_mask(where, student)
    statistics, group_exists = _statistics.of_groups(
        student, teacher, temperature, groups, class_exists
    )

    def log_mass(group_max: jax.Array, log_sum: jax.Array) -> jax.Array:
        # Without a gradient through the maxima: see `_statistics`.
        below_max = _common.subtract_max(group_max, group_exists) / temperature
        return _common.log_softmax(below_max + log_sum, group_exists)

    return _Split(
        student_log_mass=log_mass(statistics.student_max, statistics.student_log_sum),
        teacher_log_mass=log_mass(statistics.teacher_max, statistics.teacher_log_sum),
        intra=statistics.kl,
        group_exists=group_exists,
    )
