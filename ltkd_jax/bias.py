"""Measures the bias of a model towards head, medium or tail classes, from its logits.

The loss is split into "wrong group" and "wrong class within the group", as LTKD does,
by `losses.group_kl`. If all of the teacher's mass is on the true class y of group G,
the KL from it to the model is the cross-entropy:

    −log p_y = −log p_G − log(p_y / p_G)
               (inter)    (intra)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ltkd_jax import losses, metrics
from ltkd_jax.data.logits import Logits
from ltkd_jax.groups import ClassGroups

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_BLOCK_LOGITS = 2**22  # logits in a block, unless a block size is given
_NO_MASS = -1e30  # the logit of a class without mass


def audit(
    examples: Logits,
    groups: ClassGroups,
    *,
    temperatures: tuple[float, ...] = (1.0, 4.0),
    student: Logits | None = None,
    block_size: int | None = None,
    on_block: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Returns the bias of a model on labelled examples, as a dict for JSON.

    Shares and masses are fractions of 1, accuracies and calibration errors are in
    percent, losses and KLs in nats. The examples of a group or a class are those whose
    true label is in it; a mean over no examples is None. With p = softmax(z):

    - `examples`: N.
    - `share`: by group, its fraction of the examples.
    - `mass`: by temperature τ and group G, mean of Σ_{c∈G} softmax(z/τ)_c over all
      examples.
    - `mass_by_group`: by temperature, `[G][G]`, the same mean over the examples of each
      group.
    - `between`: `[G][G]`, percent of each group's examples that are predicted in each
      group.
    - `groups`: by group, and for "all":

      - `examples`, `accuracy` and mean `confidence`;
      - `loss`, the cross-entropy, and its parts `inter` and `intra`;
      - `ece`, `ece_by_chance` and `bins`, see `metrics.calibration_error`,
        `metrics.calibration_error_by_chance` and `metrics.EvalSums`.

    - `classes`: lists by class.

      - Over all examples: the class's `share`, its fraction of the predictions
        (`predicted`) and its `mass`. A class loses mass if `mass < share`.
      - Over the class's own examples: their number (`examples`), `recall`, and the mean
        mass that they give to the class itself (`own`), to each group (`to_groups`),
        and to the other class that gets most of it (`to`, `to_mass`).

    - `divergence`, with a student only: by temperature, then by group and for "all":
      `kl`, KL(model ‖ student) without the factor τ²; and its parts `inter` and, by
      group, `intra`, each times the model's mass on that group, so that
      `kl == inter + Σ_G intra[G]`.

    Args:
      examples: logits `[N, C]` and labels `[N]` of the model.
      groups: of the C classes.
      temperatures: at which masses and divergences are computed.
      student: logits of a second model on the same examples.
      block_size: number of examples that are evaluated together; by default about four
        million logits.
      on_block: called after each block with its number of examples.

    Raises:
      TypeError: examples that are no `Logits`.
      ValueError: logits of several views, groups of other classes, a student on other
        examples, or block_size < 1.

    >>> from ltkd_jax.data import logits
    >>> groups = ClassGroups.from_assignment([0, 1], names=["head", "tail"])
    >>> z = [[1.0, 0.0], [1.0, 0.0]]  # class 0 is always preferred
    >>> result = audit(logits.from_arrays(z, [0, 1]), groups, temperatures=(1.0,))
    >>> {name: round(mass, 2) for name, mass in result["mass"]["1"].items()}
    {'head': 0.73, 'tail': 0.27}
    >>> result["share"]
    {'head': 0.5, 'tail': 0.5}
    >>> tail = result["groups"]["tail"]
    >>> tail["accuracy"], round(tail["inter"], 2)
    (0.0, 1.31)
    """
    _check(examples, groups, student)
    if block_size is None:
        block_size = _default_block_size(len(examples), examples.num_classes)
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    sums = _Sums(groups, tuple(float(temperature) for temperature in temperatures))
    student_blocks = None if student is None else student.blocks(block_size)
    pad = functools.partial(_pad, size=block_size)
    start = 0
    for block in examples.blocks(block_size):
        num_examples = len(block)
        labels = examples.labels[start : start + num_examples]
        student_block = None if student_blocks is None else next(student_blocks)
        # The last block is padded, so that only one shape is compiled.
        padded = jax.tree.map(pad, (block, student_block, labels))
        stats = _example_stats(*padded, groups, sums.temperatures)
        stats = jax.tree.map(lambda x, n=num_examples: np.asarray(x)[:n], stats)
        sums.add(stats, labels)
        start += num_examples
        if on_block:
            on_block(num_examples)
    result = _summarize(sums)
    if student is not None:
        result["divergence"] = _summarize_divergence(sums)
    return result


def _default_block_size(num_examples: int, num_classes: int) -> int:
    """Returns the number of examples in a block."""
    limit = max(_BLOCK_LOGITS // num_classes, 1)
    # A small set is one block, of the next power of two, so that sets of about the same
    # size share a compilation.
    next_power_of_two = 1 << (num_examples - 1).bit_length()
    return min(limit, next_power_of_two)


def _check(examples: Logits, groups: ClassGroups, student: Logits | None) -> None:
    for logits in (examples, student):
        if logits is not None and not isinstance(logits, Logits):
            raise TypeError(
                f"the examples are of type {type(logits).__name__}: give Logits, such "
                "as `ltkd_jax.data.logits.from_arrays(values, labels)`"
            )
    if examples.values.ndim != 2:
        raise ValueError(
            f"{examples.source}: logits are {list(examples.values.shape)}; give one "
            "view, [N, C]"
        )
    num_classes = len(np.asarray(groups.assignment))
    if num_classes != examples.num_classes:
        raise ValueError(
            f"groups are of {num_classes} classes, the logits of "
            f"{examples.num_classes}: give the same"
        )
    if student is None:
        return
    if student.values.shape != examples.values.shape:
        raise ValueError(
            f"{student.source} has {len(student)} examples of {student.num_classes} "
            f"classes, {examples.source} {len(examples)} of {examples.num_classes}: "
            "give logits of both models on the same examples"
        )
    different = np.flatnonzero(examples.labels != student.labels)
    if different.size:
        row = different[0]
        raise ValueError(
            f"row {row} has label {student.labels[row]} in {student.source} and "
            f"{examples.labels[row]} in {examples.source} ({different.size} rows "
            "differ): give the same examples in the same order"
        )


def _pad(x: Array, size: int) -> Array:
    """Returns `x` with zeros appended along the first axis, up to `size`."""
    padding = [(0, 0)] * x.ndim
    padding[0] = (0, size - len(x))
    return np.pad(x, padding)


# --- Statistics of each example, on the device ---


class _ExampleStats(NamedTuple):
    """Holds statistics of each example: device arrays, or NumPy arrays.

    Attributes:
      probabilities: `[B, C]`.
      prediction: int `[B]`.
      confidence: `[B]`, the probability of the prediction.
      loss: `[B, 2]`, the inter and the intra part.
      group_mass: for each temperature, `[B, G]`.
      divergence: for each temperature, `[B, 1 + G]`, see `_split_kl`; empty without a
        student.
    """

    probabilities: Any
    prediction: Any
    confidence: Any
    loss: Any
    group_mass: tuple[Any, ...]
    divergence: tuple[Any, ...]


@functools.partial(jax.jit, static_argnames="temperatures")
def _example_stats(
    logits: jax.Array,
    student_logits: jax.Array | None,
    labels: jax.Array,
    groups: ClassGroups,
    temperatures: tuple[float, ...],
) -> _ExampleStats:
    """Computes the statistics of each example of a block."""
    probabilities = jax.nn.softmax(logits)
    is_label = labels[:, None] == jnp.arange(logits.shape[1])[None, :]
    label_logits = jnp.where(is_label, 0.0, _NO_MASS)
    loss, _ = _split_kl(logits, label_logits, groups, 1.0)
    inter = loss[:, 0]
    intra = loss[:, 1:].sum(axis=1)
    group_mass = []
    divergence = []
    for temperature in temperatures:
        # Without a student the KL is not returned, so XLA does not compute it.
        student = logits if student_logits is None else student_logits
        kl, mass = _split_kl(student, logits, groups, temperature)
        divergence.append(kl)
        group_mass.append(mass)
    return _ExampleStats(
        probabilities=probabilities,
        prediction=jnp.argmax(logits, axis=1),
        confidence=probabilities.max(axis=1),
        loss=jnp.stack([inter, intra], axis=1),
        group_mass=tuple(group_mass),
        divergence=() if student_logits is None else tuple(divergence),
    )


def _split_kl(
    student: jax.Array, teacher: jax.Array, groups: ClassGroups, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the parts of KL(teacher ‖ student), and the teacher's group masses.

    The parts, `[B, 1 + G]`, are inter, and mass times intra for each group; they sum to
    the KL. The masses are `[B, G]`.
    """
    split = losses.group_kl(student, teacher, groups, temperature=temperature)
    mass = jnp.exp(split.teacher_log_mass)
    weighted_intra = mass * split.intra
    kl_parts = jnp.concatenate([split.inter[:, None], weighted_intra], axis=1)
    return kl_parts, mass


# --- Their sums, on the host ---


class _Sums:
    """Holds sums of `_ExampleStats` by class or group of the true label.

    They are float64: in float32 the sum over a million examples would lose digits.

    Attributes:
      names, temperatures, assignment: of the groups, see `audit` and `ClassGroups`.
      membership: `[C, G]`, 1 where the class is in the group, else 0.
      count: `[C]`, examples of each class.
      hits: `[C]`, those of them that are predicted right.
      predicted: `[C]`, examples that are predicted as the class.
      mass: `[C, C]`, the probability that examples of each class give to each class.
      loss: `[C, 2]`, the inter and the intra part.
      between: `[G, G]`, examples by group of the label and of the prediction.
      bins: `[G, 3, NUM_BINS]`, see `metrics.EvalSums`.
      group_mass: for each temperature, `[G, G]`, the probability that the examples of
        each group give to each group.
      divergence: for each temperature, `[G, 1 + G]`, see `_split_kl`.
    """

    def __init__(self, groups: ClassGroups, temperatures: tuple[float, ...]):
        self.names = groups.names
        self.temperatures = temperatures
        self.assignment: Array = np.asarray(groups.assignment)
        num_groups = groups.num_groups
        num_classes = len(self.assignment)
        self.membership: Floats = np.eye(num_groups)[self.assignment]
        self.count: Floats = np.zeros(num_classes)
        self.hits: Floats = np.zeros(num_classes)
        self.predicted: Floats = np.zeros(num_classes)
        self.mass: Floats = np.zeros((num_classes, num_classes))
        self.loss: Floats = np.zeros((num_classes, 2))
        self.between: Floats = np.zeros((num_groups, num_groups))
        self.bins: Floats = np.zeros((num_groups, 3, metrics.NUM_BINS))
        self.group_mass: list[Floats] = []
        self.divergence: list[Floats] = []
        for _ in temperatures:
            self.group_mass.append(np.zeros((num_groups, num_groups)))
            self.divergence.append(np.zeros((num_groups, 1 + num_groups)))

    @property
    def total(self) -> float:
        """Returns the number of examples."""
        return float(self.count.sum())

    @property
    def group_count(self) -> Floats:
        """Returns the number of examples of each group, `[G]`."""
        return self.count @ self.membership

    def add(self, stats: _ExampleStats, labels: Array) -> None:
        """Adds the examples of a block; the statistics are NumPy arrays."""
        self._add_by_class(stats, labels)
        self._add_by_group(stats, labels)

    def _add_by_class(self, stats: _ExampleStats, labels: Array) -> None:
        count_by = functools.partial(np.bincount, minlength=len(self.assignment))
        self.count += count_by(labels)
        self.hits += count_by(labels, stats.prediction == labels)
        self.predicted += count_by(stats.prediction)
        for i in range(2):
            self.loss[:, i] += count_by(labels, stats.loss[:, i])
        # Sorted by label, the examples of a class are consecutive rows, and `reduceat`
        # sums them without a loop over classes.
        order = np.argsort(labels, kind="stable")
        classes, starts = np.unique(labels[order], return_index=True)
        self.mass[classes] += np.add.reduceat(
            stats.probabilities[order], starts, axis=0, dtype=np.float64
        )

    def _add_by_group(self, stats: _ExampleStats, labels: Array) -> None:
        in_group = self.membership[
            labels
        ].T  # [G, B], 1 where the label is in the group
        self.between += in_group @ self.membership[stats.prediction]
        for mass_sum, mass in zip(self.group_mass, stats.group_mass):
            mass_sum += in_group @ mass
        for divergence_sum, divergence in zip(self.divergence, stats.divergence):
            divergence_sum += in_group @ divergence
        ones = np.ones(len(labels))
        hit = stats.prediction == labels
        bin_indices = metrics.bin_index(stats.confidence)
        for group, weight in enumerate(in_group):
            for i, values in enumerate((ones, stats.confidence, hit)):
                self.bins[group, i] += np.bincount(
                    bin_indices, weight * values, minlength=metrics.NUM_BINS
                )


# --- Their summary ---


def _summarize(sums: _Sums) -> dict[str, Any]:
    """Returns the result of `audit` without `divergence`."""
    count = sums.group_count
    mass = {}
    mass_by_group = {}
    for temperature, group_mass in zip(sums.temperatures, sums.group_mass):
        key = f"{temperature:g}"
        mass[key] = _by_name(sums.names, group_mass.sum(axis=0) / sums.total)
        mass_by_group[key] = _row_means(group_mass, count)
    groups = {}
    for g, name in enumerate(sums.names):
        groups[name] = _summarize_classes(sums, sums.assignment == g, sums.bins[g])
    every_class = np.ones(len(sums.assignment), bool)
    groups["all"] = _summarize_classes(sums, every_class, sums.bins.sum(axis=0))
    return {
        "examples": int(sums.total),
        "share": _by_name(sums.names, count / sums.total),
        "mass": mass,
        "mass_by_group": mass_by_group,
        "groups": groups,
        "between": _row_means(100 * sums.between, count),
        "classes": _summarize_each_class(sums),
    }


def _summarize_classes(sums: _Sums, classes: Array, bins: Floats) -> dict[str, Any]:
    """Returns an entry of `groups`.

    Args:
      sums: over all examples.
      classes: bool `[C]`, whose examples are summarized.
      bins: `[3, NUM_BINS]`, the calibration of these examples.
    """
    count = sums.count[classes].sum()
    if not count:
        return {"examples": 0}
    # Both parts are at least 0, but for rounding errors.
    inter, intra = np.maximum(sums.loss[classes].sum(axis=0) / count, 0)
    return {
        "examples": int(count),
        "accuracy": float(100 * sums.hits[classes].sum() / count),
        "confidence": float(100 * bins[1].sum() / count),
        "ece": float(metrics.calibration_error(bins)),
        "ece_by_chance": float(metrics.calibration_error_by_chance(bins)),
        "loss": float(inter + intra),
        "inter": float(inter),
        "intra": float(intra),
        "bins": bins.tolist(),
    }


def _summarize_each_class(sums: _Sums) -> dict[str, Any]:
    """Returns `classes`, a dict of lists by class."""
    has_examples = sums.count > 0
    count = np.maximum(sums.count, 1)
    # −1 keeps the class itself from being the one with the largest mass.
    is_diagonal = np.eye(len(count), dtype=bool)
    mass_on_others = np.where(is_diagonal, -1.0, sums.mass)
    largest_other = mass_on_others.argmax(axis=1)
    largest_other_mass = mass_on_others.max(axis=1) / count
    group_mass = sums.mass @ sums.membership / count[:, None]
    return {
        "examples": sums.count.astype(int).tolist(),
        "share": (sums.count / sums.total).tolist(),
        "predicted": (sums.predicted / sums.total).tolist(),
        "mass": (sums.mass.sum(axis=0) / sums.total).tolist(),
        "recall": _or_none(100 * sums.hits / count, has_examples),
        "own": _or_none(np.diag(sums.mass) / count, has_examples),
        "to": _or_none(largest_other, has_examples),
        "to_mass": _or_none(largest_other_mass, has_examples),
        "to_groups": _or_none(group_mass, has_examples),
    }


def _summarize_divergence(sums: _Sums) -> dict[str, Any]:
    """Returns `divergence`, by temperature."""
    result = {}
    for temperature, divergence in zip(sums.temperatures, sums.divergence):
        by_group = {}
        for name, kl_parts, count in zip(sums.names, divergence, sums.group_count):
            by_group[name] = _mean_kl(sums.names, kl_parts, count)
        by_group["all"] = _mean_kl(sums.names, divergence.sum(axis=0), sums.total)
        result[f"{temperature:g}"] = by_group
    return result


def _mean_kl(
    names: tuple[str, ...], kl_parts: Floats, count: float
) -> dict[str, Any] | None:
    """Returns the mean KL over examples, from the sums `[1 + G]` of its parts."""
    if not count:
        return None
    mean = np.maximum(kl_parts / count, 0)  # at least 0, but for rounding errors
    return {
        "kl": float(mean.sum()),
        "inter": float(mean[0]),
        "intra": _by_name(names, mean[1:]),
    }


def _by_name(names: tuple[str, ...], values: Floats) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}


def _row_means(sums: Floats, count: Floats) -> list[list[float] | None]:
    """Returns each row over its count; None for a row without examples."""
    means: list[list[float] | None] = []
    for row, n in zip(sums, count):
        means.append((row / n).tolist() if n else None)
    return means


def _or_none(values: Array, has_examples: Array) -> list[Any]:
    """Returns the values as a list, with None for classes without examples."""
    result = []
    for value, exists in zip(values.tolist(), has_examples):
        result.append(value if exists else None)
    return result
