"""Draws long-tailed subsets of a balanced data set.

The draw depends on the seed and on the examples' keys, not on the order of the records,
so it is the same wherever the data set comes from.
"""

import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ltkd_jax import files

# Added before rounding down: n_max / γ is often a whole number that floating point puts
# just below itself, as in 49 * (1 / 49) < 1.
_ROUNDING = 1e-9
# Little can be learned of a class with fewer training images.
FEW_IMAGES = 3


class ClassSizeError(ValueError):
    """Reports a class that has too few images for a draw.

    Attributes:
      label: of the class.
    """

    def __init__(self, message: str, label: int) -> None:
        super().__init__(message)
        self.label = label


class Split(NamedTuple):
    """Holds the indices of three disjoint sets of a data set's training images.

    Attributes:
      train: int64, sorted, the long-tailed training set.
      outer: int64, sorted, the balanced set of the outer (bilevel) loss.
      validation: int64, sorted, the balanced set for choosing hyperparameters.
    """

    train: np.ndarray
    outer: np.ndarray
    validation: np.ndarray


def counts(n_max: int, imbalance: float, num_classes: int) -> np.ndarray:
    """Returns the number of training images of each class, int64 `[C]`.

    Class c has int(n_max · (1/γ)^(c/(C−1))) images: class 0 has the most.

    Args:
      n_max: number of images of class 0.
      imbalance: γ >= 1, the ratio between the first and the last class; 1 is balanced.
      num_classes: C.

    Returns:
      int64 `[C]`, in label order, not increasing.

    Raises:
      ValueError: imbalance < 1, n_max < 1, num_classes < 1, or a class would get no
        image.

    >>> counts(n_max=500, imbalance=100, num_classes=100)[[0, 1, -1]].tolist()
    [500, 477, 5]
    """
    _check_num_classes(num_classes)
    # Below 2³¹, int64 and float64 hold all numbers that follow without overflow.
    if not 1 <= n_max < 2**31:
        raise ValueError(
            f"n_max={n_max}: class 0 needs at least 1 image, and fewer than 2³¹"
        )
    _check_imbalance(imbalance)
    exponents = np.arange(num_classes) / max(num_classes - 1, 1)
    sizes = n_max * (1.0 / imbalance) ** exponents
    class_counts = np.floor(sizes + _ROUNDING).astype(np.int64)
    if class_counts[-1] < 1:
        first_empty = int(np.argmax(class_counts < 1))
        raise ValueError(
            f"imbalance={imbalance}: with n_max={n_max} class {first_empty} would get "
            f"0 images; give an imbalance of at most {n_max}"
        )
    return class_counts


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
    """Draws a long-tailed training set, and balanced outer and validation sets.

    In each class the examples are ranked by a hash of (seed, key). The training set
    takes the first ones of each class, the validation set the last ones, and the outer
    set those just before the validation set. Therefore:

    - the draw does not depend on the order of the records;
    - the training set of a larger imbalance is a subset of that of a smaller one, at
      the same n_max;
    - holding images out does not change the training set, at the same n_max.

    Args:
      labels: integers `[N]` in [0, C).
      keys: `[N]`, unique and stable, such as 'train_00042', see `as_strings`.
      num_classes: C.
      imbalance: γ, see `counts`. None draws no long tail: the training set is every
        image that is not held out, and `n_max` is not used.
      n_max: number of training images of class 0; 0 means as many as the smallest class
        has after images are held out.
      outer_per_class: number of images of each class in the outer set.
      validation_per_class: number of images of each class in the validation set.
      seed: seed of the draw.

    Returns:
      A `Split` of indices into `labels`.

    Raises:
      ValueError: a label is out of range, a key repeats or is no identifier, a class
        has no image, or more images are requested than a class has, which is a
        `ClassSizeError`; if that is so only because images are held out, it has numbers
        that fit.

    >>> labels = np.repeat([0, 1], 20)
    >>> keys = np.array([f"train_{i}" for i in range(40)])
    >>> indices = split(
    ...     labels, keys, num_classes=2, imbalance=6, validation_per_class=2)
    >>> np.bincount(labels[indices.train]).tolist()
    [18, 3]
    >>> np.bincount(labels[indices.validation]).tolist()
    [2, 2]
    """
    labels = check_labels(labels, num_classes)
    keys = check_keys(keys, len(labels))
    _check_held_out(outer_per_class, validation_per_class)
    class_sizes = np.bincount(labels, minlength=num_classes)
    num_held_out = outer_per_class + validation_per_class
    needed = _needed_for_training(class_sizes, imbalance, n_max)
    _check_room(class_sizes, needed, outer_per_class, validation_per_class)
    if imbalance is None:
        train_counts = class_sizes - num_held_out
    else:
        n_max = n_max or int(class_sizes.min()) - num_held_out
        train_counts = counts(n_max, imbalance, num_classes)

    hashes = _hashes(keys, seed)
    # lexsort sorts by its last key first: by label, and within a class by hash.
    order = np.lexsort((hashes[:, 1], hashes[:, 0], labels))
    # All arrays below run along `order`.
    first_of_class = np.cumsum(class_sizes) - class_sizes
    rank = np.arange(len(labels)) - np.repeat(first_of_class, class_sizes)
    reverse_rank = np.repeat(class_sizes, class_sizes) - 1 - rank
    in_train = rank < np.repeat(train_counts, class_sizes)
    in_validation = reverse_rank < validation_per_class
    in_outer = (reverse_rank < num_held_out) & ~in_validation
    return Split(
        train=np.sort(order[in_train]),
        outer=np.sort(order[in_outer]),
        validation=np.sort(order[in_validation]),
    )


def balanced_subset(
    labels: np.ndarray,
    keys: np.ndarray,
    *,
    num_classes: int,
    per_class: int,
    seed: int = 0,
) -> np.ndarray:
    """Draws the same number of images of each class, by a hash of (seed, key).

    Args:
      labels: integers `[N]` in [0, C).
      keys: `[N]`, see `split`.
      num_classes: C.
      per_class: number of images of each class.
      seed: seed of the draw.

    Returns:
      int64 `[C · per_class]`, sorted indices.

    Raises:
      ValueError: see `split`; or `per_class` is not below the smallest class's size.

    >>> labels = np.repeat([0, 1], 20)
    >>> keys = np.array([f"image_{i}" for i in range(40)])
    >>> len(balanced_subset(labels, keys, num_classes=2, per_class=3))
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


class ImageList(NamedTuple):
    """Lists the images of a published training set.

    Attributes:
      paths: of each image, relative.
      labels: of each image.
      file_name: of the list, for messages.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    file_name: str


def read_list(path: str | os.PathLike[str]) -> ImageList:
    """Reads a text file of lines "relative/path label".

    This is the format of the lists that the authors of ImageNet-LT publish.

    Raises:
      ValueError: the file cannot be read, is empty, or has a line of another form.
    """
    try:
        # utf-8-sig also accepts the byte-order mark that Windows editors write.
        lines = pathlib.Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {path} cannot be read ({error})") from error
    image_paths = []
    labels = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # From the right, since a path may contain spaces.
        fields = line.strip().rsplit(maxsplit=1)
        if len(fields) < 2 or not fields[1].isdecimal():
            raise ValueError(
                f"{path}:{line_number}: {line!r} is not of the form "
                '"relative/path label"'
            )
        image_paths.append(fields[0])
        labels.append(int(fields[1]))
    if not image_paths:
        raise ValueError(f"the list {path} is empty")
    return ImageList(tuple(image_paths), tuple(labels), str(path))


def match_list(
    image_list: ImageList, labels: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    r"""Returns the sorted indices of the images of a list, found by `match_paths`.

    Hidden files that are no images of the data set, such as "._a.JPEG", are skipped.

    Args:
      image_list: from `read_list`.
      labels: integers `[N]`, of all images.
      keys: `[N]`, of all images, see `as_strings`.

    Returns:
      int64, sorted indices into `labels`.

    Raises:
      ValueError: an image of the list does not exist, is listed twice, or has another
        label.

    >>> image_list = ImageList(
    ...     ("train/n01/b.JPEG", "train/n02/c.JPEG"), (0, 1), "list.txt")
    >>> keys = np.array(["a.JPEG", "b.JPEG", "c.JPEG"])
    >>> match_list(image_list, np.array([0, 0, 1]), keys).tolist()
    [1, 2]
    """
    file_name = image_list.file_name
    keys = as_strings(keys, "keys")
    path_of: dict[int, str] = {}
    missing: list[str] = []
    indices = match_paths(image_list.paths, keys).tolist()
    for path, label, index in zip(image_list.paths, image_list.labels, indices):
        if index < 0:
            if not files.is_hidden(_normalize(path).rpartition("/")[2]):
                missing.append(path)
        elif index in path_of:
            raise ValueError(
                f"{file_name}: {path!r} is the image {path_of[index]!r} again: list "
                "each image once"
            )
        elif labels[index] != label:
            raise ValueError(
                f"{file_name}: {path!r} has label {label}, but {labels[index]} in the "
                "data set, where classes are numbered in the order of their sorted "
                "names"
            )
        else:
            path_of[index] = path
    if missing:
        example_keys = [str(key) for key in keys[:1]]
        raise ValueError(
            f"{file_name}: {missing[0]!r} and {len(missing) - 1} more of its "
            f"{len(image_list.paths)} images are not among the training images, whose "
            f"keys are like {example_keys} (some may be held out for the test)"
        )
    return np.array(sorted(path_of), np.int64)


def match_paths(paths: Iterable[str], keys: npt.ArrayLike) -> np.ndarray:
    r"""Returns the index of the image that each path names, by the path's last parts.

    A path matches the image whose key it is. If there is none, its leading folders are
    removed one by one until there is. If there still is none, "\" in the path is read
    as "/", and other Unicode forms of the same letters match, as macOS writes them.

    Args:
      paths: P paths.
      keys: `[N]`, of the images, see `as_strings`.

    Returns:
      int64 `[P]`, -1 where there is no such image.

    >>> match_paths(["train/n02/b.png", "a.png", "c.png"], ["a.png", "b.png"]).tolist()
    [1, 0, -1]
    """
    index_of = {key: i for i, key in enumerate(as_strings(keys, "keys").tolist())}
    index_of_normal: dict[str, int | None] = {}
    for key, key_index in index_of.items():
        normal = _normalize(key)
        # None where the forms of two keys are the same: then neither is meant.
        index_of_normal[normal] = None if normal in index_of_normal else key_index
    indices = []
    for path in paths:
        index = _match_path(path, index_of)
        if index is None:
            index = _match_path(_normalize(path), index_of_normal)
        indices.append(-1 if index is None else index)
    return np.array(indices, np.int64)


def _normalize(path: str) -> str:
    """Returns a path with "/" between folders and composed Unicode letters."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def _match_path(path: str, index_of: Mapping[str, int | None]) -> int | None:
    """Returns the index of the longest end of a path that is a key."""
    while path not in index_of and "/" in path:
        path = path.partition("/")[2]
    return index_of.get(path)


def split_by_list(
    image_list: ImageList,
    labels: np.ndarray,
    keys: np.ndarray,
    *,
    num_classes: int,
    outer_per_class: int = 0,
    validation_per_class: int = 0,
    seed: int = 0,
) -> Split:
    """Returns the training set of a list, and balanced sets of the other images.

    Args:
      image_list: from `read_list`.
      labels, keys, num_classes, outer_per_class, validation_per_class, seed: see
        `split`.

    Returns:
      A `Split` whose training set is the list, and whose outer and validation sets are
      drawn from the images that are not in the list.

    Raises:
      ValueError: see `match_list`, and `split` for the other images; or the list has no
        image of some class.
    """
    labels = check_labels(labels, num_classes)
    keys = check_keys(keys, len(labels))
    _check_held_out(outer_per_class, validation_per_class)
    train = match_list(image_list, labels, keys)
    train_counts = np.bincount(labels[train], minlength=num_classes)
    missing = np.flatnonzero(train_counts == 0)
    if missing.size:
        raise ValueError(
            f"{image_list.file_name} names no image of class {missing[0]} "
            f"({missing.size} such classes): add some"
        )
    if outer_per_class + validation_per_class == 0:
        # `split` would refuse a class of which the list has every image.
        empty = np.array([], np.int64)
        return Split(train, empty, empty.copy())
    unlisted = np.setdiff1d(np.arange(len(labels)), train)
    num_unlisted = np.bincount(labels[unlisted], minlength=num_classes)
    if not num_unlisted.all():
        c = int(num_unlisted.argmin())
        raise ClassSizeError(
            f"{image_list.file_name} lists all images of class {c}: list fewer, or set "
            "outer_per_class and validation_per_class to 0",
            c,
        )
    try:
        held_out = split(
            labels[unlisted],
            keys[unlisted],
            num_classes=num_classes,
            imbalance=None,
            outer_per_class=outer_per_class,
            validation_per_class=validation_per_class,
            seed=seed,
        )
    except ClassSizeError as error:
        raise ClassSizeError(
            f"of the images that {image_list.file_name} does not list: {error}",
            error.label,
        ) from None
    return Split(train, unlisted[held_out.outer], unlisted[held_out.validation])


def check_outer(
    labels: np.ndarray,
    keys: np.ndarray,
    train_keys: np.ndarray,
    *,
    num_classes: int,
) -> None:
    """Checks that the outer set has every class, and no training image.

    Args:
      labels: integers `[N]`, of the outer set.
      keys: `[N]`, of the outer set, see `as_strings`.
      train_keys: keys of the training set.
      num_classes: C.

    Raises:
      ValueError: a class is missing, or an image is in both sets.

    >>> check_outer(
    ...     np.array([0, 1]), np.array(["a", "b"]), train_keys=np.array(["c"]),
    ...     num_classes=2)
    """
    class_sizes = np.bincount(check_labels(labels, num_classes), minlength=num_classes)
    if not class_sizes.all():
        missing = np.flatnonzero(class_sizes == 0)
        raise ValueError(
            f"the outer set has no image of class {missing[0]} ({missing.size} of "
            f"{num_classes} classes are missing): hold out images of every class by "
            "data.outer_per_class"
        )
    shared = np.intersect1d(
        as_strings(keys, "keys"), as_strings(train_keys, "train_keys")
    )
    if shared.size:
        raise ValueError(
            f"the outer set overlaps the training set: {str(shared[0])!r} and "
            f"{shared.size - 1} more are in both; an image that is trained on cannot "
            "judge its own weight"
        )


def as_strings(identifiers: npt.ArrayLike, name: str) -> np.ndarray:
    """Returns identifiers as strings, in whatever type they come.

    NumPy, HDF5 and TFDS give one identifier as a string, as UTF-8 bytes, padded by NULs
    to a fixed width, or in an array of objects. These are equal; an integer is its
    decimal digits.

    Args:
      identifiers: `[N]`, such as the keys of images or the names of classes.
      name: of the array, for messages.

    Returns:
      str `[N]`.

    Raises:
      ValueError: not a vector, or an element is none of these.

    >>> as_strings(np.array([b"a.png", b"b.png"]), "keys").tolist()
    ['a.png', 'b.png']
    """
    array = np.asarray(identifiers)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}; give a vector of strings")
    # NumPy itself ignores the padding of fixed width.
    if array.dtype.kind == "U":
        return array
    elements = enumerate(array.tolist())
    return np.array([_as_string(x, f"{name}[{i}]") for i, x in elements], dtype=str)


def _as_string(element: object, name: str) -> str:
    if isinstance(element, bytes):
        try:
            element = element.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}={element!r} is not UTF-8 ({error.reason}): decode it with its "
                "encoding, and give strings"
            ) from None
    if isinstance(element, str):
        return element.rstrip("\0")
    # True is an int, but no identifier.
    if isinstance(element, (int, np.integer)) and not isinstance(element, bool):
        return str(element)
    raise ValueError(
        f"{name}={element!r} is of type {type(element).__name__}: give strings, bytes "
        "or integers"
    )


def check_labels(
    labels: npt.ArrayLike, num_classes: int, name: str = "labels"
) -> np.ndarray:
    """Returns the labels as int64 `[N]`, checked to be in [0, C).

    Call it on the host: under `jit`, a label out of range silently wraps around or
    gives NaN.

    Args:
      labels: integers `[N]`.
      num_classes: C.
      name: of the labels, for messages.

    Raises:
      ValueError: the labels are not a vector of integers in [0, C).

    >>> check_labels(np.array([0, 2, 1], np.int32), 3).tolist()
    [0, 2, 1]
    """
    _check_num_classes(num_classes)
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name}: shape {labels.shape}, dtype {labels.dtype}; give a vector of "
            "integers"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"{name}[{wrong[0]}]={labels[wrong[0]]}: {wrong.size} labels are outside "
            f"0..{num_classes - 1}; check num_classes={num_classes} or the labels"
        )
    return labels.astype(np.int64)


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: give at least 1 class")


def check_keys(keys: npt.ArrayLike, num_labels: int, name: str = "keys") -> np.ndarray:
    """Returns the keys as strings, checked to be one for each label, and unique.

    Args:
      keys: `[N]`, see `as_strings`.
      num_labels: N.
      name: of the keys, for messages.

    Raises:
      ValueError: a key repeats, or is no text; or there are more or fewer than N.

    >>> check_keys([b"a", b"b"], 2).tolist()
    ['a', 'b']
    """
    keys = as_strings(keys, name)
    if len(keys) != num_labels:
        raise ValueError(
            f"{name}: {len(keys)} keys for {num_labels} labels; give one key for each"
        )
    unique_keys, occurrences = np.unique(keys, return_counts=True)
    if unique_keys.size != num_labels:
        repeated = str(unique_keys[np.argmax(occurrences)])
        raise ValueError(
            f"{name}: {repeated!r} occurs {occurrences.max()} times; the draw needs "
            "unique keys"
        )
    return keys


def _check_imbalance(imbalance: float) -> None:
    if not 1 <= imbalance < 2**31:
        raise ValueError(
            f"imbalance={imbalance}: give a ratio >= 1 and below 2³¹ (1 is balanced, "
            "100 is strongly long-tailed)"
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


def _needed_for_training(
    class_sizes: np.ndarray, imbalance: float | None, n_max: int
) -> np.ndarray:
    """Returns the images of each class that cannot be held out, `[C]`; see `split`.

    Raises:
      ValueError: the training set cannot be drawn even if no image is held out.
    """
    num_classes = len(class_sizes)
    if n_max < 0:
        raise ValueError(
            f"n_max={n_max}: give a positive number, or 0 for what is left of the "
            "smallest class"
        )
    if not class_sizes.all():
        missing = np.flatnonzero(class_sizes == 0)
        raise ValueError(
            f"labels: class {missing[0]} has no image ({missing.size} of "
            f"{num_classes} classes have none); check num_classes={num_classes}"
        )
    if imbalance is None:
        return np.ones_like(class_sizes)
    _check_imbalance(imbalance)
    if not n_max:
        # `n_max` becomes what is left of the smallest class. The last class gets 1/γ of
        # it, which must be at least 1.
        fewest = int(np.ceil(imbalance * (1 - _ROUNDING)))
        c = int(class_sizes.argmin())
        if class_sizes[c] < fewest:
            raise ClassSizeError(
                f"imbalance={imbalance:g}: with n_max=0 the first class gets as many "
                f"images as the smallest one has, class {c} with {class_sizes[c]}, and "
                f"the last class 1/{imbalance:g} of them, which is less than 1: give "
                f"an imbalance of at most {class_sizes[c]}, or n_max",
                c,
            )
        return np.full_like(class_sizes, fewest)
    needed = counts(n_max, imbalance, num_classes)
    short = np.flatnonzero(needed > class_sizes)
    if short.size:
        c = int(short[0])
        raise ClassSizeError(
            f"n_max={n_max}: class {c} needs {needed[c]} images, but has "
            f"{class_sizes[c]}; give a smaller n_max, or 0",
            c,
        )
    return needed


def _check_room(
    class_sizes: np.ndarray,
    needed: np.ndarray,
    outer_per_class: int,
    validation_per_class: int,
) -> None:
    """Raises ClassSizeError unless every class has the images to be held out."""
    room = class_sizes - needed
    c = int(room.argmin())
    num_held_out = outer_per_class + validation_per_class
    if num_held_out <= room[c]:
        return
    problem = (
        f"outer_per_class={outer_per_class} and validation_per_class="
        f"{validation_per_class}: class {c} has {class_sizes[c]} images, of which "
        f"{needed[c]} must remain for training"
    )
    if not room[c]:
        raise ClassSizeError(
            f"{problem}: add images to the class, leave it out, or hold none out",
            c,
        )
    # More than one image remains for training where that is possible.
    total = max(1, min(int(room[c]), int(class_sizes[c]) - FEW_IMAGES))
    # In the ratio that was asked for, but at least one for the outer set.
    outer = total * outer_per_class // num_held_out
    if outer_per_class:
        outer = max(1, outer)
    raise ClassSizeError(
        f"{problem}: hold at most {room[c]} out, such as outer_per_class={outer} and "
        f"validation_per_class={total - outer}",
        c,
    )


def _hashes(keys: np.ndarray, seed: int) -> np.ndarray:
    """Returns a 128-bit hash of (seed, key) for each key, uint64 `[N, 2]`.

    128 bits are wide enough that no two keys tie in practice.
    """
    # The seed is hashed once, and its state copied for each key.
    prefix = hashlib.blake2b(f"{int(seed)}:".encode(), digest_size=16)
    digests = bytearray()
    for key in keys:
        digest = prefix.copy()
        digest.update(str(key).encode())
        digests += digest.digest()
    # Big-endian on every machine, so that the order of the hashes is the same, too.
    return np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2)
