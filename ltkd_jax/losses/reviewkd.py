"""A loss of intermediate features."""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ltkd_jax.losses._common import as_float

_GRIDS = (4, 2, 1)  # sides of the coarser levels


def hierarchical_context(
    student_features: Sequence[ArrayLike], teacher_features: Sequence[ArrayLike]
) -> jax.Array:
    """ReviewKD's hierarchical context loss, the sum over the features of L(s, t), `[B]`.

    L is a weighted mean over levels: the squared difference, averaged over height, width and channels, with weight 1;
    then that of both features averaged over grids of 4×4, 2×2 and 1×1 cells, as far as they are coarser than the
    features, with weights 1/2, 1/4, 1/8 of those that there are.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, section 3; grids and weights as in its
    code. Its mean over the batch is the paper's.

    Args:
      student_features: a sequence of `[B, H, W, channels]`.
      teacher_features: of the same shapes; no gradient goes into them.

    Raises:
      ValueError: another number of features, or none.
      AssertionError: shapes that differ.

    >>> same = [jnp.ones((2, 8, 8, 3)), jnp.ones((2, 1, 1, 5))]
    >>> hierarchical_context(same, [x + 1.0 for x in same]).tolist()
    [2.0, 2.0]
    """
    if not len(student_features) == len(teacher_features) > 0:
        raise ValueError(
            f"{len(student_features)} features of the student, {len(teacher_features)} of the teacher"
        )
    return functools.reduce(
        operator.add, map(_context, student_features, teacher_features)
    )


def _context(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
    student, teacher = as_float(student), jax.lax.stop_gradient(as_float(teacher))
    chex.assert_equal_shape((student, teacher))
    chex.assert_rank(student, 4)
    difference = student - teacher  # averaging over cells is linear
    loss, weight, total = jnp.mean(difference**2, axis=(1, 2, 3)), 1.0, 1.0
    for side in _GRIDS:
        if side < difference.shape[1]:
            weight /= 2
            total += weight
            loss += weight * jnp.mean(_cells(difference, side) ** 2, axis=(1, 2, 3))
    return loss / total


def _cells(x: jax.Array, side: int) -> jax.Array:
    """Means over a grid of side × side cells, which overlap where the side does not divide the features'."""
    rows, columns = (_cell_edges(size, side) for size in x.shape[1:3])
    means = [
        jnp.stack([x[:, a:b, c:d].mean(axis=(1, 2)) for c, d in columns], axis=1)
        for a, b in rows
    ]
    return jnp.stack(means, axis=1)


def _cell_edges(size: int, side: int) -> list[tuple[int, int]]:
    return [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
