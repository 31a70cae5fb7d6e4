"""Draws long-tailed subsets of a balanced data set, by keys and not by the order of the records."""

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

# n_max / gamma is often a whole number that floating point puts just below itself (49 * (1 / 49) < 1).
_ROUNDING = 1e-9


class Split(NamedTuple):
    """Sorted, disjoint int64 index arrays into a source's training images."""

    train: np.ndarray
    outer: np.ndarray
    validation: np.ndarray


def counts(n_max: int, imbalance: float, num_classes: int) -> np.ndarray:
    """Returns the number of training images of each class, int64 `[C]`: int(n_max · (1/γ)^(c/(C−1))), in label order.

    Args:
      n_max: images of class 0, the most frequent one.
      imbalance: γ >= 1, the ratio between the first and the last class (1 is balanced).
      num_classes: C.

    Raises:
      ValueError: for imbalance < 1, n_max < 1, num_classes < 1, or a class that would get no image.

    >>> counts(n_max=500, imbalance=100, num_classes=100)[[0, 1, -1]].tolist()
    [500, 477, 5]
    """
    _check_num_classes(num_classes)
    if not 1 <= n_max < 2**31:
        raise ValueError(
            f"n_max={n_max}: class 0 needs at least 1 image, and fewer than 2³¹"
        )
    if not 1 <= imbalance < 2**31:
        raise ValueError(
            f"imbalance={imbalance}: give a ratio >= 1 and below 2³¹ (1 is balanced, 100 is strongly long-tailed)"
        )
    position = np.arange(num_classes) / max(num_classes - 1, 1)
    result = np.floor(n_max * (1.0 / imbalance) ** position + _ROUNDING).astype(
        np.int64
    )
    if result[-1] < 1:
        raise ValueError(
            f"imbalance={imbalance}: with n_max={n_max} class {int(np.argmax(result < 1))} would get 0 images; "
            f"give an imbalance of at most {n_max}"
        )
    return result


def split(
    labels: np.ndarray,
    keys: np.ndarray,
    *,
    num_classes: int,
    imbalance: float | None,
    n_max: int = 0,
    outer_per_class: int = 0,
    validation_per_class: int = 0,
    seed: int = 0,
) -> Split:
    """Draws the long-tailed training set, and the balanced outer and validation sets that are held out of it.

    In each class the examples are ranked by a hash of (seed, key). Training images come from the front of
    the ranking and held-out images from its back. So the draw is independent of the order of the records,
    a larger imbalance gives a subset of a smaller one, and holding images out does not change which images
    are drawn for a given n_max.

    Args:
      labels: integers `[N]` in [0, num_classes).
      keys: strings `[N]`, unique and stable, such as 'train_00042'.
      num_classes: C.
      imbalance: γ, see `counts`; None takes every image that is not held out.
      n_max: images of class 0; 0 means what is left of the smallest class.
      outer_per_class: images of each class for the outer (bilevel) loss.
      validation_per_class: images of each class for choosing hyperparameters.
      seed: seed of the draw.

    Raises:
      ValueError: labels out of range, repeated keys, a class without images, or more images asked than exist.

    >>> labels, keys = np.repeat([0, 1], 20), np.array([f"train_{i}" for i in range(40)])
    >>> indices = split(labels, keys, num_classes=2, imbalance=6, validation_per_class=2)
    >>> np.bincount(labels[indices.train]).tolist(), np.bincount(labels[indices.validation]).tolist()
    ([18, 3], [2, 2])
    """
    labels = check_labels(labels, num_classes)
    _check_keys(keys, len(labels))
    _check_held_out(outer_per_class, validation_per_class)
    present = np.bincount(labels, minlength=num_classes)
    held_out = outer_per_class + validation_per_class
    n_max = _resolve_n_max(n_max, present, held_out)
    if imbalance is None:
        wanted = present - held_out
    else:
        wanted = counts(n_max, imbalance, num_classes)
        _check_available(wanted, present, held_out, n_max)

    digests = _digests(keys, seed)
    order = np.lexsort((digests[:, 1], digests[:, 0], labels))
    starts = np.cumsum(present) - present
    rank = np.arange(len(labels)) - np.repeat(
        starts, present
    )  # of each entry of `order`, in its class
    from_back = np.repeat(present, present) - 1 - rank
    return Split(
        train=np.sort(order[rank < np.repeat(wanted, present)]),
        outer=np.sort(
            order[(from_back >= validation_per_class) & (from_back < held_out)]
        ),
        validation=np.sort(order[from_back < validation_per_class]),
    )


def balanced(
    labels: np.ndarray,
    keys: np.ndarray,
    *,
    num_classes: int,
    per_class: int,
    seed: int = 0,
) -> np.ndarray:
    """Returns the sorted indices of `per_class` images of each class, chosen by a hash of (seed, key).

    Raises:
      ValueError: as `split`, and if per_class is not smaller than the smallest class.

    >>> keys = np.array([f"image_{i}" for i in range(40)])
    >>> len(balanced(np.repeat([0, 1], 20), keys, num_classes=2, per_class=3))
    6
    """
    return split(
        labels,
        keys,
        num_classes=num_classes,
        imbalance=1,
        validation_per_class=per_class,
        seed=seed,
    ).validation


class Listed(NamedTuple):
    """A training set that someone else has drawn: the path and the label of each image, and the list's file name."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    name: str


def read_list(path: str | os.PathLike[str]) -> Listed:
    """Reads a file of lines "relative/path label", the format of ImageNet-LT's authors.

    Raises:
      ValueError: it cannot be read, is empty, or a line is not of this form.
    """
    try:
        lines = pathlib.Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {path} cannot be read ({error})") from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        file, label = [*line.strip().rsplit(maxsplit=1), ""][:2]
        if not label.isdecimal():
            raise ValueError(
                f'{path}:{number}: {line!r} is not of the form "relative/path label"'
            )
        paths.append(file)
        labels.append(int(label))
    if not paths:
        raise ValueError(f"the list {path} is empty")
    return Listed(tuple(paths), tuple(labels), str(path))


def find_listed(listed: Listed, labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the sorted indices of the listed images. A path means the image whose key it is, or ends with.

    Args:
      listed: list from `read_list`.
      labels, keys: `[N]`, of all images.

    Raises:
      ValueError: a listed image does not exist, is listed twice, or has another label.

    >>> listed = Listed(("train/n01/b.JPEG", "train/n02/c.JPEG"), (0, 1), "list.txt")
    >>> find_listed(listed, np.array([0, 0, 1]), np.array(["a.JPEG", "b.JPEG", "c.JPEG"])).tolist()
    [1, 2]
    """
    index_of = {str(key): index for index, key in enumerate(keys)}
    path_of: dict[int, str] = {}
    missing = []
    for path, label in zip(listed.paths, listed.labels):
        tail = path
        while tail not in index_of and "/" in tail:
            tail = tail.partition("/")[2]
        index = index_of.get(tail)
        if index is None:
            missing.append(path)
        elif index in path_of:
            raise ValueError(
                f"{listed.name}: {path!r} is the image {path_of[index]!r} again: list each once"
            )
        elif labels[index] != label:
            raise ValueError(
                f"{listed.name}: {path!r} has label {label}, but {labels[index]} in the data set, where classes are "
                "numbered in the order of their sorted names"
            )
        else:
            path_of[index] = path
    if missing:
        raise ValueError(
            f"{listed.name}: {missing[0]!r} and {len(missing) - 1} more of its {len(listed.paths)} images are not "
            f"among the training images, with keys like {[*map(str, keys[:1])]} (some may be held out for the test)"
        )
    return np.array(sorted(path_of), np.int64)


def split_listed(
    listed: Listed,
    labels: np.ndarray,
    keys: np.ndarray,
    *,
    num_classes: int,
    outer_per_class: int = 0,
    validation_per_class: int = 0,
    seed: int = 0,
) -> Split:
    """Returns the training set that a list names, with balanced outer and validation sets of the other images.

    Args:
      listed: list from `read_list`.
      labels, keys, num_classes, outer_per_class, validation_per_class, seed: as `split`.

    Raises:
      ValueError: as `find_listed`, and as `split` of the other images.
    """
    labels, keys = check_labels(labels, num_classes), np.asarray(keys)
    _check_keys(keys, len(labels))
    _check_held_out(outer_per_class, validation_per_class)
    train = find_listed(listed, labels, keys)
    missing = np.flatnonzero(np.bincount(labels[train], minlength=num_classes) == 0)
    if missing.size:
        raise ValueError(
            f"{listed.name} names no image of class {missing[0]} ({missing.size} such classes): add some"
        )
    if not outer_per_class + validation_per_class:
        return Split(train, np.array([], np.int64), np.array([], np.int64))
    rest = np.setdiff1d(np.arange(len(labels)), train)
    held_out = split(
        labels[rest], keys[rest], num_classes=num_classes, imbalance=None, outer_per_class=outer_per_class,
        validation_per_class=validation_per_class, seed=seed,
    )  # fmt: skip
    return Split(train, rest[held_out.outer], rest[held_out.validation])


def check_outer(
    labels: np.ndarray,
    keys: np.ndarray,
    train_keys: np.ndarray,
    *,
    num_classes: int,
    batch_size: int,
) -> None:
    """Checks that the outer set has every class, no training image, and at least a batch.

    Raises:
      ValueError: one of these does not hold.

    >>> check_outer(np.array([0, 1]), np.array(["a", "b"]), np.array(["c"]), num_classes=2, batch_size=2)
    """
    present = np.bincount(check_labels(labels, num_classes), minlength=num_classes)
    if not present.all():
        missing = np.flatnonzero(present == 0)
        raise ValueError(
            f"the outer set has no image of class {missing[0]} ({missing.size} of {num_classes} classes are missing): "
            "hold out images of every class by data.outer_per_class"
        )
    shared = np.intersect1d(keys, train_keys)
    if shared.size:
        raise ValueError(
            f"the outer set overlaps the training set: {str(shared[0])!r} and {shared.size - 1} more are in both; "
            "an image that is trained on cannot judge its own weight"
        )
    if len(labels) < batch_size:
        raise ValueError(
            f"the outer set has {len(labels)} images, fewer than a batch of {batch_size}: raise data.outer_per_class, "
            "or lower train.batch_size"
        )


def check_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the labels as int64 `[N]`, checked on the host: under jit one out of range wraps or gives NaN unnoticed.

    Raises:
      ValueError: they are not a vector of integers in [0, num_classes).

    >>> check_labels(np.array([0, 2, 1], np.int32), 3).tolist()
    [0, 2, 1]
    """
    _check_num_classes(num_classes)
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels: shape {labels.shape}, dtype {labels.dtype}; give a vector of integers"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"labels[{wrong[0]}]={labels[wrong[0]]}: {wrong.size} labels are outside 0..{num_classes - 1}; "
            f"check num_classes={num_classes} or the labels"
        )
    return labels.astype(np.int64)


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: give at least 1 class")


def _check_keys(keys: np.ndarray, expected: int) -> None:
    if len(keys) != expected:
        raise ValueError(
            f"keys: {len(keys)} keys for {expected} labels; give one key for each image"
        )
    unique, times = np.unique(np.asarray(keys), return_counts=True)
    if unique.size != expected:
        raise ValueError(
            f"keys: {str(unique[np.argmax(times)])!r} occurs {times.max()} times; the draw needs unique keys"
        )


def _check_held_out(outer_per_class: int, validation_per_class: int) -> None:
    for name, value in (
        ("outer_per_class", outer_per_class),
        ("validation_per_class", validation_per_class),
    ):
        if value < 0:
            raise ValueError(
                f"{name}={value}: give 0 (none) or more images of each class"
            )


def _resolve_n_max(n_max: int, present: np.ndarray, held_out: int) -> int:
    """Returns the size of class 0: as given, or what the smallest class has left."""
    if n_max < 0:
        raise ValueError(
            f"n_max={n_max}: give a positive number, or 0 for what is left of the smallest class"
        )
    if not present.all():
        missing = np.flatnonzero(present == 0)
        raise ValueError(
            f"labels: class {missing[0]} has no image ({missing.size} of {present.size} classes have none); "
            f"check num_classes={present.size}"
        )
    if held_out >= present.min():
        raise ValueError(
            f"outer_per_class + validation_per_class = {held_out}: class {present.argmin()} has only "
            f"{present.min()} images and needs one for training; hold out fewer"
        )
    return int(n_max or present.min() - held_out)


def _check_available(
    wanted: np.ndarray, present: np.ndarray, held_out: int, n_max: int
) -> None:
    short = np.flatnonzero(wanted > present - held_out)
    if short.size:
        c = short[0]
        raise ValueError(
            f"n_max={n_max}: class {c} needs {wanted[c]} images, but {present[c] - held_out} are available "
            f"({present[c]} less {held_out} held out); give a smaller n_max, or 0"
        )


def _digests(keys: np.ndarray, seed: int) -> np.ndarray:
    """Returns a 128-bit hash of (seed, key) of each key as uint64 `[N, 2]`, wide enough for ties never to happen."""
    prefix = hashlib.blake2b(f"{int(seed)}:".encode(), digest_size=16)
    joined = bytearray()
    for key in keys:
        digest = prefix.copy()
        digest.update(str(key).encode())
        joined += digest.digest()
    return np.frombuffer(bytes(joined), dtype=">u8").reshape(-1, 2)
