"""Reads the input of an audit: a model's logits and its training images per class."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.audit import trained
from ltkd_jax.data import logits, longtail
from ltkd_jax.groups import DEFAULT_FRACTIONS, check_counts


class AuditError(ValueError):
    """Raised for input that cannot be audited; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Describes a model to audit.

    Attributes:
      name: to show.
      source: the file or folder.
      test: logits on test input.
      train: logits on training input, or None.
      class_counts: `[C]`, training images of each class, or None.
      class_names: `[C]`, or None.
      fractions: of the classes that are head, medium and tail.
    """

    name: str
    source: str
    test: logits.Logits
    train: logits.Logits | None = None
    class_counts: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS


def read(path, *, data_dir: str = "", subset: str = "") -> Model:
    """Reads a model from an .npz file of logits or from a folder that training left.

    Args:
      path: the file, or a folder, see `trained.load`.
      data_dir: see `trained.load`.
      subset: see `trained.load`.

    Raises:
      ValueError: it cannot be read, or its arrays do not fit each other.
    """
    path = pathlib.Path(path)
    return _read_folder(path, data_dir, subset) if path.is_dir() else _read_file(path)


def _read_file(path):
    file = logits.LogitsFile(path)
    test = file.logits()
    train = (
        file.logits(logits.TRAIN_PREFIX)
        if file.has_logits(logits.TRAIN_PREFIX)
        else None
    )
    if train is not None and train.num_classes != test.num_classes:
        raise AuditError(
            f"{path}: the training input has {train.num_classes} classes, the other "
            f"{test.num_classes}: give both from the same model"
        )
    by_class: dict[str, Any] = {}
    for name in ("class_counts", "class_names"):
        array = file.array(name) if name in file.names else None
        if array is not None and array.shape != (test.num_classes,):
            raise AuditError(
                f"{path}: {name} is {list(array.shape)}, the logits are of "
                f"{test.num_classes} classes"
            )
        by_class[name] = array
    if by_class["class_names"] is not None:
        try:
            names = longtail.as_strings(by_class["class_names"], "class_names")
        except ValueError as error:
            raise AuditError(f"{path}: {error}") from None
        by_class["class_names"] = names.tolist()
    return Model(path.stem, str(path), test, train, **by_class)


def _read_folder(path, data_dir, subset):
    network = trained.load(path, data_dir=data_dir, subset=subset)
    data = network.data
    return Model(
        name=network.name,
        source=str(path),
        test=network.logits(data.test, "test images"),
        train=network.logits(data.train, "train images"),
        class_counts=data.class_counts,
        class_names=data.source.class_names,
        fractions=network.spec.data.group_fractions,
    )


def class_counts(
    model: Model, counts_file: str | None, imbalance: str | None
) -> tuple[np.ndarray, str]:
    """Returns the training images of each class, and in words where they come from.

    The first of these that exists is used: the file of counts, the imbalance, the
    model's own counts, the labels of its training input, and the labels of its test
    input if these are long-tailed themselves.

    Raises:
      AuditError: none of them exists, or one is wrong.
    """
    counts, origin = _first_counts(model, counts_file, imbalance)
    try:
        counts = check_counts(counts)
    except ValueError as error:
        raise AuditError(f"training images of each class, {origin}: {error}") from None
    num_classes = model.test.num_classes
    if len(counts) != num_classes:
        raise AuditError(
            f"training images of {len(counts)} classes, {origin}; the logits are of "
            f"{num_classes}"
        )
    return counts, origin


def _first_counts(model, counts_file, imbalance):
    """Returns unchecked counts, and in words where they come from."""
    num_classes = model.test.num_classes
    if counts_file is not None:
        return _read_counts(counts_file), f"from {counts_file}"
    if imbalance is not None:
        origin = f"exponential with imbalance {imbalance}, in the order of classes"
        return _exponential(imbalance, num_classes), origin
    if model.class_counts is not None:
        return model.class_counts, f"from {model.source}"
    if model.train is not None:
        counts = np.bincount(model.train.labels, minlength=num_classes)
        return counts, "counted in its training input"
    origin = "which are unknown and replaced by the examples of this input"
    return _count_test(model), origin


def _count_test(model):
    counts = np.bincount(model.test.labels, minlength=model.test.num_classes)
    # Balanced input does not show how often the classes were trained on.
    if not counts.all() or counts.max() < 2 * counts.min():
        raise AuditError(
            f"{model.source} does not say how often each class was trained on: give "
            "--counts=FILE or --imbalance=100 (exponential, as CIFAR-100-LT), or add "
            "class_counts to the file"
        )
    return counts


def _read_counts(path):
    try:
        if path.endswith(".npy"):
            # A pickle could run code.
            return np.load(path, allow_pickle=False)
        # utf-8-sig also accepts the byte-order mark that Windows editors write.
        text = pathlib.Path(path).read_text("utf-8-sig")
        if not path.endswith(".json"):
            return _parse_counts(text)
        content = json.loads(text)
        return content["class_counts"] if isinstance(content, dict) else content
    except (OSError, ValueError, KeyError) as error:
        raise AuditError(
            f"--counts={path} can't be read ({error}): give a .npy of numbers, a .json "
            "list or object with class_counts, or a text with one number for each "
            "class, in their order, in one line or a line each"
        ) from None


def _parse_counts(text):
    """Returns the numbers of a text: all of its only line, or one of each line.

    With several in each of several lines it would be a table.
    """
    parts = [line for line in text.splitlines() if line.strip()]
    if len(parts) == 1:
        line = parts[0]
        parts = line.split(",") if "," in line else line.split()
    return [float(part) for part in parts]


def _exponential(text, num_classes):
    """Returns the counts of "GAMMA" or "GAMMA,N_MAX"; N_MAX is 500 by default."""
    try:
        imbalance, _, n_max = text.partition(",")
        return longtail.counts(int(n_max or 500), float(imbalance), num_classes)
    except ValueError as error:
        raise AuditError(
            f"--imbalance={text}: {error}; give GAMMA or GAMMA,N_MAX, such as 100 or "
            "50,5000"
        ) from None
