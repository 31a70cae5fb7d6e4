"""The group split of the distillation loss, and LTKD's two corrections of it.

With p = softmax(z/τ), group masses p_G = Σ_{i∈G} p_i and within-group distributions p̃_{i|G} = p_i / p_G,

    KL(p^T ‖ p^S) = Σ_G p_G^T log(p_G^T / p_G^S)  +  Σ_G p_G^T · KL(p̃^T_{·|G} ‖ p̃^S_{·|G}).
                    `inter`                                      `intra_G`

LTKD rebalances the teacher's group masses over the batch, and gives every group's intra term the same weight.
Source: "Biased Teacher, Balanced Student" (arXiv 2506.18496). The split is an identity; the idea of both
corrections is known second-hand, and the formula of the rebalancing is inferred: no official code is public.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ltkd_jax.losses import _common


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


class _Grouped(NamedTuple):
    """One distribution seen by groups: log p̃ `[..., C]` and log p_G `[..., G]`, finite everywhere."""

    log_within: jax.Array
    log_mass: jax.Array


# Group sums are masked reductions over a broadcast `[..., G, C]`, which XLA fuses into the reduction. A matmul
# with a one-hot matrix would follow the global matmul precision, and a scatter is slow on accelerators.
def _sum_by_group(x, member):
    return jnp.sum(jnp.broadcast_to(x[..., None, :], member.shape), axis=-1, where=member)


def _spread_to_classes(x, member):
    return jnp.sum(jnp.broadcast_to(x[..., None], member.shape), axis=-2, where=member)


def _log_split(logits, member) -> _Grouped:
    """log p̃ and log p_G from logits; each group's maximum is taken off first, so no group underflows."""
    exists = member.any(axis=-1)
    by_group = jnp.broadcast_to(logits[..., None, :], member.shape)
    top = jnp.max(by_group, axis=-1, where=member, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(exists, top, 0))
    shifted = jnp.where(member.any(axis=-2), logits - _spread_to_classes(top, member), 0)
    total = jnp.log(jnp.where(exists, _sum_by_group(jnp.exp(shifted), member), 1))
    highest = jnp.max(top, axis=-1, keepdims=True, where=exists, initial=-jnp.inf)
    # (top − highest) first: the rest is small, and a large common offset costs no precision.
    log_mass = _common.log_softmax(jnp.where(exists, top - highest, 0) + total, exists)
    return _Grouped(shifted - _spread_to_classes(total, member), log_mass)


def membership_kl(student, teacher, member) -> GroupKL:
    """The split for `member`, bool `[..., G, C]`: true where class c exists and is in group g. Logits as given."""
    s, t = _log_split(student, member), _log_split(teacher, member)
    exists = member.any(axis=-1)
    intra = _sum_by_group(jnp.exp(t.log_within) * (t.log_within - s.log_within), member)
    return GroupKL(
        inter=_common.kl(t.log_mass, s.log_mass, exists),
        intra=intra,
        teacher_log_mass=jnp.where(exists, t.log_mass, -jnp.inf),
    )


def _membership(groups, logits, where):
    """Bool `[..., G, C]`: class c exists and belongs to group g."""
    assignment = jnp.asarray(groups.assignment)
    chex.assert_shape(
        assignment, logits.shape[-1:], custom_message="groups must be of the same classes as the logits, [C]"
    )
    of_group = assignment[None, :] == jnp.arange(groups.num_groups)[:, None]
    of_group = of_group.reshape((1,) * (logits.ndim - 1) + of_group.shape)
    return of_group & _common.class_mask(where, logits)[..., None, :]


def _tempered(student_logits, teacher_logits, groups, temperature, where):
    student, teacher = _common.logit_pair(student_logits, teacher_logits, temperature, where)
    return student, teacher, _membership(groups, student, where)


def group_kl(student_logits, teacher_logits, groups, *, temperature=1.0, where=None) -> GroupKL:
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
    return membership_kl(*_tempered(student_logits, teacher_logits, groups, temperature, where))


def rebalance(teacher_log_mass, *, axis_name=None, where=None, example_mask=None) -> jax.Array:
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
    total = jnp.sum(jnp.exp(jnp.where(counts, log_mass - top, 0)), axis=0, keepdims=True, where=counts)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    scaled = jnp.where(exists, log_mass - top, 0) - jnp.log(jnp.where(total > 0, total, 1))
    return jnp.where(exists, _common.log_softmax(scaled, exists), -jnp.inf)


def _example_mask(example_mask, batched):
    mask = jnp.asarray(example_mask, bool)
    chex.assert_shape(mask, batched.shape[:1], custom_message="example_mask must be [B]")
    return mask


def rebalanced_inter_group(
    student_logits, teacher_logits, groups, *, temperature=4.0, axis_name=None, where=None, example_mask=None
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
    student, teacher, member = _tempered(student_logits, teacher_logits, groups, temperature, where)
    chex.assert_rank(student, 2, custom_message="batch statistics need logits [B, C]")
    exists = member.any(axis=-1)
    target = rebalance(
        _log_split(teacher, member).log_mass, axis_name=axis_name, where=exists, example_mask=example_mask
    )
    target = jnp.where(exists, target, 0)
    loss = temperature**2 * _common.kl(target, _log_split(student, member).log_mass, exists)
    return loss if example_mask is None else jnp.where(_example_mask(example_mask, loss), loss, 0)


def uniform_intra_group(student_logits, teacher_logits, groups, *, temperature=4.0, where=None) -> jax.Array:
    """KL within the groups, every group with the same weight: τ² Σ_G KL(p̃^T_{·|G} ‖ p̃^S_{·|G}).

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
    split = group_kl(student_logits, teacher_logits, groups, temperature=temperature, where=where)
    return temperature**2 * split.intra.sum(axis=-1)


def ltkd(
    student_logits,
    teacher_logits,
    groups,
    *,
    alpha=1.0,
    beta=1.0,
    temperature=4.0,
    axis_name=None,
    where=None,
    example_mask=None,
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
    inter = rebalanced_inter_group(
        student_logits,
        teacher_logits,
        groups,
        temperature=temperature,
        axis_name=axis_name,
        where=where,
        example_mask=example_mask,
    )
    intra = uniform_intra_group(student_logits, teacher_logits, groups, temperature=temperature, where=where)
    if example_mask is not None:
        intra = jnp.where(_example_mask(example_mask, intra), intra, 0)
    return alpha * inter + beta * intra
