"""Logits of a model on labelled examples, in an .npz file that any framework writes.

    np.savez("teacher.npz", logits=logits, labels=labels)       # [N, C] floats, [N] integers

Keys: `logits`, or `probabilities`, or `log_probabilities`, in float16, 32 or 64; `labels`. Optional: `class_counts`
`[C]`, training images by class; `class_names` `[C]`; and the same of long-tailed input as `train_logits`,
`train_labels`. A file may be larger than the memory: it is read in blocks of rows.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from ltkd_jax.data import longtail

KINDS = ("logits", "probabilities", "log_probabilities")
TRAIN = "train_"
_LOWEST = -1e30  # below the row's largest: what the losses take, and far beyond what a softmax sees
_NO_SUM = 0.02  # by which a row of probabilities may miss 1; float16 needs some of it
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)  # the last: encrypted, or packed otherwise


class LogitsError(ValueError):
    """Logits that cannot be audited; the message names the file, the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of N examples.

    Attributes:
      labels: int64 `[N]`, in `[0, C)`.
      num_classes: C.
      rows: `size -> arrays`, the rows in order, at most so many at once.
      kind: of `KINDS`.
      where: for messages.
    """

    labels: np.ndarray
    num_classes: int
    rows: Callable[[int], Iterator[np.ndarray]]
    kind: str = "logits"
    where: str = "logits"

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Logits less the largest of their row, float32 `[size or fewer, C]`; no softmax sees the difference.

        The difference is taken in the precision of the file. A probability of 0 counts as the smallest positive number
        of its type, or of its row.

        Raises:
          LogitsError: rows that are not finite, or no probabilities; after all rows were seen, so that it counts them.
        """
        start, bad, first = 0, 0, ""
        for block in self.rows(size):
            found, wrong = _below_top(block, self.kind)
            if wrong.size and not bad:
                first = f"the first is row {start + wrong[0]} ({_what(block[wrong[0]], self.kind)})"
            bad += wrong.size
            start += len(block)
            if not bad:
                yield found
        if bad:
            raise LogitsError(f"{self.where}: {bad} of {len(self)} rows {_REMEDIES[self.kind]}; {first}")


_REMEDIES = {
    "logits": "hold NaN or infinite logits: leave them out, or give a class that is masked a finite logit such as -1e4",
    "probabilities": "are no probabilities, from 0 on and of sum 1: if they are logits, name their key so",
    "log_probabilities": "are no logs of probabilities, whose sum is 1: if they are logits, name their key so",
}


def in_memory(values, labels, where="logits") -> Logits:
    """Logits `[N, C]` that are arrays already, as `Logits`."""
    values, labels = np.asarray(values), np.asarray(labels)
    return _checked(
        labels, values.shape, values.dtype, where, "labels", "logits",
        lambda size: (values[i : i + size] for i in range(0, len(values), size)),
    )  # fmt: skip


def _below_top(block, kind):
    """A block's logits from their row's largest on, and the numbers of the rows that are wrong."""
    values = block.astype(np.promote_types(block.dtype, np.float32))
    with np.errstate(all="ignore"):
        if kind == "logits":
            right = np.isfinite(values.min(axis=1)) & np.isfinite(values.max(axis=1))
        else:
            p, values = (values, np.log(values)) if kind == "probabilities" else (np.exp(values), values)
            right = (p.min(axis=1) >= 0) & (np.abs(p.sum(axis=1) - 1) <= _NO_SUM)
            none = np.log(np.finfo(block.dtype).smallest_subnormal.astype(np.float64))
            known = values > -np.inf
            least = values.min(
                axis=1, keepdims=True, where=known, initial=none
            )  # no class falls below one that has none
            values = np.where(known, values, least)
        below = np.maximum(values - values.max(axis=1, keepdims=True), _LOWEST)
    return below.astype(np.float32), np.flatnonzero(~right)


def _what(row, kind):
    odd = np.flatnonzero(~np.isfinite(row))
    if odd.size and kind != "log_probabilities":
        return f"class {odd[0]}: {row[odd[0]]}"
    total = (row if kind == "probabilities" else np.exp(row)).sum(dtype=np.float64)
    return f"from {row.min():.4g} to {row.max():.4g}, its sum is {total:.4g}"


def _checked(labels, shape, dtype, where, labels_key, key, rows) -> Logits:
    if len(shape) != 2 or not np.issubdtype(dtype, np.floating):
        raise LogitsError(f"{where}: {key} is {dtype}{list(shape)}; give floats [N, C], a row for each example")
    number, num_classes = shape
    if num_classes < 2 or not number:
        raise LogitsError(f"{where}: {key} has {number} rows of {num_classes} classes; give at least 1 row, 2 classes")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        remedy = "np.argmax(labels, axis=1)" if one_hot else "labels.astype(int).ravel()"
        raise LogitsError(
            f"{where}: {labels_key} is {labels.dtype}{list(labels.shape)}; give integers [N], such as {remedy}"
        )
    if len(labels) != number:
        raise LogitsError(f"{where}: {len(labels)} {labels_key} for {number} rows of {key}: give one for each row")
    try:
        labels = longtail.check_labels(labels, num_classes)
    except ValueError:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        raise LogitsError(
            f"{where}: {labels_key}[{wrong[0]}]={labels[wrong[0]]}, and {wrong.size} of {number} are outside "
            f"0..{num_classes - 1}, the classes that {key} has: count labels from 0, or leave the others out"
        ) from None
    return Logits(labels, num_classes, rows, next(kind for kind in KINDS[::-1] if key.endswith(kind)), where)


# Files.


class Archive:
    """An .npz file: small arrays whole, large ones in blocks of rows.

    Raises:
      LogitsError: there is no such file, or it is no .npz file.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise LogitsError(f"{path}: no such file")
        if not zipfile.is_zipfile(self.path):
            raise LogitsError(
                f'{path} is no .npz file; write one by np.savez("{self.path.stem}.npz", logits=logits, labels=labels)'
            )
        with zipfile.ZipFile(self.path) as archive:
            self.keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def array(self, key: str) -> np.ndarray:
        """A whole array."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[key]
        except ValueError as error:
            raise LogitsError(
                f"{self.path}: {key} is not a plain array ({error}); give numbers, or names as "
                "np.array(names, dtype=str)"
            ) from None
        except DAMAGED as error:
            raise LogitsError(f"{self.path} is damaged ({error}): write it again") from None

    def examples(self, prefix: str = "") -> Logits:
        """The logits and labels of those keys, checked; the rows are read when they are asked for.

        Raises:
          LogitsError: a key is missing, a shape or type is wrong, or a label is of no class.
        """
        found = [prefix + kind for kind in KINDS if prefix + kind in self.keys]
        missing = [] if found else [" or ".join(prefix + kind for kind in KINDS)]
        missing += [] if prefix + "labels" in self.keys else [f"{prefix}labels"]
        if missing:
            raise LogitsError(
                f"{self.path} has the keys {', '.join(self.keys) or '(none)'}; it needs {' and '.join(missing)} too"
            )
        labels, key = self.array(prefix + "labels"), found[0]
        with _opened(self.path, key) as (shape, by_columns, dtype, _):
            pass

        def rows(size):
            if by_columns:
                whole = self.array(key)
                yield from (whole[start : start + size] for start in range(0, len(whole), size))
            else:
                yield from self._rows(key, size)

        return _checked(labels, shape, dtype, str(self.path), f"{prefix}labels", key, rows)

    def _rows(self, key, size):
        with _opened(self.path, key) as (shape, _, dtype, file):
            width = shape[1] * dtype.itemsize
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                data = file.read(count * width)
                if len(data) < count * width:
                    raise EOFError(f"{key} ends in row {start + len(data) // width} of {shape[0]}")
                yield np.frombuffer(data, dtype).reshape(count, shape[1])
            file.read(1)  # at its end the checksum is compared


@contextlib.contextmanager
def _opened(path, key):
    """An array in an .npz file, read up to its end of the header: (shape, whether it lies by columns, dtype, file)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            yield *read(file), file
    except (ValueError, *DAMAGED) as error:
        raise LogitsError(f"{path} is damaged ({error}): write it again") from None


def save(path, test: Logits, train: Logits | None = None, *, class_counts=None, class_names=None) -> None:
    """Writes logits as `Archive` reads them, whole or not at all."""
    path = pathlib.Path(path)
    arrays = {}
    for prefix, part in (("", test), (TRAIN, train)):
        if part is not None:
            arrays[prefix + part.kind] = np.concatenate(list(part.rows(len(part))))
            arrays[f"{prefix}labels"] = part.labels
    optional = {"class_counts": class_counts, "class_names": class_names}
    arrays |= {key: np.asarray(value) for key, value in optional.items() if value is not None}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
