"""ReviewKD's loss of intermediate features."""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ltkd_jax.losses._common import as_float

_GRID_SIDES = (4, 2, 1)  # of the coarser levels


def hierarchical_context(
    student_features: Sequence[ArrayLike], teacher_features: Sequence[ArrayLike]
) -> jax.Array:
    """Computes ReviewKD's hierarchical context loss, summed over features.

    The loss of one pair of features is a weighted mean over levels. Level 0 is their
    squared difference, averaged over height, width and channels, with weight 1. Levels
    1, 2 and 3 average both features over grids of 4×4, 2×2 and 1×1 cells first, and
    have the weights 1/2, 1/4 and 1/8. Grids that are not coarser than the features are
    left out, and the next one gets the weight instead.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021,
    section 3; grids and weights as in its code. The paper's loss is the batch mean.

    Args:
      student_features: a sequence of `[B, H, W, channels]`.
      teacher_features: of the same shapes; they get no gradient.

    Returns:
      `[B]`.

    Raises:
      ValueError: no features, or sequences of different lengths.
      AssertionError: shapes that differ.

    >>> same = [jnp.ones((2, 8, 8, 3)), jnp.ones((2, 1, 1, 5))]
    >>> hierarchical_context(same, [x + 1.0 for x in same]).tolist()
    [2.0, 2.0]
    """
    if not len(student_features) == len(teacher_features) > 0:
        raise ValueError(
            f"{len(student_features)} features of the student, {len(teacher_features)} "
            "of the teacher"
        )
    losses = map(_pair_loss, student_features, teacher_features)
    return functools.reduce(operator.add, losses)


def _pair_loss(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
    student = as_float(student)
    teacher = jax.lax.stop_gradient(as_float(teacher))
    chex.assert_equal_shape((student, teacher))
    chex.assert_rank(student, 4)
    # Averaging over cells is linear, so the difference is averaged, not both features.
    difference = student - teacher
    loss = jnp.mean(difference**2, axis=(1, 2, 3))
    weight = 1.0
    sum_weights = 1.0
    for side in _GRID_SIDES:
        if side < difference.shape[1]:
            weight /= 2
            sum_weights += weight
            cells = _average_cells(difference, side)
            loss += weight * jnp.mean(cells**2, axis=(1, 2, 3))
    return loss / sum_weights


def _average_cells(x: jax.Array, side: int) -> jax.Array:
    """Returns the means over side × side cells: adaptive average pooling.

    Cells overlap where `side` does not divide the height or width.
    """
    cell_rows = []
    for top, bottom in _cell_edges(x.shape[1], side):
        cells = []
        for left, right in _cell_edges(x.shape[2], side):
            cells.append(x[:, top:bottom, left:right].mean(axis=(1, 2)))
        cell_rows.append(jnp.stack(cells, axis=1))
    return jnp.stack(cell_rows, axis=1)


def _cell_edges(size: int, side: int) -> list[tuple[int, int]]:
    """Returns (⌊i · size / side⌋, ⌈(i + 1) · size / side⌉) for each cell i."""
    edges = []
    for i in range(side):
        start = i * size // side
        end = -(-(i + 1) * size // side)
        edges.append((start, end))
    return edges
