"""Measures how biased a model is towards head, medium and tail classes, from its logits.

The loss is split into "wrong group" and "wrong class within the group" by `losses.group_kl`, as LTKD does: if the
reference has all of its mass on the true class y of group G, the KL from it to the model is the cross-entropy, and

    −log p_y = −log p_G − log(p_y / p_G).
               inter      intra
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

_BLOCK = (
    2**22
)  # numbers of logits that are evaluated together, unless a block size is given
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

    Shares and masses are parts of 1, accuracies and calibration errors percent, losses and KLs nats. What has no
    example is None. A group's or a class's examples are those whose true label is in it. With p = softmax(z):

    - `examples`: N.
    - `share`: by group, its part of the examples.
    - `mass`: by temperature τ and group G, mean of Σ_{c∈G} softmax(z/τ)_c over all examples.
    - `mass_by_group`: by temperature, `[G][G]`, the same mean over the examples of each group.
    - `between`: `[G][G]`, percent of each group's examples whose prediction is in each group.
    - `groups`: by group, and for "all": `examples`, `accuracy`, mean `confidence`, `loss` (cross-entropy) and its
      parts `inter` and `intra`; `ece`, `ece_by_chance` and `bins`, see `metrics.calibration_error`,
      `metrics.calibration_error_by_chance` and `metrics.EvalSums`.
    - `classes`: lists by class. Of all examples: the class's `share`, part of the predictions (`predicted`) and
      `mass`; a class loses mass if `mass < share`. Of its own examples: their number (`examples`), `recall`, the mass
      that they give to it (`own`), to each group (`to_groups`), and to the other class with most of it (`to`,
      `to_mass`).
    - `divergence`, with a student only: by temperature, then by group and for "all": `kl`, KL(model ‖ student) without
      the factor τ²; its parts `inter` and, by group, `intra`, each times the model's mass on that group, so that
      `kl == inter + Σ_G intra[G]`.

    Args:
      examples: logits `[N, C]` and labels `[N]` of the model.
      groups: of the C classes.
      temperatures: at which masses and divergences are computed.
      student: logits of a second model on the same examples.
      block_size: examples that are evaluated together; by default about four million logits.
      on_block: called with the number of examples of each block that was evaluated.

    Raises:
      ValueError: logits of views, groups of other classes, or a student on other examples.

    >>> from ltkd_jax.data import logits
    >>> groups = ClassGroups.from_assignment([0, 1], names=["head", "tail"])
    >>> examples = logits.from_arrays([[1.0, 0.0], [1.0, 0.0]], [0, 1])  # always prefers class 0
    >>> result = audit(examples, groups, temperatures=(1.0,))
    >>> {name: round(mass, 2) for name, mass in result["mass"]["1"].items()}, result["share"]
    ({'head': 0.73, 'tail': 0.27}, {'head': 0.5, 'tail': 0.5})
    >>> result["groups"]["tail"]["accuracy"], round(result["groups"]["tail"]["inter"], 2)
    (0.0, 1.31)
    """
    _check(examples, groups, student)
    # The next power of two of a small set: sets of about the same size then share a compilation.
    size = block_size or min(
        max(_BLOCK // examples.num_classes, 1), 1 << (len(examples) - 1).bit_length()
    )
    sums = _Sums(groups, tuple(float(temperature) for temperature in temperatures))
    student_blocks = None if student is None else student.blocks(size)
    start = 0
    for block in examples.blocks(size):
        labels = examples.labels[start : start + len(block)]
        student_block = None if student_blocks is None else next(student_blocks)
        # The last block is filled up, so that one shape is compiled.
        batch = jax.tree.map(
            functools.partial(_pad, size=size), (block, student_block, labels)
        )
        stats = _example_stats(*batch, groups, sums.temperatures)
        sums.add(jax.tree.map(lambda x: np.asarray(x)[: len(labels)], stats), labels)
        start += len(block)
        if on_block:
            on_block(len(block))
    result = _summarize(sums)
    return (
        result
        if student is None
        else {**result, "divergence": _summarize_divergence(sums)}
    )


def _check(examples: Logits, groups: ClassGroups, student: Logits | None) -> None:
    if examples.values.ndim != 2:
        raise ValueError(
            f"{examples.source}: logits are {list(examples.values.shape)}; give one view, [N, C]"
        )
    num_classes = len(np.asarray(groups.assignment))
    if num_classes != examples.num_classes:
        raise ValueError(
            f"groups are of {num_classes} classes, the logits of {examples.num_classes}: give the same"
        )
    if student is None:
        return
    if student.values.shape != examples.values.shape:
        raise ValueError(
            f"{student.source} has {len(student)} examples of {student.num_classes} classes, {examples.source} "
            f"{len(examples)} of {examples.num_classes}: give logits of both models on the same examples"
        )
    different = np.flatnonzero(examples.labels != student.labels)
    if different.size:
        row = different[0]
        raise ValueError(
            f"row {row} has label {student.labels[row]} in {student.source} and {examples.labels[row]} in "
            f"{examples.source} ({different.size} rows differ): give the same examples in the same order"
        )


def _pad(x: Array, size: int) -> Array:
    return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))


class _ExampleStats(NamedTuple):
    """What is measured of each example, `[B, ...]`: device arrays, or NumPy arrays."""

    probabilities: Any  # [B, C]
    prediction: Any  # int [B]
    confidence: Any  # [B], the probability of the prediction
    loss: Any  # [B, 2], the inter and the intra part
    group_mass: tuple[Any, ...]  # for each temperature, [B, G]
    divergence: tuple[
        Any, ...
    ]  # for each temperature, [B, 1 + G]: the inter part, and the intra part of each group


@functools.partial(jax.jit, static_argnames="temperatures")
def _example_stats(
    logits: jax.Array,
    student_logits: jax.Array | None,
    labels: jax.Array,
    groups: ClassGroups,
    temperatures: tuple[float, ...],
) -> _ExampleStats:
    probabilities = jax.nn.softmax(logits)
    is_label = labels[:, None] == jnp.arange(logits.shape[1])[None, :]
    loss, _ = _split_kl(logits, jnp.where(is_label, 0.0, _NO_MASS), groups, 1.0)
    group_mass = []
    divergence = []
    for temperature in temperatures:
        student = logits if student_logits is None else student_logits
        kl, mass = _split_kl(student, logits, groups, temperature)
        divergence.append(kl)
        group_mass.append(mass)
    return _ExampleStats(
        probabilities=probabilities,
        prediction=jnp.argmax(logits, axis=1),
        confidence=probabilities.max(axis=1),
        loss=jnp.stack([loss[:, 0], loss[:, 1:].sum(axis=1)], axis=1),
        group_mass=tuple(group_mass),
        divergence=() if student_logits is None else tuple(divergence),
    )


def _split_kl(
    student: jax.Array, teacher: jax.Array, groups: ClassGroups, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the parts of KL(teacher ‖ student), `[B, 1 + G]`, and the teacher's group mass, `[B, G]`."""
    split = losses.group_kl(student, teacher, groups, temperature=temperature)
    mass = jnp.exp(split.teacher_log_mass)
    return jnp.concatenate([split.inter[:, None], mass * split.intra], axis=1), mass


class _Sums:
    """Sums of `_ExampleStats`, by class or by group of the true label; float64, so that a million examples add up.

    Attributes:
      membership: `[C, G]`, 1 where the class is in the group.
      count, hits, predicted: `[C]`; examples of each class, those predicted right, and predictions of the class.
      mass: `[C, C]`, the probability that the examples of each class give to each class.
      loss: `[C, 2]`, the inter and the intra part.
      between: `[G, G]`, examples by group of the label and of the prediction.
      bins: `[G, 3, NUM_BINS]`, as `metrics.EvalSums`.
      group_mass: for each temperature, `[G, G]`; the probability that the examples of each group give to each group.
      divergence: for each temperature, `[G, 1 + G]`.
    """

    def __init__(self, groups: ClassGroups, temperatures: tuple[float, ...]):
        self.names = groups.names
        self.temperatures = temperatures
        self.assignment: Array = np.asarray(groups.assignment)
        classes, number = len(self.assignment), groups.num_groups
        self.membership: Floats = np.eye(number)[self.assignment]
        self.count: Floats = np.zeros(classes)
        self.hits: Floats = np.zeros(classes)
        self.predicted: Floats = np.zeros(classes)
        self.mass: Floats = np.zeros((classes, classes))
        self.loss: Floats = np.zeros((classes, 2))
        self.between: Floats = np.zeros((number, number))
        self.bins: Floats = np.zeros((number, 3, metrics.NUM_BINS))
        self.group_mass: list[Floats] = [
            np.zeros((number, number)) for _ in temperatures
        ]
        self.divergence: list[Floats] = [
            np.zeros((number, 1 + number)) for _ in temperatures
        ]

    def add(self, stats: _ExampleStats, labels: Array) -> None:
        """Adds the examples of a block; NumPy arrays."""
        hit = stats.prediction == labels
        ones = np.ones(len(labels))
        classes = len(self.assignment)
        self.count += np.bincount(labels, minlength=classes)
        self.hits += np.bincount(labels, hit, minlength=classes)
        self.predicted += np.bincount(stats.prediction, minlength=classes)
        for part in range(2):
            self.loss[:, part] += np.bincount(
                labels, stats.loss[:, part], minlength=classes
            )
        # A sum over the examples of each class: sorted by label, they are consecutive.
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        self.mass[present] += np.add.reduceat(
            stats.probabilities[order], starts, axis=0, dtype=np.float64
        )

        of_group = self.membership[labels].T  # [G, B]
        self.between += of_group @ self.membership[stats.prediction]
        for total, mass in zip(self.group_mass, stats.group_mass):
            total += of_group @ mass
        for total, divergence in zip(self.divergence, stats.divergence):
            total += of_group @ divergence
        bins = metrics.bin_of(stats.confidence)
        for group, weight in enumerate(of_group):
            for row, values in enumerate((ones, stats.confidence, hit)):
                self.bins[group, row] += np.bincount(
                    bins, weight * values, minlength=metrics.NUM_BINS
                )


def _summarize(sums: _Sums) -> dict[str, Any]:
    total = sums.count.sum()
    count = sums.count @ sums.membership
    temperatures = [f"{temperature:g}" for temperature in sums.temperatures]
    groups = {}
    for group, name in enumerate(sums.names):
        groups[name] = _summarize_examples(
            sums, sums.assignment == group, sums.bins[group]
        )
    groups["all"] = _summarize_examples(
        sums, np.ones(len(sums.assignment), bool), sums.bins.sum(axis=0)
    )
    return {
        "examples": int(total),
        "share": _by_name(sums.names, count / total),
        "mass": {
            temperature: _by_name(sums.names, mass.sum(axis=0) / total)
            for temperature, mass in zip(temperatures, sums.group_mass)
        },
        "mass_by_group": {
            temperature: _row_means(mass, count)
            for temperature, mass in zip(temperatures, sums.group_mass)
        },
        "groups": groups,
        "between": _row_means(100 * sums.between, count),
        "classes": _summarize_classes(sums),
    }


def _summarize_examples(sums: _Sums, classes: Array, bins: Floats) -> dict[str, Any]:
    """Summarizes the examples of some classes, bool `[C]`, whose calibration is in `bins`."""
    count = sums.count[classes].sum()
    if not count:
        return {"examples": 0}
    # Neither part of the loss is negative; rounding can be.
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


def _summarize_classes(sums: _Sums) -> dict[str, Any]:
    total = sums.count.sum()
    has_examples = sums.count > 0
    count = np.maximum(sums.count, 1)
    # The other class to which most mass goes.
    others = np.where(np.eye(len(count), dtype=bool), -1.0, sums.mass)
    to = others.argmax(axis=1)
    return {
        "examples": sums.count.astype(int).tolist(),
        "share": (sums.count / total).tolist(),
        "predicted": (sums.predicted / total).tolist(),
        "mass": (sums.mass.sum(axis=0) / total).tolist(),
        "recall": _or_none(100 * sums.hits / count, has_examples),
        "own": _or_none(np.diag(sums.mass) / count, has_examples),
        "to": _or_none(to, has_examples),
        "to_mass": _or_none(others.max(axis=1) / count, has_examples),
        "to_groups": _or_none(
            sums.mass @ sums.membership / count[:, None], has_examples
        ),
    }


def _summarize_divergence(sums: _Sums) -> dict[str, Any]:
    count = sums.count @ sums.membership
    result = {}
    for temperature, parts in zip(sums.temperatures, sums.divergence):
        by_group = {
            name: _mean_kl(sums.names, parts[g], count[g])
            for g, name in enumerate(sums.names)
        }
        by_group["all"] = _mean_kl(sums.names, parts.sum(axis=0), count.sum())
        result[f"{temperature:g}"] = by_group
    return result


def _mean_kl(
    names: tuple[str, ...], parts: Floats, count: float
) -> dict[str, Any] | None:
    if not count:
        return None
    mean = np.maximum(parts / count, 0)  # no part is negative; rounding can be
    return {
        "kl": float(mean.sum()),
        "inter": float(mean[0]),
        "intra": _by_name(names, mean[1:]),
    }


def _by_name(names: tuple[str, ...], values: Floats) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}


def _row_means(matrix: Floats, count: Floats) -> list[list[float] | None]:
    return [(row / n).tolist() if n else None for row, n in zip(matrix, count)]


def _or_none(values: Array, has_examples: Array) -> list[Any]:
    return [
        value if exists else None
        for value, exists in zip(values.tolist(), has_examples)
    ]
