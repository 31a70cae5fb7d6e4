"""What an audit is given: a model's logits, and how often it was trained on each class."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from ltkd_jax.data import logits, longtail
from ltkd_jax.groups import DEFAULT_FRACTIONS, check_counts


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to audit: logits of its test and, perhaps, of its training input, and what is known of its classes."""

    name: str
    source: str
    test: logits.Logits
    train: logits.Logits | None = None
    class_counts: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    fractions: tuple = DEFAULT_FRACTIONS


class AuditError(ValueError):
    """What cannot be audited; the message names it and the remedy."""


def read(path, *, data_dir: str = "", subset: str = "") -> Model:
    """A model from an .npz file of logits, or from a folder that training left; see `restored.restore`."""
    path = pathlib.Path(path)
    if path.is_dir():
        return _from_folder(path, data_dir, subset)
    archive = logits.Archive(path)
    test, train = archive.examples(), None
    if any(logits.TRAIN + kind in archive.keys for kind in logits.KINDS):
        train = archive.examples(logits.TRAIN)
        if train.num_classes != test.num_classes:
            raise AuditError(
                f"{path}: the training input has {train.num_classes} classes, the other {test.num_classes}: give both "
                "from the same model"
            )
    counts, names = (archive.array(k) if k in archive.keys else None for k in ("class_counts", "class_names"))
    for key, value in (("class_counts", counts), ("class_names", names)):
        if value is not None and value.shape != (test.num_classes,):
            raise AuditError(f"{path}: {key} is {list(value.shape)}, the logits are of {test.num_classes} classes")
    return Model(path.stem, str(path), test, train, counts, names)


def _from_folder(path, data_dir, subset):
    from experiments.audit import restore

    found = restore.restore(path, data_dir=data_dir, subset=subset)
    test, train = (found.logits(getattr(found.data, part), f"{part} images") for part in ("test", "train"))
    names, fractions = found.data.source.class_names, tuple(found.config.groups.fractions)
    return Model(found.name, str(path), test, train, found.data.class_counts, names, fractions)


def class_counts(model: Model, counts_file: str | None, imbalance: str | None):
    """The training images of each class, and in words where that is known from.

    In this order: the file of counts, the imbalance, the model's own, the labels of its training input; and the labels
    of its test input if these are long-tailed themselves.

    Raises:
      AuditError: none of them is known, or one is wrong.
    """
    number = model.test.num_classes
    if counts_file is not None:
        found, told = _read_counts(counts_file), f"as {counts_file} has them"
    elif imbalance is not None:
        found, told = (
            _exponential(imbalance, number),
            f"exponential with imbalance {imbalance}, in the order of classes",
        )
    elif model.class_counts is not None:
        found, told = model.class_counts, f"as {model.source} has them"
    elif model.train is not None:
        found, told = np.bincount(model.train.labels, minlength=number), "counted in its training input"
    else:
        found, told = _of_labels(model), "which are not known: the examples of this input in their place"
    try:
        found = check_counts(found)
    except ValueError as error:
        raise AuditError(f"training images of each class, {told}: {error}") from None
    if len(found) != number:
        raise AuditError(f"training images of {len(found)} classes, {told}; the logits are of {number}")
    return found, told


def _of_labels(model):
    present = np.bincount(model.test.labels, minlength=model.test.num_classes)
    if not present.all() or present.max() < 2 * present.min():
        raise AuditError(
            f"{model.source} does not say how often each class was trained on: give --counts=FILE or --imbalance=100 "
            "(exponential, as CIFAR-100-LT), or add class_counts to the file"
        )
    return present


def _read_counts(path):
    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        text = pathlib.Path(path).read_text()
        if not path.endswith(".json"):
            return [float(word) for word in text.replace(",", " ").split()]
        found = json.loads(text)
        return found["class_counts"] if isinstance(found, dict) else found
    except (OSError, ValueError, KeyError) as error:
        raise AuditError(
            f"--counts={path} can't be read ({error}): give a .npy of numbers, a .json list or object with "
            "class_counts, or a text of numbers, one for each class in their order"
        ) from None


def _exponential(text, num_classes):
    try:
        imbalance, _, n_max = text.partition(",")
        return longtail.counts(int(n_max or 500), float(imbalance), num_classes)
    except ValueError as error:
        raise AuditError(f"--imbalance={text}: {error}; give GAMMA or GAMMA,N_MAX, such as 100 or 50,5000") from None
