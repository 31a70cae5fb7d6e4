"""Reads and writes a model's logits on labelled examples, as .npz files that any framework can make.

    np.savez("teacher.npz", logits=logits, labels=labels)       # floats [N, C], integers [N]

Arrays of such a file:

- `logits`, `probabilities` or `log_probabilities`: float16, 32 or 64 `[N, C]`.
- `labels`: integers `[N]` in `[0, C)`.
- `keys`: names of the examples, `[N]`; optional.
- `train_logits` (or `train_probabilities` …), `train_labels`, `train_keys`: the same for training input; optional.
- `class_counts`, `class_names`: training images and name of each class, `[C]`; optional.
"""

import dataclasses
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from ltkd_jax import files

KINDS = ("logits", "probabilities", "log_probabilities")
TRAIN = "train_"
Array = npt.NDArray[Any]

# The lowest logit, relative to its row's largest: the losses accept it, and it is far beyond what a softmax resolves.
_LOWEST = -1e30
# Allowed error of the sum of a row of probabilities; float16 needs part of it.
_SUM_TOLERANCE = 0.02
# Examples that are checked at once, so that temporary arrays stay small.
_CHECK_BLOCK = 4096
# What a broken archive raises; RuntimeError is an encrypted one, or an unsupported compression.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_REMEDIES = {
    "logits": "hold NaN or infinite logits: leave them out, or give a masked class a finite logit such as -1e4",
    "probabilities": "are no probabilities, from 0 on and of sum 1: if they are logits, name their array so",
    "log_probabilities": "are no logs of probabilities, whose sum is 1: if they are logits, name their array so",
}


class LogitsError(ValueError):
    """Raised for logits that cannot be used; the message names the file, the array, the value and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Logits:
    """A model's outputs on N labelled examples, checked by `from_arrays`.

    Attributes:
      values: floats `[N, C]`, or `[N, V, C]` for V views of each example.
      labels: int64 `[N]` in `[0, C)`.
      kind: what the values are, one of `KINDS`.
      keys: names of the examples, `[N]`, or None.
      source: where they come from, for messages.
      prefix: of the arrays' names in a file, for messages.
    """

    values: Array
    labels: npt.NDArray[np.int64]
    kind: str = "logits"
    keys: Array | None = None
    source: str = "arrays"
    prefix: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Returns C."""
        return self.values.shape[-1]

    @property
    def name(self) -> str:
        """Returns the name of the values' array in a file."""
        return self.prefix + self.kind

    def blocks(self, size: int) -> Iterator[npt.NDArray[np.float32]]:
        """Yields logits relative to the largest of their row, `[size or fewer, C]`; a softmax is the same of both.

        The difference is taken in the precision of the values, so that a large constant costs none.
        """
        for start in range(0, len(self), size):
            logits = _to_logits(self.values[start : start + size], self.kind)
            below_top = logits - logits.max(axis=-1, keepdims=True)
            yield np.maximum(below_top, _LOWEST).astype(np.float32)

    def to_logits(self) -> npt.NDArray[np.float32]:
        """Returns the values as logits, of the shape of `values`: unchanged, or the log of the probabilities."""
        return _to_logits(self.values, self.kind).astype(np.float32)


def from_arrays(
    values: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    kind: str = "logits",
    keys: npt.ArrayLike | None = None,
    source: str = "arrays",
    prefix: str = "",
    views: bool = False,
) -> Logits:
    """Returns checked `Logits`.

    Args:
      values: floats `[N, C]`.
      labels: integers `[N]`.
      kind: what the values are, one of `KINDS`.
      keys: names of the examples, `[N]`.
      source: where the arrays come from, for messages.
      prefix: of the arrays' names, for messages.
      views: whether values may be `[N, V, C]`, too.

    Raises:
      LogitsError: a shape, a type or a label is wrong, or a row is not finite or no distribution.

    >>> examples = from_arrays([[2.0, 1.0], [0.0, 3.0]], [0, 1])
    >>> len(examples), examples.num_classes, next(examples.blocks(2)).tolist()
    (2, 2, [[0.0, -1.0], [-3.0, 0.0]])
    """
    values, labels = np.asarray(values), np.asarray(labels)
    _check_values(values, f"{source}: {prefix}{kind}", views)
    _check_labels(labels, values, f"{source}: {prefix}labels")
    if keys is not None:
        keys = np.asarray(keys)
        if keys.shape != labels.shape:
            raise LogitsError(
                f"{source}: {prefix}keys is {list(keys.shape)}; give one for each of {len(labels)} rows"
            )
    _check_rows(values, kind, f"{source}: {prefix}{kind}")
    return Logits(values, labels.astype(np.int64), kind, keys, source, prefix)


def _check_values(values: Array, name: str, views: bool) -> None:
    if values.ndim not in ((2, 3) if views else (2,)) or not np.issubdtype(
        values.dtype, np.floating
    ):
        shapes = "[N, C] or [N, views, C]" if views else "[N, C]"
        raise LogitsError(
            f"{name} is {values.dtype}{list(values.shape)}; give floats {shapes}, a row for each example"
        )
    if not values.size or values.shape[-1] < 2:
        raise LogitsError(
            f"{name} is of shape {list(values.shape)}; give at least 1 row and 2 classes"
        )


def _check_labels(labels: Array, values: Array, name: str) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        remedy = (
            "np.argmax(labels, axis=1)" if one_hot else "labels.astype(int).ravel()"
        )
        raise LogitsError(
            f"{name} is {labels.dtype}{list(labels.shape)}; give integers [N], such as {remedy}"
        )
    if len(labels) != len(values):
        raise LogitsError(
            f"{name} holds {len(labels)} labels for {len(values)} rows: give one for each row"
        )
    num_classes = values.shape[-1]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise LogitsError(
            f"{name}[{wrong[0]}]={labels[wrong[0]]}, and {wrong.size} of {len(labels)} are outside "
            f"0..{num_classes - 1}, the classes that the rows have: count labels from 0, or leave the others out"
        )


def _check_rows(values: Array, kind: str, name: str) -> None:
    """Checks that every row is finite, or a distribution; an error counts the rows that are not."""
    wrong: list[int] = []
    for start in range(0, len(values), _CHECK_BLOCK):
        valid = _valid_rows(values[start : start + _CHECK_BLOCK], kind)
        wrong += (start + np.flatnonzero(~valid)).tolist()
    if wrong:
        row = values[wrong[0]]
        raise LogitsError(
            f"{name}: {len(wrong)} of {len(values)} rows {_REMEDIES[kind]}; the first is row {wrong[0]}, from "
            f"{row.min():.4g} to {row.max():.4g}"
        )


def _valid_rows(values: Array, kind: str) -> Array:
    """Returns which examples of a block are valid, bool `[B]`."""
    with np.errstate(all="ignore"):
        # float32 is what they become: a larger number would be infinite there.
        numbers = values.astype(np.float32)
        if kind == "logits":
            valid = np.isfinite(numbers)
        else:
            p = numbers if kind == "probabilities" else np.exp(numbers)
            valid = (p >= 0) & (
                np.abs(p.sum(axis=-1, keepdims=True) - 1) <= _SUM_TOLERANCE
            )
    return np.all(valid.reshape(len(values), -1), axis=1)


def _to_logits(values: Array, kind: str) -> Array:
    """Returns values as logits, in float32 or the precision of the values if that is higher.

    A probability of 0 counts as the smallest positive number of its type, or of its row if that is smaller: no class
    falls below one of probability 0.
    """
    logits = values.astype(np.promote_types(values.dtype, np.float32))
    if kind == "logits":
        return logits
    if kind == "probabilities":
        with np.errstate(divide="ignore"):
            logits = np.log(logits)
    smallest = np.log(float(np.finfo(values.dtype).smallest_subnormal))
    positive = logits > -np.inf
    floor = logits.min(axis=-1, keepdims=True, where=positive, initial=smallest)
    return np.where(positive, logits, floor)


class LogitsFile:
    """An .npz file of logits.

    Attributes:
      path: of the file.
      names: of its arrays.

    Raises:
      LogitsError: there is no such file, or it is no .npz file.
    """

    def __init__(self, path: files.PathLike):
        self.path = pathlib.Path(path)
        try:
            with open(self.path, "rb") as file, NpzFile(file) as archive:
                self.names: tuple[str, ...] = tuple(archive.files)
        except _DAMAGED as error:
            raise LogitsError(
                f"{path} cannot be read as an .npz file ({error}); write one by "
                f'np.savez("{self.path.stem}.npz", logits=logits, labels=labels)'
            ) from None

    def array(self, name: str) -> Array:
        """Returns an array.

        Raises:
          LogitsError: it holds Python objects, is damaged, or does not fit in memory.
        """
        try:
            with open(self.path, "rb") as file, NpzFile(file) as archive:
                return np.asarray(archive[name])
        except ValueError as error:
            remedy = "give numbers, or names as np.array(names, dtype=str)"
            raise LogitsError(
                f"{self.path}: {name} is not a plain array ({error}); {remedy}"
            ) from None
        except (MemoryError, *_DAMAGED) as error:
            remedy = "write the file again, with fewer examples if memory is short"
            raise LogitsError(
                f"{self.path}: {name} is damaged or too large ({error}): {remedy}"
            ) from None

    def has_logits(self, prefix: str = "") -> bool:
        """Returns whether there are logits, or probabilities, of that prefix."""
        return any(prefix + kind in self.names for kind in KINDS)

    def logits(self, prefix: str = "", *, views: bool = False) -> Logits:
        """Returns the logits of a prefix, with their labels and, where the file holds them, keys.

        Args:
          prefix: of the arrays' names: "" or `TRAIN`.
          views: whether they may be `[N, V, C]`, too.

        Raises:
          LogitsError: an array is missing, or as `from_arrays`.
        """
        kinds = [kind for kind in KINDS if prefix + kind in self.names]
        missing = [] if kinds else [" or ".join(prefix + kind for kind in KINDS)]
        missing += [] if f"{prefix}labels" in self.names else [f"{prefix}labels"]
        if missing:
            raise LogitsError(
                f"{self.path} has the arrays {', '.join(self.names) or '(none)'}; it lacks {' and '.join(missing)}"
            )
        return from_arrays(
            self.array(prefix + kinds[0]),
            self.array(f"{prefix}labels"),
            kind=kinds[0],
            keys=self.array(f"{prefix}keys") if f"{prefix}keys" in self.names else None,
            source=str(self.path),
            prefix=prefix,
            views=views,
        )


def save(
    path: files.PathLike,
    test: Logits,
    train: Logits | None = None,
    *,
    class_counts: npt.ArrayLike | None = None,
    class_names: npt.ArrayLike | None = None,
) -> None:
    """Writes a file of logits, atomically.

    Args:
      path: of the file.
      test: logits on test input.
      train: logits on training input.
      class_counts: training images of each class, `[C]`.
      class_names: `[C]`.
    """
    arrays: dict[str, Any] = {"class_counts": class_counts, "class_names": class_names}
    for prefix, examples in (("", test), (TRAIN, train)):
        if examples is not None:
            arrays[prefix + examples.kind] = examples.values
            arrays[f"{prefix}labels"] = examples.labels
            arrays[f"{prefix}keys"] = examples.keys
    arrays = {
        name: np.asarray(array) for name, array in arrays.items() if array is not None
    }
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
