"""Class groups from class counts: head / medium / tail, and many / medium / few."""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import dataclasses

import jax
import numpy as np
import numpy.typing as npt

DEFAULT_FRACTIONS = (0.33, 0.34, 0.33)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ClassGroups:
    """A partition of C classes into G groups: an immutable pytree with one leaf.

    Close over it, or pass it as an argument; under `jax.pmap` pass it with
    `in_axes=None`.

    Attributes:
      assignment: int32 `[C]`, the group of each class.
      names: G names, in order; static.

    >>> groups = ClassGroups.from_counts([500, 300, 100, 50, 20, 10])
    >>> groups.names, groups.assignment.tolist()
    (('head', 'medium', 'tail'), [0, 0, 1, 1, 2, 2])
    """

    assignment: jax.Array | np.ndarray
    names: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def num_groups(self) -> int:
        """Returns G."""
        return len(self.names)

    @property
    def membership(self) -> jax.Array | np.ndarray:
        """Returns whether each class is in each group, bool `[G, C]`.

        >>> ClassGroups.from_assignment([0, 0, 1]).membership.tolist()
        [[True, True, False], [False, False, True]]
        """
        return self.assignment[None, :] == np.arange(self.num_groups)[:, None]

    @classmethod
    def from_counts(
        cls,
        class_counts: npt.ArrayLike,
        *,
        fractions: npt.ArrayLike = DEFAULT_FRACTIONS,
        names: list[str] | tuple[str, ...] | None = None,
    ) -> ClassGroups:
        """Groups classes by rank: by training count, descending, ties by class index.

        Group g ends at rank `round(C · (fractions[0] + … + fractions[g]))`.

        Source: LTKD (arXiv 2506.18496), the head / medium / tail split; the fractions
        33 / 34 / 33 % are known second-hand.

        Args:
          class_counts: `[C]`, training images of each class, all positive.
          fractions: G shares of the classes, beginning with the most frequent; they sum
            to 1.
          names: G names; by default head, medium, tail for three groups, else
            `group 0` ….

        Raises:
          ValueError: a count that is not positive, fractions that do not sum to 1, or
            an empty group.
        """
        counts = check_counts(class_counts)
        fractions = _as_numbers(fractions, "fractions")
        are_positive = fractions.ndim == 1 and (fractions > 0).all()
        # With `not <=`, NaN is refused, too.
        if not are_positive or not abs(fractions.sum() - 1) <= 1e-6:
            raise ValueError(
                f"fractions={fractions.tolist()} must be positive and sum to 1"
            )
        num_groups = len(fractions)
        num_classes = len(counts)
        if num_groups > num_classes:
            raise ValueError(
                f"fractions={fractions.tolist()} make {num_groups} groups of "
                f"{num_classes} classes: give at most one fraction for each class"
            )
        # Rounded, so that the sum's rounding errors do not move a boundary.
        shares = np.cumsum(fractions).round(9)
        # The last boundary is C exactly: a sum of 0.9999999 must not drop a class.
        inner_boundaries = [round(num_classes * share) for share in shares[:-1]]
        sizes = np.diff([0, *inner_boundaries, num_classes])
        group_of_rank = np.repeat(np.arange(num_groups), sizes)
        assignment = np.empty(num_classes, np.int32)
        # A stable sort keeps tied classes in the order of their indices.
        assignment[np.argsort(-counts, kind="stable")] = group_of_rank
        return cls._create(assignment, num_groups, names)

    @classmethod
    def from_assignment(
        cls,
        assignment: npt.ArrayLike,
        *,
        names: list[str] | tuple[str, ...] | None = None,
    ) -> ClassGroups:
        """Returns groups in which class c is in group `assignment[c]`.

        Args:
          assignment: integers `[C]`, in `[0, G)`.
          names: G names, see `from_counts`.

        Raises:
          ValueError: an assignment that is not a vector of integers >= 0, or an empty
            group.
        """
        try:
            assignment = np.asarray(assignment)
        except ValueError as error:
            raise ValueError(
                f"assignment must be a vector of integers ({error})"
            ) from None
        is_integer = np.issubdtype(assignment.dtype, np.integer)
        if assignment.ndim != 1 or not assignment.size or not is_integer:
            raise ValueError(
                "assignment must be a vector of integers, got "
                f"{assignment.dtype}{list(assignment.shape)}"
            )
        if assignment.min() < 0:
            raise ValueError(
                f"assignment has the negative group {assignment.min()}; groups are "
                "numbered from 0"
            )
        # Before anything of the size of the largest group is allocated.
        if assignment.max() >= len(assignment):
            raise ValueError(
                f"group {assignment.max()} of {len(assignment)} classes: some group "
                "would be empty"
            )
        num_groups = int(assignment.max()) + 1
        return cls._create(assignment.astype(np.int32), num_groups, names)

    @classmethod
    def _create(
        cls,
        assignment: np.ndarray,
        num_groups: int,
        names: list[str] | tuple[str, ...] | None,
    ) -> ClassGroups:
        """Returns the groups, with default names, after a check for empty groups."""
        if names is None and num_groups == 3:
            names = ("head", "medium", "tail")
        elif names is None:
            names = [f"group {g}" for g in range(num_groups)]
        is_sequence = isinstance(names, (list, tuple))
        are_strings = is_sequence and all(isinstance(name, str) for name in names)
        if not are_strings or not len(names) == len(set(names)) == num_groups:
            raise ValueError(
                f"names={names!r} must be a tuple of {num_groups} different strings, "
                "one for each group"
            )
        sizes = np.bincount(assignment, minlength=num_groups)
        if (sizes == 0).any():
            empty = [names[g] for g in np.flatnonzero(sizes == 0)]
            raise ValueError(
                f"groups {empty} would be empty: {len(assignment)} classes in groups "
                f"of {sizes.tolist()}"
            )
        assignment.setflags(write=False)
        return cls(assignment, tuple(names))


def shots(
    class_counts: npt.ArrayLike, *, many: float = 100, few: float = 20
) -> dict[str, np.ndarray]:
    """Groups classes by their count, the other convention of the long-tail literature.

    Args:
      class_counts: `[C]`, training images of each class.
      many: classes with more images are "many".
      few: classes with fewer images are "few"; those with `few` to `many` are "medium".

    Returns:
      Bool masks `[C]` under "many", "medium" and "few"; any of them may be empty.

    Raises:
      ValueError: a count that is not positive, or few > many, which would put a class
        into both.

    >>> masks = shots([500, 100, 20, 19, 5])
    >>> {name: int(mask.sum()) for name, mask in masks.items()}
    {'many': 1, 'medium': 2, 'few': 2}
    """
    counts = check_counts(class_counts)
    # With `not <=`, NaN is refused, too.
    if not few <= many:
        raise ValueError(f"few={few} must be at most many={many}")
    return {
        "many": counts > many,
        "medium": (counts >= few) & (counts <= many),
        "few": counts < few,
    }


def check_counts(class_counts: npt.ArrayLike) -> np.ndarray:
    """Returns `class_counts` as a float64 vector `[C]`.

    Raises:
      ValueError: not a vector, or a count that is not positive and finite.
    """
    counts = _as_numbers(class_counts, "class_counts")
    if counts.ndim != 1 or not counts.size:
        raise ValueError(
            "class_counts must be a vector, one count a class; got shape "
            f"{counts.shape}"
        )
    valid = (counts > 0) & np.isfinite(counts)
    if not valid.all():
        invalid_classes = np.flatnonzero(~valid)[:5].tolist()
        raise ValueError(
            f"class_counts must be positive and finite; classes {invalid_classes} have "
            f"{counts[invalid_classes].tolist()}: leave them out"
        )
    return counts


def _as_numbers(values: npt.ArrayLike, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if array.dtype.kind in "bc":  # which NumPy would convert
            raise TypeError(f"they are {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a vector of numbers ({error})") from None
