"""Reads and writes a model's logits on labelled examples, as .npz files.

Any framework can write such a file:

    np.savez("teacher.npz", logits=logits, labels=labels)  # floats [N, C], integers [N]

Its arrays:

- `logits`, `probabilities` or `log_probabilities`: float16, 32 or 64, `[N, C]`.
- `labels`: integers `[N]` in [0, C).
- `keys`: names of the examples, `[N]`, strings or bytes; optional.
- `train_logits` (or `train_probabilities`, `train_log_probabilities`), `train_labels`,
  `train_keys`: the same for the training images; optional.
- `class_counts`: number of training images of each class, `[C]`; optional.
- `class_names`: `[C]`; optional.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ltkd_jax import files
from ltkd_jax.data import longtail, npz

KINDS = ("logits", "probabilities", "log_probabilities")
TRAIN_PREFIX = "train_"
Array = npt.NDArray[Any]

# The lowest logit, relative to the largest of its row. The losses accept it, and its
# softmax is 0 in any precision.
_LOWEST = -1e30
# Allowed error of the sum of a row of probabilities. Rounding to float16 alone can
# cause a good part of it.
_SUM_TOLERANCE = 0.02
# That fewer rows of logits than this happen to be distributions, as in a toy example,
# is no sign of a mistake.
_MIN_DISTRIBUTIONS = 10
# Number of examples that are checked at once, so that temporary arrays stay small.
_CHECK_BLOCK = 4096
_REMEDIES = {
    "logits": (
        "hold NaN or infinite logits: leave them out, or give a masked class a finite "
        "logit such as -1e4"
    ),
    "probabilities": (
        "are no probabilities, non-negative with sum 1: if they are logits, name their "
        "array so"
    ),
    "log_probabilities": (
        "are no logs of probabilities, whose sum is 1: if they are logits, name their "
        "array so"
    ),
}


class LogitsError(ValueError):
    """Raised for logits that cannot be used.

    The message names the file, the array, the value and the remedy.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Logits:
    """Holds a model's outputs on N labelled examples, as checked by `from_arrays`.

    Attributes:
      values: floats `[N, C]`, or `[N, V, C]` for V views of each example.
      labels: int64 `[N]` in [0, C).
      kind: what the values are, one of `KINDS`.
      keys: names of the examples, str `[N]`, or None.
      source: where they come from, such as a file's path, for messages.
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
        """Returns the number of classes, C."""
        return self.values.shape[-1]

    @property
    def array_name(self) -> str:
        """Returns the name of the values' array in a file."""
        return self.prefix + self.kind

    def blocks(self, size: int) -> Iterator[npt.NDArray[np.float32]]:
        """Yields the logits of consecutive examples, less the largest of each row.

        Their softmax is that of the logits.

        Args:
          size: number of examples in a block; the last block may have fewer.

        Yields:
          float32 `[size, C]`, not positive.
        """
        for start in range(0, len(self), size):
            logits = _to_logits(self.values[start : start + size], self.kind)
            # Subtracted before the cast to float32: a constant that is added to a row
            # of float64 logits, however large, then costs no precision.
            relative = logits - logits.max(axis=-1, keepdims=True)
            yield np.maximum(relative, _LOWEST).astype(np.float32)

    def to_logits(self) -> npt.NDArray[np.float32]:
        """Returns the values as logits: unchanged, or the logs of probabilities."""
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
    """Checks arrays and returns them as `Logits`.

    Args:
      values: floats `[N, C]`.
      labels: integers `[N]` in [0, C).
      kind: what the values are, one of `KINDS`.
      keys: names of the examples, `[N]`, see `longtail.as_strings`.
      source: where the arrays come from, for messages.
      prefix: of the arrays' names, for messages.
      views: whether values may also be `[N, V, C]`.

    Raises:
      LogitsError: a shape, a type or a label is wrong, a row of logits is not finite,
        a row of probabilities is no distribution, or all rows of logits are.

    >>> examples = from_arrays([[2.0, 1.0], [0.0, 3.0]], [0, 1])
    >>> len(examples), examples.num_classes, next(examples.blocks(2)).tolist()
    (2, 2, [[0.0, -1.0], [-3.0, 0.0]])
    """
    values = np.asarray(values)
    labels = np.asarray(labels)
    values_name = f"{source}: {prefix}{kind}"
    _check_values(values, values_name, views)
    _check_labels(labels, values, f"{source}: {prefix}labels")
    if keys is not None:
        keys = np.asarray(keys)
        if keys.shape != labels.shape:
            raise LogitsError(
                f"{source}: {prefix}keys is {list(keys.shape)}; give one for each of "
                f"{len(labels)} rows"
            )
        try:
            keys = longtail.as_strings(keys, f"{prefix}keys")
        except ValueError as error:
            raise LogitsError(f"{source}: {error}") from None
    _check_rows(values, kind, values_name)
    if kind == "logits":
        _check_no_distributions(values, values_name, prefix)
    return Logits(values, labels.astype(np.int64), kind, keys, source, prefix)


def _check_values(values: Array, name: str, views: bool) -> None:
    """Checks the type and the shape of the values."""
    dimensions = (2, 3) if views else (2,)
    is_float = np.issubdtype(values.dtype, np.floating)
    # Of bfloat16, NumPy's files keep the bytes only.
    if values.dtype.kind == "V":
        raise LogitsError(
            f"{name} is {values.dtype}{list(values.shape)}: NumPy cannot read bfloat16 "
            "and other types that are not its own; save .astype(np.float32)"
        )
    if values.ndim not in dimensions or not is_float:
        shapes = "[N, C] or [N, views, C]" if views else "[N, C]"
        raise LogitsError(
            f"{name} is {values.dtype}{list(values.shape)}; give floats {shapes}, a "
            "row for each example"
        )
    if not values.size or values.shape[-1] < 2:
        raise LogitsError(
            f"{name} is of shape {list(values.shape)}; give at least 1 row and 2 "
            "classes"
        )


def _check_labels(labels: Array, values: Array, name: str) -> None:
    """Checks that there is one label for each example, and that each is a class."""
    num_classes = values.shape[-1]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        problem = f"{name} is {labels.dtype}{list(labels.shape)}"
        if labels.ndim == 2 and labels.shape[1] == num_classes:
            raise LogitsError(
                f"{problem}, labels that are one-hot: give np.argmax(labels, axis=1)"
            )
        raise LogitsError(
            f"{problem}; give integers [N], such as labels.astype(int).ravel()"
        )
    if len(labels) != len(values):
        raise LogitsError(
            f"{name} holds {len(labels)} labels for {len(values)} rows: give one for "
            "each row"
        )
    if (labels.min(), labels.max()) == (1, num_classes):
        raise LogitsError(
            f"{name} run from 1 to {num_classes}, the number of classes: count them "
            "from 0, labels - 1"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise LogitsError(
            f"{name}[{wrong[0]}]={labels[wrong[0]]}, and {wrong.size} of {len(labels)} "
            f"are outside 0..{num_classes - 1}, the classes that the rows have: count "
            "labels from 0, or leave the others out"
        )


def _check_rows(values: Array, kind: str, name: str) -> None:
    """Checks that every row is finite, or a distribution; counts the invalid ones."""
    wrong: list[int] = []
    for start in range(0, len(values), _CHECK_BLOCK):
        is_valid = _valid_rows(values[start : start + _CHECK_BLOCK], kind)
        wrong += (start + np.flatnonzero(~is_valid)).tolist()
    if wrong:
        row = values[wrong[0]]
        raise LogitsError(
            f"{name}: {len(wrong)} of {len(values)} rows {_REMEDIES[kind]}; the first "
            f"is row {wrong[0]}, from {row.min():.4g} to {row.max():.4g}"
        )


def _check_no_distributions(values: Array, name: str, prefix: str) -> None:
    """Checks that logits are no probabilities, which would be nearly uniform logits."""
    if len(values) < _MIN_DISTRIBUTIONS:
        return
    for start in range(0, len(values), _CHECK_BLOCK):
        block = values[start : start + _CHECK_BLOCK]
        if not _valid_rows(block, "probabilities").all():
            return
    raise LogitsError(
        f"{name}: all {len(values)} rows are non-negative and sum to 1, so they are "
        f"probabilities: name the array {prefix}probabilities"
    )


def _valid_rows(values: Array, kind: str) -> Array:
    """Returns which examples of a block are valid, bool `[B]`."""
    # Overflow and NaN are what is looked for, so NumPy need not warn of them.
    with np.errstate(all="ignore"):
        # The logits become float32 later, where a larger number would be infinite.
        values_32 = values.astype(np.float32)
        if kind == "logits":
            is_valid = np.isfinite(values_32)
        else:
            p = values_32 if kind == "probabilities" else np.exp(values_32)
            sums = p.sum(axis=-1, keepdims=True)
            is_valid = (p >= 0) & (np.abs(sums - 1) <= _SUM_TOLERANCE)
    # Over classes, and views if there are any.
    return np.all(is_valid.reshape(len(values), -1), axis=1)


def _to_logits(values: Array, kind: str) -> Array:
    """Returns values as logits, in their own precision or float32 if that is higher.

    The log of a probability of 0 would be −∞. Such a probability counts as the smallest
    positive number of its type, or as the smallest positive one of its row if that is
    smaller, so that no class falls below one of probability 0.
    """
    logits = values.astype(np.promote_types(values.dtype, np.float32))
    if kind == "logits":
        return logits
    if kind == "probabilities":
        with np.errstate(divide="ignore"):
            logits = np.log(logits)
    smallest = np.log(float(np.finfo(values.dtype).smallest_subnormal))
    is_positive = logits > -np.inf
    floor = logits.min(axis=-1, keepdims=True, where=is_positive, initial=smallest)
    return np.where(is_positive, logits, floor)


class LogitsFile(npz.ArrayFile):
    """Reads an .npz file of logits; its errors are `LogitsError`."""

    error = LogitsError
    example = "logits=logits, labels=labels"

    def has_logits(self, prefix: str = "") -> bool:
        """Returns whether there are logits or probabilities with a prefix."""
        return any(prefix + kind in self.names for kind in KINDS)

    def logits(self, prefix: str = "", *, views: bool = False) -> Logits:
        """Returns the logits with a prefix, their labels, and keys if there are any.

        Args:
          prefix: of the arrays' names: "" or `TRAIN_PREFIX`.
          views: whether the values may also be `[N, V, C]`.

        Raises:
          LogitsError: an array is missing; or see `from_arrays`.
        """
        kinds = [kind for kind in KINDS if prefix + kind in self.names]
        labels_name = f"{prefix}labels"
        keys_name = f"{prefix}keys"
        missing = []
        if not kinds:
            missing.append(" or ".join(prefix + kind for kind in KINDS))
        if labels_name not in self.names:
            missing.append(labels_name)
        if missing:
            raise LogitsError(
                f"{self.path} has the arrays {', '.join(self.names) or '(none)'}; it "
                f"lacks {' and '.join(missing)}"
            )
        return from_arrays(
            self.array(prefix + kinds[0]),
            self.array(labels_name),
            kind=kinds[0],
            keys=self.array(keys_name) if keys_name in self.names else None,
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
      test: logits on test images.
      train: logits on training images.
      class_counts: number of training images of each class, `[C]`.
      class_names: `[C]`.
    """
    arrays: dict[str, Any] = {"class_counts": class_counts, "class_names": class_names}
    for prefix, examples in (("", test), (TRAIN_PREFIX, train)):
        if examples is not None:
            arrays[prefix + examples.kind] = examples.values
            arrays[f"{prefix}labels"] = examples.labels
            arrays[f"{prefix}keys"] = examples.keys
    arrays = {
        name: np.asarray(array) for name, array in arrays.items() if array is not None
    }
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
