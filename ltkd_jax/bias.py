"""A model's bias among head, medium and tail classes, from its logits: sums over blocks of examples, then a summary.

The split of a loss into "wrong group" and "wrong class within the group" is `losses.group_kl`'s, the one that LTKD
trains by: with all of the reference's mass on the true class y of group G, the KL from it to the model is the
cross-entropy, and

    −log p_y = −log p_G − log(p_y / p_G).
               inter      intra
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltkd_jax import losses, metrics
from ltkd_jax.data.logits import Logits

BLOCK = 2**22  # logits that are looked at together
_NEVER = -1e30  # the logit of a class without mass


class Split(NamedTuple):
    """Parts of a divergence by example: inter `[B]`, and intra `[B, G]` with each group's mass multiplied in."""

    inter: jax.Array
    intra: jax.Array


class Seen(NamedTuple):
    """What is looked at of each example."""

    probabilities: jax.Array  # [B, C]
    prediction: jax.Array  # int [B]
    confidence: jax.Array  # [B], the prediction's probability
    loss: Split  # of the cross-entropy
    mass: tuple  # of each temperature: [B, G]
    divergence: tuple  # of each temperature: the `Split` of KL(this model ‖ the other); empty without another


@functools.partial(jax.jit, static_argnames="temperatures")
def look(logits, other, labels, groups, temperatures) -> Seen:
    """What is looked at of a block of examples.

    Args:
      logits: float32 `[B, C]`.
      other: a second model's logits of them, or None.
      labels: int `[B]`.
      groups: a `ClassGroups`.
      temperatures: at which masses and divergences are wanted.
    """
    probabilities = jax.nn.softmax(logits)
    truth = jnp.where(labels[:, None] == jnp.arange(logits.shape[1])[None, :], 0.0, _NEVER)
    return Seen(
        probabilities=probabilities,
        prediction=jnp.argmax(logits, axis=1),
        confidence=probabilities.max(axis=1),
        loss=_split(logits, truth, groups, 1.0)[0],
        mass=tuple(_split(logits, logits, groups, t)[1] for t in temperatures),
        divergence=() if other is None else tuple(_split(other, logits, groups, t)[0] for t in temperatures),
    )


def _split(student, teacher, groups, temperature):
    """The KL from teacher to student as a `Split`, and the teacher's mass by group, `[B, G]`."""
    found = losses.group_kl(student, teacher, groups, temperature=temperature)
    mass = jnp.exp(found.teacher_log_mass)
    return Split(found.inter, mass * found.intra), mass


class Sums:
    """Sums over examples, by class or group of the true label; float64, so that a million of them add up.

    Attributes:
      count, hits, predicted: `[C]`, examples of the class, those of them predicted right, predictions of the class.
      mass: `[C, C]`, probability that examples of the one class give to the other; the one array that grows with C².
      loss: `[C, 2]`, inter and intra part of the cross-entropy.
      between: `[G, G]`, examples by group of label and prediction.
      bins: `[G, 3, NUM_BINS]`, as `metrics.EvalSums`.
      group_mass: of each temperature `[G, G]`, probability that examples of the one group give to the other.
      divergence: of each temperature `[G, 1 + G]`, inter and each group's intra part.
    """

    def __init__(self, num_classes: int, groups, temperatures):
        self.groups, self.temperatures = groups, tuple(map(float, temperatures))
        self._of_class = np.asarray(groups.assignment)
        classes, number = num_classes, groups.num_groups
        self.count, self.hits, self.predicted = (np.zeros(classes) for _ in range(3))
        self.mass, self.loss = np.zeros((classes, classes)), np.zeros((classes, 2))
        self.between, self.bins = np.zeros((number, number)), np.zeros((number, 3, metrics.NUM_BINS))
        self.group_mass = [np.zeros((number, number)) for _ in temperatures]
        self.divergence = [np.zeros((number, 1 + number)) for _ in temperatures]

    def add(self, seen: Seen, labels: np.ndarray) -> None:
        """Adds what was seen of a block; NumPy arrays."""
        group, hit = self._of_class[labels], seen.prediction == labels
        by_class = functools.partial(np.bincount, labels, minlength=len(self.count))
        self.count += by_class()
        self.hits += by_class(hit)
        self.predicted += np.bincount(seen.prediction, minlength=len(self.count))
        self.loss += np.stack([by_class(seen.loss.inter), by_class(seen.loss.intra.sum(axis=1))], axis=1)
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        self.mass[present] += np.add.reduceat(seen.probabilities[order], starts, axis=0, dtype=np.float64)
        place = group * metrics.NUM_BINS + metrics.bin_of(seen.confidence)
        by_bin = functools.partial(np.bincount, place, minlength=self.bins[:, 0].size)
        counted = np.stack([by_bin(), by_bin(seen.confidence), by_bin(hit)])
        self.bins += counted.reshape(3, *self.bins[:, 0].shape).transpose(1, 0, 2)
        belongs, predicted = (_membership(x, self.groups) for x in (group, self._of_class[seen.prediction]))
        self.between += belongs.T @ predicted
        for total, mass in zip(self.group_mass, seen.mass):
            total += belongs.T @ mass
        for total, split in zip(self.divergence, seen.divergence):
            total += belongs.T @ np.concatenate([split.inter[:, None], split.intra], axis=1)


def _membership(of_group, groups):
    return (of_group[:, None] == np.arange(groups.num_groups)).astype(np.float64)


def measure(
    logits: Logits, groups, temperatures, other: Logits | None = None, on_block: Callable[[int], None] | None = None
) -> Sums:
    """The sums of a set of examples.

    Args:
      logits: of the model.
      groups: a `ClassGroups` of its classes.
      temperatures: at which masses and divergences are wanted.
      other: a second model's logits of the same examples.
      on_block: called with the number of examples that were added.

    Raises:
      LogitsError: as `Logits.blocks`.
    """
    # A power of two, or the most: sets of about the same size share a compilation.
    size = min(max(BLOCK // logits.num_classes, 1), 1 << (len(logits) - 1).bit_length())
    sums, start = Sums(logits.num_classes, groups, temperatures), 0
    others = None if other is None else other.blocks(size)
    for block in logits.blocks(size):
        labels = logits.labels[start : start + len(block)]
        # The last block is filled up: one shape is compiled.
        batch = jax.tree.map(functools.partial(_filled, size), (block, next(others) if others else None, labels))
        found = look(*batch, groups, sums.temperatures)
        sums.add(jax.tree.map(lambda x: np.asarray(x)[: len(block)], found), labels)  # noqa: B023
        start += len(block)
        if on_block:
            on_block(len(block))
    if others:
        next(others, None)  # at its end it says what was wrong
    return sums


def _filled(size, x):
    return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1))) if len(x) < size else x


# The summary.


def summarize(sums: Sums) -> dict:
    """What the sums say, for JSON: shares and masses as parts of 1, accuracies in percent, losses in nats.

    Returns:
      "groups": a dict for each group of the true label, and for "all"; "mass": by temperature and group, and
      "mass_by_group", the same for the examples of each group; "share": of the examples; "between": percent of each
      group's examples by group of the prediction; "classes": lists by class. What has no example is None.
    """
    names, total = sums.groups.names, sums.count.sum()
    belongs = _membership(np.asarray(sums.groups.assignment), sums.groups)
    count = belongs.T @ sums.count
    temperatures = [f"{t:g}" for t in sums.temperatures]
    groups = {name: _group(sums, belongs[:, g] > 0, sums.bins[g]) for g, name in enumerate(names)}
    groups["all"] = _group(sums, np.ones(len(belongs), bool), sums.bins.sum(axis=0))
    return {
        "examples": int(total),
        "share": _named(names, count / total),
        "mass": {t: _named(names, mass.sum(axis=0) / total) for t, mass in zip(temperatures, sums.group_mass)},
        "mass_by_group": {t: _rows(mass, count) for t, mass in zip(temperatures, sums.group_mass)},
        "groups": groups,
        "between": _rows(100 * sums.between, count),
        "classes": _classes(sums, belongs),
    }


def divergence(sums: Sums) -> dict:
    """The KL from the model to the other by temperature and group of the true label, in nats.

    `kl == inter + Σ_G intra[G]`, where each group's intra part is multiplied by the model's mass on it.
    """
    names = sums.groups.names
    count = _membership(np.asarray(sums.groups.assignment), sums.groups).T @ sums.count
    return {
        f"{t:g}": {
            **{name: _parts(names, parts[g], count[g]) for g, name in enumerate(names)},
            "all": _parts(names, parts.sum(axis=0), count.sum()),
        }
        for t, parts in zip(sums.temperatures, sums.divergence)
    }


def _parts(names, parts, count):
    if not count:
        return None
    mean = np.maximum(parts / count, 0)  # a KL is; rounding need not be
    return {"kl": float(mean.sum()), "inter": float(mean[0]), "intra": _named(names, mean[1:])}


def _named(names, values):
    return {name: float(value) for name, value in zip(names, values)}


def _rows(matrix, count):
    return [(row / n).tolist() if n else None for row, n in zip(matrix, count)]


def _group(sums, members, bins):
    count = sums.count[members].sum()
    if not count:
        return {"examples": 0}
    inter, intra = np.maximum(sums.loss[members].sum(axis=0) / count, 0)
    return {
        "examples": int(count),
        "accuracy": float(100 * sums.hits[members].sum() / count),
        "confidence": float(100 * bins[1].sum() / count),
        "ece": float(metrics.calibration_error(bins)),
        "ece_by_chance": float(metrics.calibration_error_by_chance(bins)),
        "loss": float(inter + intra),
        "inter": float(inter),
        "intra": float(intra),
        "bins": bins.tolist(),
    }


def _classes(sums, belongs):
    """Lists by class: what a class's examples get, and what the class gets of all examples."""
    with np.errstate(invalid="ignore"):
        recall, own = 100 * sums.hits / sums.count, np.diag(sums.mass) / sums.count
        to_groups = sums.mass @ belongs / sums.count[:, None]
    to, part = np.array([_next(row, c) for c, row in enumerate(sums.mass)]).T
    seen, total = sums.count > 0, sums.count.sum()
    return {
        "examples": sums.count.astype(int).tolist(),
        "share": (sums.count / total).tolist(),
        "predicted": (sums.predicted / total).tolist(),
        "mass": (sums.mass.sum(axis=0) / total).tolist(),
        "recall": _or_none(recall, seen),
        "own": _or_none(own, seen),
        "to": _or_none(to.astype(int), seen),
        "to_mass": _or_none(part / np.maximum(sums.count, 1), seen),
        "to_groups": _or_none(to_groups, seen),
    }


def _next(row, c):
    """The class but c with the largest mass of a row, and that mass."""
    others = np.append(row[:c], row[c + 1 :])
    found = int(others.argmax())
    return found + (found >= c), others[found]


def _or_none(values, known):
    return [value if there else None for value, there in zip(values.tolist(), known)]
