"""Class groups: sizes, ties, errors, and ClassGroups as a pytree."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltkd_jax import groups
from ltkd_jax.groups import ClassGroups


def long_tailed_counts(num_classes=100, largest=500, imbalance=100):
    exponents = np.arange(num_classes) / (num_classes - 1)
    return np.array([int(largest * imbalance**-x) for x in exponents])


def group_sizes(g):
    assignment = np.asarray(g.assignment)
    return [int(np.sum(assignment == k)) for k in range(g.num_groups)]


@pytest.mark.parametrize(
    "num_classes, expected",
    [
        (100, [33, 34, 33]),
        (10, [3, 4, 3]),
        (200, [66, 68, 66]),
        (1000, [330, 340, 330]),
        (3, [1, 1, 1]),
    ],
)
def test_default_group_sizes(num_classes, expected):
    g = ClassGroups.from_counts(np.arange(num_classes, 0, -1))
    assert group_sizes(g) == expected
    assert tuple(g.names) == ("head", "medium", "tail")
    assert g.num_groups == 3
    assert g.assignment.dtype == np.int32 and g.assignment.shape == (num_classes,)


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_by_count(seed):
    counts = np.random.default_rng(seed).permutation(long_tailed_counts())
    assignment = np.asarray(ClassGroups.from_counts(counts).assignment)
    head, medium, tail = (counts[assignment == k] for k in range(3))
    # The paper's ranks on CIFAR-100-LT with imbalance 100.
    assert head.min() == 112
    assert (medium.max(), medium.min()) == (107, 23)
    assert tail.max() == 22


def test_ties_are_ordered_by_class_index():
    g = ClassGroups.from_counts([5] * 10)
    np.testing.assert_array_equal(g.assignment, [0] * 3 + [1] * 4 + [2] * 3)
    g = ClassGroups.from_counts([7, 9, 7, 7], fractions=(0.5, 0.5))
    np.testing.assert_array_equal(g.assignment, [0, 0, 1, 1])


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=20, max_size=20),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
)
def test_any_fractions(counts, sizes):
    """The ranking is cut at the rounded boundaries."""
    num_groups = len(sizes)
    fractions = [size / sum(sizes) for size in sizes]
    ends = [20 * sum(sizes[: k + 1]) / sum(sizes) for k in range(num_groups)]
    if any(abs(end % 1 - 0.5) < 1e-6 for end in ends):
        return  # the rounding of halves is not specified
    ranking = sorted(range(20), key=lambda c: (-counts[c], c))
    expected = np.empty(20, int)
    for rank, c in enumerate(ranking):
        expected[c] = sum(rank >= round(end) for end in ends)
    if len(set(expected)) < num_groups:
        with pytest.raises(ValueError):
            ClassGroups.from_counts(counts, fractions=fractions)
        return
    g = ClassGroups.from_counts(counts, fractions=fractions)
    np.testing.assert_array_equal(g.assignment, expected)
    assert g.num_groups == num_groups == len(set(g.names))


def test_one_group_and_a_group_per_class():
    assert group_sizes(ClassGroups.from_counts([3, 2, 1], fractions=(1.0,))) == [3]
    g = ClassGroups.from_counts([1, 3, 2, 4, 6, 5, 7], fractions=(1 / 7,) * 7)
    np.testing.assert_array_equal(g.assignment, [6, 4, 5, 3, 1, 2, 0])


def test_from_assignment():
    g = ClassGroups.from_assignment([1, 0, 2, 1], names=("a", "b", "c"))
    np.testing.assert_array_equal(g.assignment, [1, 0, 2, 1])
    assert g.assignment.dtype == np.int32
    assert (g.num_groups, tuple(g.names)) == (3, ("a", "b", "c"))
    assert len(set(ClassGroups.from_assignment([0, 1, 2, 3]).names)) == 4


@pytest.mark.parametrize(
    "counts, options",
    [
        ([5, 0, 3], {}),
        ([5, -1, 3], {}),
        ([5, float("inf"), 3], {}),
        ([5, float("nan"), 3], {}),
        ([5, 3], {}),  # more groups than classes
        ([5, 3, 2], {"fractions": (0.9, 0.05, 0.05)}),  # an empty group
        ([5, 3, 2], {"fractions": (1.0, 0.0)}),
        ([5, 3, 2], {"fractions": (0.5, 0.4)}),
        ([5, 3, 2], {"fractions": (0.6, 0.6)}),
        ([5, 3, 2], {"fractions": (1.5, -0.5)}),
        ([5, 3, 2], {"fractions": ()}),
        ([5, 3, 2], {"names": ("head", "tail")}),
        ([5, 3, 2], {"names": ("a", "b", "a")}),
    ],
)
def test_from_counts_bad_input(counts, options):
    with pytest.raises(ValueError):
        ClassGroups.from_counts(counts, **options)


@pytest.mark.parametrize(
    "assignment, options",
    [
        ([0, 2, 2], {}),
        ([-1, 0, 1], {}),
        ([2**40, 0], {}),  # before an array of that size is allocated
        ([0, 1, 1], {"names": ("a",)}),
        ([0, 1, 1], {"names": ("a", "a")}),
    ],
)
def test_from_assignment_bad_input(assignment, options):
    with pytest.raises(ValueError):
        ClassGroups.from_assignment(assignment, **options)


def test_more_fractions_than_classes():
    with pytest.raises(ValueError, match="fractions=.*3 groups of 2 classes"):
        ClassGroups.from_counts([5, 3])


def test_immutable():
    g = ClassGroups.from_counts([3, 2, 1])
    with pytest.raises(AttributeError):
        g.num_groups = 5
    with pytest.raises(AttributeError):
        g.assignment = np.zeros(3, np.int32)
    with pytest.raises((TypeError, ValueError)):  # a JAX array, or a read-only one
        g.assignment[0] = 2


def test_from_assignment_copies():
    assignment = np.array([0, 1, 2], np.int32)
    g = ClassGroups.from_assignment(assignment)
    assignment[:] = 0
    np.testing.assert_array_equal(g.assignment, [0, 1, 2])


def test_pytree():
    g = ClassGroups.from_counts([1, 2, 3, 4, 5])
    assert [leaf.shape for leaf in jax.tree.leaves(g)] == [(5,)]
    mapped = jax.tree.map(lambda a: a, g)
    assert type(mapped) is ClassGroups
    assert (mapped.names, mapped.num_groups) == (g.names, g.num_groups)


def test_jit_and_pmap():
    # As many classes as devices: that the assignment was split would go unnoticed.
    g = ClassGroups.from_counts(np.arange(8, 0, -1))

    def lookup(g, labels):
        assert g.num_groups == 3  # static, also where the assignment is traced
        return g.assignment[labels]

    labels = np.arange(8)
    np.testing.assert_array_equal(jax.jit(lookup)(g, labels), g.assignment)
    mapped = jax.pmap(lookup, in_axes=(None, 0))(g, labels[:, None])
    np.testing.assert_array_equal(mapped[:, 0], g.assignment)
    returned = jax.jit(lambda g: g)(g)
    assert returned.names == g.names
    np.testing.assert_array_equal(returned.assignment, g.assignment)


def test_shots_of_cifar100_lt():
    shots = groups.shots(long_tailed_counts())
    sizes = {name: int(mask.sum()) for name, mask in shots.items()}
    assert sizes == {"many": 35, "medium": 35, "few": 30}
    for mask in shots.values():
        assert isinstance(mask, np.ndarray)
        assert mask.dtype == bool and mask.shape == (100,)


@pytest.mark.parametrize(
    "counts, options, expected",
    [
        ([101, 100, 20, 19], {}, [0, 1, 1, 2]),
        ([500, 400], {}, [0, 0]),
        ([4, 3], {"many": 3, "few": 3}, [0, 1]),
    ],
)
def test_shots_at_the_bounds(counts, options, expected):
    shots = groups.shots(np.array(counts), **options)
    assert list(shots) == ["many", "medium", "few"]
    np.testing.assert_array_equal(
        np.stack(list(shots.values())), np.arange(3)[:, None] == np.array(expected)
    )
