"""The group split of the distillation loss, and LTKD's two corrections of it.

With p = softmax(z/τ), group masses p_G = Σ_{i∈G} p_i and within-group distributions p̃_{i|G} = p_i / p_G,

    KL(p^T ‖ p^S) = Σ_G p_G^T log(p_G^T / p_G^S)  +  Σ_G p_G^T · KL(p̃^T_{·|G} ‖ p̃^S_{·|G}).
                    `inter`                                      `intra_G`

LTKD rebalances the teacher's group masses over the batch, and gives every group's intra term the same weight.
Source: "Biased Teacher, Balanced Student" (arXiv 2506.18496). The split is an identity; the idea of both
corrections is known second-hand, and the formula of the rebalancing is inferred: no official code is public.
"""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltkd_jax.groups import ClassGroups
from ltkd_jax.losses import _common
from ltkd_jax.losses._common import AxisName, Scalar


class GroupKL(NamedTuple):
    """`inter + Σ_G exp(teacher_log_mass) · intra == KL(p^T ‖ p^S)`, without the τ² factor.

    Attributes:
      inter: `[...]`, KL between the group masses.
      intra: `[..., G]`, KL within each group; 0 for a group without existing classes.
      teacher_log_mass: `[..., G]`, log p_G^T, no gradient; −inf for a group without existing classes.
    """

    inter: jax.Array
    intra: jax.Array
    teacher_log_mass: jax.Array


class _Split(NamedTuple):
    """Two distributions seen by groups, all `[..., G]`, finite, and 0 for a group without existing classes."""

    student_log_mass: jax.Array  # logs, because a group's mass underflows
    teacher_log_mass: jax.Array
    intra: jax.Array

    def inter(self, teacher_log_mass: jax.Array, exists: jax.Array) -> jax.Array:
        """KL of the student's group masses from the given ones."""
        return _common.kl(teacher_log_mass, self.student_log_mass, exists)


def _split(
    student: jax.Array, teacher: jax.Array, member: jax.Array, temperature: Scalar
) -> _Split:
    """The split of logits for `member`: see `_sum_by_group`.

    Within a group, with u = (z^S − max z^S) / τ and v likewise of the teacher, so that no group underflows,

        KL(p̃^T ‖ p̃^S) = Σ e^v (v − u) / Σ e^v − log Σ e^v + log Σ e^u,

    which writes no normalised distribution: its derivative needs e^u and e^v, and numbers of a group.
    """
    exists = member.any(axis=-1)
    (u, student_top), (v, teacher_top) = (
        _below_top(x, member, temperature) for x in (student, teacher)
    )
    exp_v = jnp.exp(v)
    student_total, teacher_total = (
        jnp.where(exists, _sum_by_group(x, member), 1) for x in (jnp.exp(u), exp_v)
    )
    gap = _sum_by_group(exp_v * (v - u), member) / teacher_total
    student_log, teacher_log = jnp.log(student_total), jnp.log(teacher_total)
    return _Split(
        _common.log_softmax(student_top + student_log, exists),
        _common.log_softmax(teacher_top + teacher_log, exists),
        gap - (teacher_log - student_log),
    )


def _below_top(
    logits: jax.Array, member: jax.Array, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Logits less their group's largest, `[..., C]`, and that less the largest of all, `[..., G]`; both over τ.

    Differences come first: they are small, so a large offset, of a group or of all, costs no precision.
    """
    exists = member.any(axis=-1)
    top = jnp.where(exists, _max_by_group(jax.lax.stop_gradient(logits), member), 0)
    below = (logits - _spread_to_classes(top, member)) / temperature
    return below, _common.from_top(top, exists) / temperature


# Between classes and groups, for finite numbers. `member` is bool `[..., G, C]`: true where class c exists and is in
# group g. Masked reductions over [..., G, C] are fused with what makes their operand, so nothing of that size is
# written; but not by XLA on CPU, where one matrix for all examples, or a loop over groups, is many times faster.
def _sum_by_group(x: jax.Array, member: jax.Array) -> jax.Array:
    """`[..., C]` to `[..., G]`."""
    return _on_platform(
        member,
        x,
        cpu=lambda x, matrix: jnp.matmul(x, matrix.T, precision="highest"),
        default=lambda x: jnp.sum(jnp.where(member, x[..., None, :], 0), axis=-1),
    )


def _spread_to_classes(x: jax.Array, member: jax.Array) -> jax.Array:
    """`[..., G]` to `[..., C]`; 0 for a class of no group."""
    return _on_platform(
        member,
        x,
        cpu=lambda x, matrix: jnp.matmul(x, matrix, precision="highest"),
        default=lambda x: jnp.sum(jnp.where(member, x[..., None], 0), axis=-2),
    )


def _max_by_group(x: jax.Array, member: jax.Array) -> jax.Array:
    """`[..., C]` to `[..., G]`; -inf for a group without classes."""

    def one_by_one(x: jax.Array, matrix: jax.Array) -> jax.Array:
        rows = matrix.reshape(len(matrix), *(1,) * (x.ndim - 1), -1)
        return jnp.moveaxis(
            jax.lax.map(
                lambda row: jnp.max(jnp.where(row > 0, x, -jnp.inf), axis=-1), rows
            ),
            0,
            -1,
        )

    return _on_platform(
        member,
        x,
        cpu=one_by_one,
        default=lambda x: jnp.max(
            jnp.where(member, x[..., None, :], -jnp.inf), axis=-1
        ),
    )


def _on_platform(
    member: jax.Array,
    x: jax.Array,
    *,
    cpu: Callable[[jax.Array, jax.Array], jax.Array],
    default: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    if any(
        size != 1 for size in member.shape[:-2]
    ):  # groups differ by example: no one matrix
        return default(x)
    matrix = member.reshape(member.shape[-2:]).astype(x.dtype)
    return jax.lax.platform_dependent(x, cpu=lambda x: cpu(x, matrix), default=default)


def membership_kl(
    student: jax.Array, teacher: jax.Array, member: jax.Array, temperature: Scalar
) -> GroupKL:
    """`group_kl` for `member`, see `_sum_by_group`; logits as `_common.pair` gives them."""
    split, exists = _split(student, teacher, member, temperature), member.any(axis=-1)
    inter = split.inter(split.teacher_log_mass, exists)
    return GroupKL(
        inter, split.intra, jnp.where(exists, split.teacher_log_mass, -jnp.inf)
    )


def _membership(
    groups: ClassGroups, logits: jax.Array, where: ArrayLike | None
) -> jax.Array:
    """Bool `[..., G, C]`: class c exists and belongs to group g. Leading axes are 1 where all classes exist."""
    assignment = groups.assignment
    chex.assert_shape(
        assignment,
        logits.shape[-1:],
        custom_message="groups must be of the same classes as the logits, [C]",
    )
    # In NumPy where the groups are concrete: a constant of the compiled function.
    of_group = assignment[None, :] == np.arange(groups.num_groups)[:, None]
    of_group = of_group.reshape((1,) * (logits.ndim - 1) + of_group.shape)
    return (
        of_group
        if where is None
        else of_group & _common.class_mask(where, logits)[..., None, :]
    )


def _inputs(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    temperature: Scalar,
    where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Scalar]:
    """What `_split` and `membership_kl` take."""
    student, teacher = _common.pair(student_logits, teacher_logits, temperature, where)
    return student, teacher, _membership(groups, student, where), temperature


def group_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 1.0,
    where: ArrayLike | None = None,
) -> GroupKL:
    """The distillation KL split between and within groups of classes.

        inter = Σ_G p_G^T log(p_G^T / p_G^S),  intra_G = KL(p̃^T_{·|G} ‖ p̃^S_{·|G})

    Source: LTKD (arXiv 2506.18496), an identity. No τ² factor here.

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
    >>> split = losses.group_kl(jnp.array([[1., 2., 3.]]), jnp.array([[2., 0., 1.]]), g)
    >>> whole = split.inter + (jnp.exp(split.teacher_log_mass) * split.intra).sum(-1)
    >>> bool(jnp.allclose(whole, losses.kd(jnp.array([[1., 2., 3.]]), jnp.array([[2., 0., 1.]]), temperature=1.)))
    True
    """
    return membership_kl(
        *_inputs(student_logits, teacher_logits, groups, temperature, where)
    )


def rebalance(
    teacher_log_mass: ArrayLike,
    *,
    axis_name: AxisName = None,
    where: ArrayLike | None = None,
    example_mask: ArrayLike | None = None,
) -> jax.Array:
    """The teacher's group masses, scaled so that every group has the same sum over the batch.

        s_G = Σ_b p_G(b);  c_G = (Σ_G' s_G' / G) / s_G;  p̂_G(b) = c_G p_G(b) / Σ_G' c_G' p_G'(b)

    Source: LTKD (arXiv 2506.18496); the idea is known second-hand, this formula is inferred. The numerator of
    c_G is the same for all groups and cancels in p̂. In logs, because a group's mass underflows.

    Args:
      teacher_log_mass: `[B, G]`, log p_G.
      axis_name: the device axis (or axes) over which the batch is spread, under `pmap` or `shard_map`.
      where: bool, broadcastable to `[B, G]`: the groups that exist; the others get −inf and take no part.
      example_mask: bool `[B]`: examples that are not padding; the others do not count in s_G.

    Returns:
      `[B, G]`, log p̂_G, no gradient.

    >>> import jax.numpy as jnp
    >>> mass = jnp.array([[0.9, 0.1], [0.7, 0.3]])
    >>> jnp.exp(rebalance(jnp.log(mass))).round(2).tolist()  # s = (1.6, 0.4), so c is 1 : 4
    [[0.6899999976158142, 0.3100000023841858], [0.3700000047683716, 0.6299999952316284]]
    """
    log_mass = jax.lax.stop_gradient(_common.as_float(teacher_log_mass))
    chex.assert_rank(log_mass, 2, custom_message="teacher_log_mass must be [B, G]")
    exists = _common.class_mask(where, log_mass)
    counts = exists
    if example_mask is not None:
        counts &= _example_mask(example_mask, log_mass)[:, None]
    # log s_G, stable for masses that underflow: the batch maximum (over all devices) is taken off first.
    top = jnp.max(log_mass, axis=0, where=counts, initial=-jnp.inf)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    top = jnp.where(jnp.isfinite(top), top, 0)[None]
    total = jnp.sum(
        jnp.exp(jnp.where(counts, log_mass - top, 0)),
        axis=0,
        keepdims=True,
        where=counts,
    )
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    scaled = jnp.where(exists, log_mass - top, 0) - jnp.log(
        jnp.where(total > 0, total, 1)
    )
    return jnp.where(exists, _common.log_softmax(scaled, exists), -jnp.inf)


def _example_mask(example_mask: ArrayLike, batched: jax.Array) -> jax.Array:
    mask = jnp.asarray(example_mask, bool)
    chex.assert_shape(
        mask, batched.shape[:1], custom_message="example_mask must be [B]"
    )
    return mask


def _masked(loss: jax.Array, example_mask: ArrayLike | None) -> jax.Array:
    return (
        loss
        if example_mask is None
        else jnp.where(_example_mask(example_mask, loss), loss, 0)
    )


def _batch_split(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    temperature: Scalar,
    where: ArrayLike | None,
) -> tuple[_Split, jax.Array]:
    """The split of logits `[B, C]`, and which groups exist."""
    student, teacher, member, temperature = _inputs(
        student_logits, teacher_logits, groups, temperature, where
    )
    chex.assert_rank(student, 2, custom_message="batch statistics need logits [B, C]")
    return _split(student, teacher, member, temperature), member.any(axis=-1)


def _rebalanced_inter(
    split: _Split,
    exists: jax.Array,
    axis_name: AxisName,
    example_mask: ArrayLike | None,
) -> jax.Array:
    target = rebalance(
        split.teacher_log_mass,
        axis_name=axis_name,
        where=exists,
        example_mask=example_mask,
    )
    return split.inter(jnp.where(exists, target, 0), exists)


def rebalanced_inter_group(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 4.0,
    axis_name: AxisName = None,
    where: ArrayLike | None = None,
    example_mask: ArrayLike | None = None,
) -> jax.Array:
    """KL between the teacher's rebalanced group masses and the student's: τ² Σ_G p̂_G^T log(p̂_G^T / p_G^S).

    Source: LTKD (arXiv 2506.18496), the rebalanced inter-group loss; its formula is inferred (see `rebalance`).

    Args:
      student_logits, teacher_logits: `[B, C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      temperature: τ.
      axis_name: the device axis over which the batch is spread.
      where: bool, broadcastable to `[B, C]`: the classes that exist.
      example_mask: bool `[B]`: false for padding, which gets a loss of 0 and is left out of the batch sums.

    Returns:
      `[B]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups
    >>> g = groups.ClassGroups.from_assignment([0, 0, 1])
    >>> teacher = jnp.array([[5., 0., 0.], [4., 1., 0.]])
    >>> rebalanced_inter_group(jnp.zeros((2, 3)), teacher, g).shape
    (2,)
    """
    split = _batch_split(student_logits, teacher_logits, groups, temperature, where)
    return temperature**2 * _masked(
        _rebalanced_inter(*split, axis_name, example_mask), example_mask
    )


def uniform_intra_group(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    groups: ClassGroups,
    *,
    temperature: Scalar = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL within the groups, every group with the same weight.

        τ² Σ_G KL(p̃^T_{·|G} ‖ p̃^S_{·|G})

    Source: LTKD (arXiv 2506.18496), the uniform intra-group loss (known second-hand).

    Args:
      student_logits, teacher_logits: `[..., C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      temperature: τ.
      where: bool, broadcastable to `[..., C]`: the classes that exist.

    Returns:
      `[...]`, with the τ² factor.

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
) -> jax.Array:
    """LTKD's distillation loss: τ² (α · rebalanced inter-group + β · Σ_G intra_G). Add the hard loss yourself.

    Source: LTKD (arXiv 2506.18496), reconstructed from descriptions; the values of τ, α, β are not known.

    Args:
      student_logits, teacher_logits: `[B, C]`; the teacher gets no gradient.
      groups: a `ClassGroups` of the same C classes.
      alpha, beta: weights of the inter-group and of the intra-group part.
      temperature: τ.
      axis_name: the device axis over which the batch is spread.
      where: bool, broadcastable to `[B, C]`: the classes that exist.
      example_mask: bool `[B]`: false for padding, which gets a loss of 0 and is left out of the batch sums.

    Returns:
      `[B]`, with the τ² factor.

    >>> import jax.numpy as jnp
    >>> from ltkd_jax import groups
    >>> g = groups.ClassGroups.from_counts([500, 300, 100, 50, 20, 10])
    >>> ltkd(jnp.zeros((4, 6)), jnp.eye(4, 6), g, alpha=1.0, beta=2.0).shape
    (4,)
    """
    split, exists = _batch_split(
        student_logits, teacher_logits, groups, temperature, where
    )
    inter = _rebalanced_inter(split, exists, axis_name, example_mask)
    return temperature**2 * _masked(
        alpha * inter + beta * split.intra.sum(axis=-1), example_mask
    )
