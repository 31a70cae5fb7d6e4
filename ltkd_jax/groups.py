"""Class counts -> groups of classes: head / medium / tail by rank, and many / medium / few by count."""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import numpy.typing as npt

DEFAULT_FRACTIONS = (0.33, 0.34, 0.33)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ClassGroups:
    """A partition of C classes into G groups: an immutable pytree with one leaf.

    Close over it, or pass it as an argument; under `jax.pmap` pass it with `in_axes=None`.

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
        """G."""
        return len(self.names)

    @classmethod
    def from_counts(
        cls,
        class_counts: npt.ArrayLike,
        *,
        fractions: npt.ArrayLike = DEFAULT_FRACTIONS,
        names: list[str] | tuple[str, ...] | None = None,
    ) -> ClassGroups:
        """Groups of classes by rank: sorted by training count, descending, ties by class index.

        Group g ends at rank `round(C · (fractions[0] + … + fractions[g]))`. Source: LTKD (arXiv 2506.18496),
        the head / medium / tail split; the fractions 33 / 34 / 33 % are known second-hand.

        Args:
          class_counts: `[C]` training images of each class, all positive.
          fractions: G shares of the classes, from the most frequent on; they sum to 1.
          names: G names; by default head, medium, tail for three groups, else `group 0` ….

        Raises:
          ValueError: a count that is not positive, fractions that do not sum to 1, an empty group.
        """
        counts = check_counts(class_counts)
        fractions = _numbers(fractions, "fractions")
        if (
            fractions.ndim != 1
            or not (fractions > 0).all()
            or not abs(fractions.sum() - 1) <= 1e-6
        ):
            raise ValueError(
                f"fractions={fractions.tolist()} must be positive and sum to 1"
            )
        if len(fractions) > len(counts):
            raise ValueError(
                f"{len(fractions)} groups for {len(counts)} classes: give at most a group per class"
            )
        # The last boundary is C exactly: a cumulative sum of 0.9999999 must not drop a class.
        ends = [
            round(len(counts) * share) for share in np.cumsum(fractions).round(9)[:-1]
        ] + [len(counts)]
        sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
        assignment = np.empty(len(counts), np.int32)
        assignment[np.argsort(-counts, kind="stable")] = np.repeat(
            np.arange(len(sizes)), sizes
        )
        return cls._checked(assignment, len(sizes), names)

    @classmethod
    def from_assignment(
        cls,
        assignment: npt.ArrayLike,
        *,
        names: list[str] | tuple[str, ...] | None = None,
    ) -> ClassGroups:
        """Groups as given: `assignment[c]`, an integer in `[0, G)`, is the group of class c.

        Raises:
          ValueError: an assignment that is not a vector of integers from 0 on, or an empty group.
        """
        try:
            assignment = np.asarray(assignment)
        except ValueError as error:
            raise ValueError(
                f"assignment must be a vector of integers ({error})"
            ) from None
        if (
            assignment.ndim != 1
            or not assignment.size
            or not np.issubdtype(assignment.dtype, np.integer)
        ):
            raise ValueError(
                f"assignment must be a vector of integers, got {assignment.dtype}{list(assignment.shape)}"
            )
        if assignment.min() < 0:
            raise ValueError(
                f"assignment holds the negative group {assignment.min()}; groups count from 0"
            )
        if assignment.max() >= len(assignment):
            raise ValueError(
                f"group {assignment.max()} of {len(assignment)} classes: some group would be empty"
            )
        return cls._checked(
            assignment.astype(np.int32), int(assignment.max()) + 1, names
        )

    @classmethod
    def _checked(
        cls,
        assignment: np.ndarray,
        num_groups: int,
        names: list[str] | tuple[str, ...] | None,
    ) -> ClassGroups:
        if names is None:
            names = (
                ("head", "medium", "tail")
                if num_groups == 3
                else [f"group {g}" for g in range(num_groups)]
            )
        listed = isinstance(names, (list, tuple)) and all(
            isinstance(name, str) for name in names
        )
        if not listed or len(names) != num_groups or len(set(names)) != num_groups:
            raise ValueError(
                f"names={names!r} must be a tuple of {num_groups} different strings, one for each group"
            )
        names = tuple(names)
        sizes = np.bincount(assignment, minlength=num_groups)
        if (sizes == 0).any():
            empty = [names[g] for g in np.flatnonzero(sizes == 0)]
            raise ValueError(
                f"groups {empty} would be empty: {len(assignment)} classes in groups of {sizes.tolist()}"
            )
        assignment.setflags(write=False)
        return cls(assignment, names)


def shots(
    class_counts: npt.ArrayLike, *, many: float = 100, few: float = 20
) -> dict[str, np.ndarray]:
    """Classes by their number of training images, the other convention of the long-tail literature.

    Args:
      class_counts: `[C]` training images of each class.
      many: more images than this is "many".
      few: fewer images than this is "few"; the rest, `few..many`, is "medium".

    Returns:
      Bool masks `[C]` under "many", "medium" and "few"; any of them may be empty.

    Raises:
      ValueError: a count that is not positive, or few > many, which would put a class in both.

    >>> {name: int(mask.sum()) for name, mask in shots([500, 100, 20, 19, 5]).items()}
    {'many': 1, 'medium': 2, 'few': 2}
    """
    counts = check_counts(class_counts)
    if not few <= many:
        raise ValueError(f"few={few} must be at most many={many}")
    return {
        "many": counts > many,
        "medium": (counts >= few) & (counts <= many),
        "few": counts < few,
    }


def check_counts(class_counts: npt.ArrayLike) -> np.ndarray:
    """`class_counts` as a float64 vector; a ValueError if it is not one or a class has no image."""
    counts = _numbers(class_counts, "class_counts")
    if counts.ndim != 1 or not counts.size:
        raise ValueError(
            f"class_counts must be a vector, one count a class; got shape {counts.shape}"
        )
    if not ((counts > 0) & np.isfinite(counts)).all():
        bad = np.flatnonzero(~((counts > 0) & np.isfinite(counts)))[:5].tolist()
        raise ValueError(
            f"class_counts must be positive and finite; classes {bad} have {counts[bad].tolist()}: leave them out"
        )
    return counts


def _numbers(values: npt.ArrayLike, name: str) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a vector of numbers ({error})") from None
