"""The sums over classes of which the losses of a student and its teacher are made.

For a set of classes, with m^S and m^T the largest logits of student and teacher in it,

    u_i = (z^S_i − m^S) / τ,    S = Σ e^u,
    v_i = (z^T_i − m^T) / τ,    T = Σ e^v,    D = Σ e^v (v − u) / T.

The distributions within the set are e^u / S and e^v / T, and their KL is
D − (log T − log S). Both sums contain e⁰ = 1, so that neither underflows.

There are two ways to compute them:

- `by_operations`, for CPU, where exponentials take the time: plain operations with
  their automatic derivative, which stores e^u and e^v.
- `by_reduction`, for accelerators, where the reads and writes of `[B, C]` take the
  time: one reduction reads both logits once (two reductions, twice, if the temperature
  is traced), and a rule for the derivative computes e^u and e^v again. A loss and its
  gradient are five reads and writes.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from ltkd_jax.groups import ClassGroups
from ltkd_jax.losses._common import Scalar

Array = jax.Array | np.ndarray
Arrays = tuple[jax.Array, ...]
Operation = Callable[[jax.Array, jax.Array], jax.Array]

# Up to this number of groups, masked sums and products are faster than indexing.
_FEW_GROUPS = 16


class Statistics(NamedTuple):
    """Holds the statistics of one set of classes, `[...]`, or of G sets, `[..., G]`.

    They are 0, without gradient, where no class of the set exists. The maxima never
    carry a gradient: it would cancel in every loss.

    Attributes:
      student_max, teacher_max: m^S and m^T.
      student_log_sum, teacher_log_sum: log S and log T.
      mean_difference: D.
    """

    student_max: jax.Array
    student_log_sum: jax.Array
    teacher_max: jax.Array
    teacher_log_sum: jax.Array
    mean_difference: jax.Array

    @property
    def kl(self) -> jax.Array:
        """KL from the teacher's to the student's distribution within the set."""
        return self.mean_difference - (self.teacher_log_sum - self.student_log_sum)


def of_set(
    student: jax.Array,
    teacher: jax.Array,
    temperature: Scalar,
    where: jax.Array | None = None,
) -> Statistics:
    """Returns the statistics of one set of classes.

    Args:
      student, teacher: `[..., C]`, from `_common.check_pair`.
      temperature: τ.
      where: bool `[..., C]`, the classes of the set; None for all.
    """
    args = (*_promote(student, teacher, temperature), ClassSet(where))
    return jax.lax.platform_dependent(
        cpu=lambda: by_operations(*args), default=lambda: by_reduction(*args)
    )


def of_groups(
    student: jax.Array,
    teacher: jax.Array,
    temperature: Scalar,
    groups: ClassGroups,
    where: jax.Array | None = None,
) -> tuple[Statistics, jax.Array]:
    """Returns the statistics of each group, and whether any class of it exists.

    Args:
      student, teacher: `[..., C]`, from `_common.check_pair`.
      temperature: τ.
      groups: of the same C classes.
      where: bool `[..., C]`, the classes that exist; None for all.

    Returns:
      Statistics `[..., G]`, and a bool that broadcasts to that shape.
    """
    args = _promote(student, teacher, temperature)
    index = _index_by_group(groups)
    indexed = Groups.create(groups, where, index)

    def on_cpu() -> Statistics:
        if groups.num_groups > _FEW_GROUPS:
            return by_reduction(*args, indexed)
        matrix = _membership(groups).astype(student.dtype)
        return by_operations(*args, GroupProducts(matrix, where))

    statistics = jax.lax.platform_dependent(
        cpu=on_cpu,
        # TPUs are slow at indexing.
        tpu=lambda: by_reduction(*args, Groups.create(groups, where, index=None)),
        default=lambda: by_reduction(*args, indexed),
    )
    return statistics, jnp.asarray(indexed.exists(student.ndim))


def max_and_scaled_sum(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns max x and Σ exp(x − max x) over the first axis; see `lowest` for no x."""

    def operations() -> tuple[jax.Array, jax.Array]:
        maximum = jnp.max(x, axis=0, where=where, initial=lowest(x.dtype))
        scaled = jnp.exp(jnp.where(where, x - maximum[None], 0))
        return maximum, jnp.sum(scaled, axis=0, where=where)

    def reduction() -> tuple[jax.Array, jax.Array]:
        def combine(
            a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            max_a, sum_a = a
            max_b, sum_b = b
            return jnp.maximum(max_a, max_b), add_scaled(max_b - max_a, sum_a, sum_b)

        operands = (jnp.where(where, x, lowest(x.dtype)), where.astype(x.dtype))
        initial = (lowest(x.dtype), jnp.zeros((), x.dtype))
        return jax.lax.reduce(operands, initial, combine, (0,))

    return jax.lax.platform_dependent(cpu=operations, default=reduction)


def _promote(
    student: jax.Array, teacher: jax.Array, temperature: Scalar
) -> tuple[jax.Array, jax.Array, Scalar]:
    """Returns logits of one precision, and the temperature: a float if concrete."""
    dtype = jnp.result_type(student, teacher, temperature)
    is_traced = isinstance(temperature, jax.core.Tracer)
    if not is_traced and np.ndim(temperature) == 0:
        temperature = float(temperature)
    return student.astype(dtype), teacher.astype(dtype), temperature


# --- Sets of classes ---

# `by_operations` calls `exists`, `max`, `sum` and `spread` of the classes below;
# `by_reduction` `exists`, `sum`, `spread` and `arrange`. `num_axes` is that of logits.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassSet:
    """Describes one set of classes; results have no axis for it.

    Attributes:
      where: bool `[..., C]`, the classes of the set; None for all.
      are_read_once: see `Groups`.
    """

    where: jax.Array | None
    are_read_once = True

    def exists(self, num_axes: int) -> Array | bool:
        """Returns whether the set has a class, `[...]`."""
        return True if self.where is None else self.where.any(axis=-1)

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the largest `[...]` of `[..., C]`; −inf of no class."""
        return jnp.max(x, axis=-1, where=self.where, initial=-jnp.inf)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums `[..., C]`, which is 0 outside of the set."""
        return jnp.sum(x, axis=-1)

    def spread(self, x: jax.Array) -> jax.Array:
        """Gives each class the value of its set, `[..., 1]`."""
        return x[..., None]

    def arrange(self, x: jax.Array) -> jax.Array:
        """Returns the classes of each set along the last axis."""
        return x

    def arranged_where(self, num_axes: int) -> jax.Array | None:
        """Returns which entries of `arrange` are in a set; None for all."""
        return self.where


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Describes G groups of classes; results have an axis for them at the end.

    Attributes:
      assignment: int `[C]`, the group of each class.
      where: bool `[..., C]`, the classes that exist; None for all.
      membership: bool `[G, C]`; None for many groups with an index.
      index: int `[G · M]`, M classes for each group; None for all C.
      members: bool `[G, M]`, whether they are in the group.
    """

    assignment: Array
    where: jax.Array | None
    membership: Array | None
    index: np.ndarray | None
    members: Array

    @classmethod
    def create(
        cls, groups: ClassGroups, where: jax.Array | None, index: np.ndarray | None
    ) -> Groups:
        """Returns the groups, with an `index` from `_index_by_group` or None."""
        if index is None:
            members = _membership(groups)
            return cls(groups.assignment, where, members, None, members)
        is_few = groups.num_groups <= _FEW_GROUPS
        membership = _membership(groups) if is_few else None
        flat_index = np.maximum(index, 0).reshape(-1)
        return cls(groups.assignment, where, membership, flat_index, index >= 0)

    @property
    def num_groups(self) -> int:
        """Returns G."""
        return len(self.members)

    @property
    def are_read_once(self) -> bool:
        """Whether `arrange` repeats no class."""
        return self.index is not None

    def exists(self, num_axes: int) -> Array | bool:
        """Returns whether a class of each group exists, `[..., G]`."""
        if self.index is not None and self.where is None:
            return True
        return jnp.any(self.arranged_where(num_axes), axis=-1)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums `[..., C]` over the classes of each group: `[..., G]`."""
        if self.membership is not None:
            membership = _with_axes(self.membership, x.ndim + 1)
            return jnp.sum(jnp.where(membership, x[..., None, :], 0), axis=-1)
        # In a gradient only its transpose is left, which is `spread`.
        # Made of x, so that the zeros have its sharding.
        zero = jnp.zeros_like(x[..., :1])
        sums = jnp.broadcast_to(zero, (*x.shape[:-1], self.num_groups))
        return sums.at[..., self.assignment].add(x, mode="promise_in_bounds")

    def spread(self, x: jax.Array) -> jax.Array:
        """Gives each class the value of its group: `[..., G]` to `[..., C]`."""
        if self.membership is not None:
            membership = _with_axes(self.membership, x.ndim + 1)
            return jnp.sum(jnp.where(membership, x[..., None], 0), axis=-2)
        return x.at[..., self.assignment].get(mode="promise_in_bounds")

    def arrange(self, x: jax.Array) -> jax.Array:
        """Returns `[..., G, M]`, the classes of each group along the last axis.

        The index is flat: XLA would write the result of one with two axes to memory,
        in the order [M, ...]. An index into all logits, `b · C + i`, would gather them
        from all devices.
        """
        if self.index is None:
            shape = (*x.shape[:-1], self.num_groups, x.shape[-1])
            return jnp.broadcast_to(x[..., None, :], shape)
        arranged = x.at[..., self.index].get(mode="promise_in_bounds")
        return arranged.reshape(*x.shape[:-1], *self.members.shape)

    def arranged_where(self, num_axes: int) -> Array:
        """Returns which entries of `arrange` are in a group and exist."""
        members = _with_axes(self.members, num_axes + 1)
        return members if self.where is None else members & self.arrange(self.where)


def _membership(groups: ClassGroups) -> Array:
    """Returns `groups.membership`: NumPy, a constant of the program, of few groups."""
    if groups.num_groups > _FEW_GROUPS:
        # Computed where it is needed.
        groups = dataclasses.replace(groups, assignment=jnp.asarray(groups.assignment))
    return groups.membership


def _index_by_group(groups: ClassGroups) -> np.ndarray | None:
    """Returns int32 `[G, M]`: the classes of each group, then at least one −1.

    Without any −1, XLA would drop the mask, and with it choose the order in memory that
    `Groups.arrange` avoids. It returns None if the assignment, which determines M, is
    traced, and if a group is empty.
    """
    if isinstance(groups.assignment, jax.core.Tracer):
        return None
    assignment = np.asarray(groups.assignment)
    sizes = np.bincount(assignment, minlength=groups.num_groups)
    if not sizes.all():
        return None
    index = np.full((groups.num_groups, sizes.max() + 1), -1, np.int32)
    index[np.arange(index.shape[1]) < sizes[:, None]] = np.argsort(
        assignment, kind="stable"
    )
    return index


def _with_axes(x: Array, num_axes: int) -> Array:
    """Returns `x` with leading axes of size 1."""
    return x.reshape((1,) * (num_axes - x.ndim) + x.shape)


@dataclasses.dataclass(frozen=True)
class GroupProducts:
    """Describes few groups of classes, whose sums are matrix products.

    On CPU, XLA does not fuse a masked sum over `[..., G, C]` with its operand, and a
    product, or for the maximum a loop over groups, is many times faster.

    Attributes:
      matrix: `[G, C]`, the membership as numbers.
      where: bool `[..., C]`, the classes that exist; None for all.
    """

    matrix: Array
    where: jax.Array | None

    def exists(self, num_axes: int) -> jax.Array:
        """Returns whether a class of each group exists, `[..., G]`."""
        if self.where is None:
            return jnp.any(_with_axes(self.matrix, num_axes + 1), axis=-1)
        return self.sum(self.where.astype(self.matrix.dtype)) > 0

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the largest of each group: `[..., C]` to `[..., G]`."""
        if self.where is not None:
            x = jnp.where(self.where, x, -jnp.inf)

        def max_of_group(in_group: jax.Array) -> jax.Array:
            return jnp.max(jnp.where(in_group > 0, x, -jnp.inf), axis=-1)

        # [G, ..., C], with leading axes of size 1
        in_groups = jnp.moveaxis(_with_axes(self.matrix, x.ndim + 1), -2, 0)
        maxima = jax.lax.map(max_of_group, in_groups)  # [G, ...]
        return jnp.moveaxis(maxima, 0, -1)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums over the classes of each group: `[..., C]` to `[..., G]`."""
        return jnp.matmul(x, self.matrix.T, precision="highest")

    def spread(self, x: jax.Array) -> jax.Array:
        """Gives each class the value of its group: `[..., G]` to `[..., C]`."""
        return jnp.matmul(x, self.matrix, precision="highest")


# --- By plain operations ---


def by_operations(
    student: jax.Array,
    teacher: jax.Array,
    temperature: Scalar,
    classes: ClassSet | GroupProducts,
) -> Statistics:
    """Computes the statistics by operations with their automatic derivative."""
    exists = classes.exists(student.ndim)

    def keep(x: jax.Array) -> jax.Array:
        return x if classes.where is None else jnp.where(classes.where, x, 0)

    def below_max(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The maxima are subtracted before anything else is done, so that a large offset
        # costs no precision, see `_common.subtract_max`.
        maximum = jnp.where(exists, classes.max(jax.lax.stop_gradient(logits)), 0)
        return keep((logits - classes.spread(maximum)) / temperature), maximum

    u, student_max = below_max(student)
    v, teacher_max = below_max(teacher)
    exp_u = keep(jnp.exp(u))
    exp_v = keep(jnp.exp(v))
    sums = Sums(
        student_max,
        classes.sum(exp_u),
        teacher_max,
        classes.sum(exp_v),
        # Subtracting before summing makes it exactly 0 for equal logits, and keeps its
        # digits for similar ones.
        classes.sum(exp_v * (v - u)),
    )
    return _from_sums(sums, exists)


class Sums(NamedTuple):
    """Holds the maxima m^S and m^T, and the sums S, T and Σ e^v (v − u)."""

    student_max: jax.Array
    student: jax.Array
    teacher_max: jax.Array
    teacher: jax.Array
    difference: jax.Array


def _from_sums(sums: Sums, exists: Array | bool) -> Statistics:
    """Returns the statistics; 0 where no class exists, also in the derivative."""
    student_sum = jnp.where(exists, sums.student, 1)
    teacher_sum = jnp.where(exists, sums.teacher, 1)
    return Statistics(
        student_max=jnp.where(exists, sums.student_max, 0),
        student_log_sum=jnp.log(student_sum),
        teacher_max=jnp.where(exists, sums.teacher_max, 0),
        teacher_log_sum=jnp.log(teacher_sum),
        mean_difference=sums.difference / teacher_sum,
    )


# --- By reduction ---


def lowest(dtype: DTypeLike) -> jax.Array:
    """Returns the maximum of nothing: below all logits, but finite, as differences are.

    With −∞ they would be NaN.
    """
    return jnp.asarray(-np.finfo(dtype).max / 2**20, dtype)


def add_scaled(rise: jax.Array, sum_a: jax.Array, sum_b: jax.Array) -> jax.Array:
    """Adds Σ exp(x − max x) of two parts, a and b, relative to the larger maximum.

    Args:
      rise: the maximum of b minus that of a.
      sum_a, sum_b: the sums, each relative to its own maximum.
    """
    # One exponential: one of the two parts keeps its maximum.
    factor = jnp.exp(-jnp.abs(rise))
    return jnp.where(rise > 0, sum_a * factor + sum_b, sum_b * factor + sum_a)


def by_reduction(
    student: jax.Array,
    teacher: jax.Array,
    temperature: Scalar,
    classes: ClassSet | Groups,
) -> Statistics:
    """Computes the statistics by reductions, and their derivative by a rule."""
    constant_temperature = None
    # One pass needs 1/τ as a number: carried along if it is traced, it would be a sixth
    # accumulator, and under some `vmap` six exceed the shared memory of a GPU. With a
    # mask each class is reduced G times; there its arithmetic costs more than a pass.
    if isinstance(temperature, float) and classes.are_read_once:
        constant_temperature = temperature
    return _reduce(constant_temperature, student, teacher, temperature, classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reduce(
    constant_temperature: float | None,
    student: jax.Array,
    teacher: jax.Array,
    temperature: Scalar,
    classes: ClassSet | Groups,
) -> Statistics:
    """Computes the statistics in one pass if it gets the temperature as a constant.

    `temperature` is the same number; the derivative needs it as an argument.
    """
    z = classes.arrange(student)
    t = classes.arrange(teacher)
    where = classes.arranged_where(student.ndim)
    if where is not None:
        where = jnp.broadcast_to(where, z.shape)
    if constant_temperature is None:
        sums = _reduce_in_two_passes(z, t, temperature, where)
    else:
        sums = _reduce_in_one_pass(z, t, constant_temperature, where)
    return _from_sums(sums, classes.exists(student.ndim))


def _reduce_in_one_pass(
    z: jax.Array, t: jax.Array, temperature: float, where: jax.Array | None
) -> Sums:
    """Computes the sums relative to the largest logits so far, over the last axis.

    Two parts of a set are combined relative to the larger maximum of both. If a maximum
    m rises by δ then its exponents u fall by δ/τ: sums are multiplied by e^(−δ/τ), and
    v − u changes.
    """
    scale = 1 / temperature

    def combine(a: Sums, b: Sums) -> Sums:
        # Differences of logits come first, so that an offset costs no precision.
        rise_z = (b.student_max - a.student_max) * scale
        rise_t = (b.teacher_max - a.teacher_max) * scale
        # How v − u changes in a, whose maxima may rise, and in b. They do not follow
        # from each other by a difference: one rise may be far larger than the other.
        change_a = jnp.maximum(rise_z, 0) - jnp.maximum(rise_t, 0)
        change_b = jnp.minimum(rise_t, 0) - jnp.minimum(rise_z, 0)
        return Sums(
            student_max=jnp.maximum(a.student_max, b.student_max),
            student=add_scaled(rise_z, a.student, b.student),
            teacher_max=jnp.maximum(a.teacher_max, b.teacher_max),
            teacher=add_scaled(rise_t, a.teacher, b.teacher),
            difference=add_scaled(
                rise_t,
                a.difference + a.teacher * change_a,
                b.difference + b.teacher * change_b,
            ),
        )

    zero = jnp.zeros((), z.dtype)
    ones = jnp.ones_like(z)
    zeros = jnp.zeros_like(z)
    if where is not None:
        z = jnp.where(where, z, lowest(z.dtype))
        t = jnp.where(where, t, lowest(t.dtype))
        # Not a conversion of `where`: the ones have the sharding of z.
        ones = jnp.where(where, ones, 0)
    return jax.lax.reduce(
        Sums(z, ones, t, ones, zeros),
        Sums(lowest(z.dtype), zero, lowest(z.dtype), zero, zero),
        combine,
        (z.ndim - 1,),
    )


def _reduce_in_two_passes(
    z: jax.Array, t: jax.Array, temperature: Scalar, where: jax.Array | None
) -> Sums:
    """Computes the maxima, then the sums, over the last axis."""

    def masked(x: jax.Array, fill: float) -> jax.Array:
        return x if where is None else jnp.where(where, x, fill)

    def reduce(operation: Operation, initial: float, operands: Arrays) -> Arrays:
        def combine(a: Arrays, b: Arrays) -> Arrays:
            return tuple(map(operation, a, b))

        initial_values = (jnp.asarray(initial, z.dtype),) * len(operands)
        return jax.lax.reduce(operands, initial_values, combine, (z.ndim - 1,))

    student_max, teacher_max = reduce(
        jnp.maximum, -jnp.inf, (masked(z, -jnp.inf), masked(t, -jnp.inf))
    )
    u = (z - student_max[..., None]) / temperature
    v = (t - teacher_max[..., None]) / temperature
    exp_v = jnp.exp(v)
    terms = (jnp.exp(u), exp_v, exp_v * (v - u))
    sums = reduce(jnp.add, 0, tuple(masked(x, 0) for x in terms))
    student, teacher, difference = sums
    return Sums(student_max, student, teacher_max, teacher, difference)


@functools.partial(_reduce.defjvp, symbolic_zeros=True)
def _reduce_jvp(
    constant_temperature: float | None,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Statistics, Statistics]:
    """Returns the statistics and their derivative, which is linear in the tangents.

    With p^S_i = e^{u_i} / S, p^T_i = e^{v_i} / T and constant maxima,

        d log S = Σ p^S du,    d log T = Σ p^T dv,
        dD = Σ p^T ((1 + v − u − D) dv − du),

    where du = (dz − u dτ) / τ, and dv likewise. The statistics in p are this function's
    own, so that second derivatives follow.
    """
    student, teacher, temperature, classes = primals
    student_tangent, teacher_tangent, temperature_tangent, _ = tangents
    statistics = _reduce(constant_temperature, *primals)

    def below_max(logits: jax.Array, maximum: jax.Array) -> jax.Array:
        return (logits - classes.spread(maximum)) / temperature

    def probabilities(exponents: jax.Array, log_sum: jax.Array) -> jax.Array:
        log_p = exponents - classes.spread(log_sum)
        if classes.where is None:
            return jnp.exp(log_p)
        # Outside of the set e^u may overflow, and 0 · ∞ would be NaN.
        p = jnp.exp(jnp.where(classes.where, log_p, 0))
        return jnp.where(classes.where, p, 0)

    def tangent_of(
        exponents: jax.Array, logits_tangent: jax.Array | SymbolicZero
    ) -> jax.Array | None:
        """Returns du or dv; None for 0, so that its sums do not appear."""
        terms = []
        if not isinstance(logits_tangent, SymbolicZero):
            terms.append(logits_tangent / temperature)
        if not isinstance(temperature_tangent, SymbolicZero):
            terms.append(-exponents * (temperature_tangent / temperature))
        return sum(terms[1:], terms[0]) if terms else None

    u = below_max(student, statistics.student_max)
    v = below_max(teacher, statistics.teacher_max)
    du = tangent_of(u, student_tangent)
    dv = tangent_of(v, teacher_tangent)
    p_teacher = probabilities(v, statistics.teacher_log_sum)
    zero = jnp.zeros_like(statistics.mean_difference)
    tangent = Statistics(zero, zero, zero, zero, zero)
    if du is not None:
        p_student = probabilities(u, statistics.student_log_sum)
        tangent = tangent._replace(
            student_log_sum=classes.sum(p_student * du),
            mean_difference=-classes.sum(p_teacher * du),
        )
    if dv is not None:
        slope = 1 + (v - u) - classes.spread(statistics.mean_difference)
        tangent = tangent._replace(
            teacher_log_sum=classes.sum(p_teacher * dv),
            mean_difference=tangent.mean_difference
            + classes.sum(p_teacher * slope * dv),
        )
    return statistics, tangent
