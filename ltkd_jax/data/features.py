"""Reads features: labelled rows of numbers, such as embeddings, or rows of a table.

`DIR/NAME.npz` is the data set NAME of the data directory DIR:

    np.savez("DIR/NAME.npz", x=x, y=y, x_test=x_test, y_test=y_test)

Its arrays, in which object arrays are refused, since they are pickles:

- `x`, `x_test`: training and test rows, numbers `[N, D]` and `[M, D]`. They are used as
  float32, normalised by mean and deviation of each column of `x`; a constant column,
  such as a pixel that is always black, becomes 0.
- `y`, `y_test`: their labels, integers in [0, C).
- `keys`, `keys_test`: a unique name for each row; by default its number, as in
  `row_00000042`.
- `class_names`: `[C]`, all different; by default the numbers of the classes.

`class_names, y = np.unique(names, return_inverse=True)` makes labels of names.
"""

import collections
import dataclasses
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ltkd_jax.data import longtail, npz, records
from ltkd_jax.files import PathLike

Array = npt.NDArray[Any]

# Within these, no difference from a mean overflows in float32, or is a subnormal
# number, which devices round to 0.
_LARGEST = 1e30
_SMALLEST_STD = 1e-30


class FeaturesFile(npz.ArrayFile):
    """Reads an .npz file of features."""

    example = "x=x, y=y, x_test=x_test, y_test=y_test"


class RowsFile(npz.ArrayFile):
    """Reads an .npz file of rows to classify."""

    example = "x=x"


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Holds the data set of a file.

    Attributes:
      train: its training rows, float32 `[N, D]`.
      test: its test rows.
      class_names: `[C]`, in label order.
      mean: of each column of the training rows.
      std: standard deviation of each column; 1 for a constant one.
    """

    train: records.Images
    test: records.Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find(name: str, data_dir: PathLike | None = None) -> pathlib.Path | None:
    """Returns the path of a data set of features, or None if there is no such file.

    Args:
      name: of the data set, the file's without `.npz`.
      data_dir: the folder, see `records.resolve_data_dir`.
    """
    # A path could lead out of the directory.
    if pathlib.PurePath(name).name != name:
        return None
    path = records.resolve_data_dir(data_dir) / f"{name}.npz"
    return path if path.is_file() else None


def read(path: PathLike) -> Features:
    """Reads the data set of a file.

    Raises:
      ValueError: the file cannot be read or lacks an array, or an array has another
        type or shape, NaN, an infinity, a label that is no class, or a key twice.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "points.npz"
    >>> x = np.array([[0.0, 1.0], [2.0, 5.0]])
    >>> np.savez(path, x=x, y=[0, 1], x_test=x, y_test=[0, 1])
    >>> points = read(path)
    >>> points.train.shape, points.mean, points.std
    ((2,), (1.0, 3.0), (1.0, 2.0))
    """
    file = FeaturesFile(path)
    missing = {"x", "y", "x_test", "y_test"} - set(file.names)
    if missing:
        raise ValueError(
            f"{path} has the arrays {', '.join(file.names) or '(none)'}; it lacks "
            f"{', '.join(sorted(missing))}: x and y are the training rows, x_test and "
            "y_test those of a test set, such as train_test_split of scikit-learn "
            "holds out"
        )
    x = to_float32(file.array("x"), f"{path}: x")
    x_test = to_float32(file.array("x_test"), f"{path}: x_test", x.shape[1])
    class_names = _class_names(file, file.array("y"))
    train = _images(file, x, "", len(class_names))
    test = _images(file, x_test, "_test", len(class_names))
    mean = x.mean(axis=0, dtype=np.float64)
    std = x.std(axis=0, dtype=np.float64)
    # Rounding of the mean may leave a constant column a tiny deviation, by which no
    # other value should be divided. Devices round a subnormal deviation to 0.
    std[(np.ptp(x, axis=0) == 0) | (std < _SMALLEST_STD)] = 1
    return Features(train, test, class_names, tuple(mean.tolist()), tuple(std.tolist()))


def read_rows(path: PathLike) -> tuple[Array, Array]:
    """Returns `x` of a file, float32 `[N, D]`, and its keys, str `[N]`.

    Raises:
      ValueError: see `read`.
    """
    file = RowsFile(path)
    if "x" not in file.names:
        raise ValueError(
            f"{path} has the arrays {', '.join(file.names) or '(none)'}; it lacks x, "
            "the rows"
        )
    x = to_float32(file.array("x"), f"{path}: x")
    return x, _keys(file, "keys", len(x))


def to_float32(x: npt.ArrayLike, name: str, num_columns: int | None = None) -> Array:
    """Returns features as float32 `[N, D]`, after checking them.

    Args:
      x: numbers `[N, D]`.
      name: of the array, for messages.
      num_columns: D; None for any.

    Raises:
      ValueError: another type or shape, NaN, or a number beyond ±1e30.

    >>> to_float32([[1, 2]], "x").dtype
    dtype('float32')
    """
    array = np.asarray(x)
    columns = num_columns or "D"
    if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}; give numbers [N, {columns}], "
            "a row for each example, such as x.reshape(len(x), -1)"
        )
    if num_columns not in (None, array.shape[1]):
        raise ValueError(
            f"{name} is of shape {list(array.shape)}; give the {num_columns} columns "
            "of the training rows, in their order"
        )
    # A number beyond float32 is what is looked for, so NumPy need not warn of it.
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    # Not ">", so that NaN is wrong, too.
    wrong = np.argwhere(~(np.abs(values) <= _LARGEST))
    if wrong.size:
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}]={array[row, column]}: {len(wrong)} values are "
            f"NaN, infinite, or beyond ±{_LARGEST:g}; fill them in, or leave their "
            "rows or columns out"
        )
    return values


def _class_names(file: FeaturesFile, y: Array) -> tuple[str, ...]:
    """Returns the names of the classes, each of which must have a training row."""
    name = f"{file.path}: y"
    if y.ndim != 1 or not y.size or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{name} is {y.dtype}{list(y.shape)}; give a label for each row of x, "
            "integers [N], such as class_names, y = np.unique(y, return_inverse=True)"
        )
    names: Array
    if "class_names" in file.names:
        names = longtail.as_strings(
            file.array("class_names"), f"{file.path}: class_names"
        )
        repeated = [n for n, number in collections.Counter(names).items() if number > 1]
        if repeated:
            raise ValueError(
                f"{file.path}: class_names has {str(repeated[0])!r} twice: give each "
                "class a name of its own"
            )
    else:
        # Not the largest label plus one: a label that is far too large would make a
        # list that long before the checks below.
        names = np.arange(len(np.unique(y))).astype(str)
        if y.max() >= len(names) or y.min() < 0:
            raise ValueError(
                f"{name} holds {len(names)} different labels, from {y.min()} to "
                f"{y.max()}: count them from 0 without gaps, such as by y = "
                "np.unique(y, return_inverse=True)[1], or give class_names"
            )
    labels = longtail.check_labels(y, len(names), name)
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if missing.size:
        raise ValueError(
            f"{name} has no row of class {missing[0]} ({missing.size} of {len(names)} "
            "classes have none): leave it out of class_names, and count without gaps"
        )
    return tuple(names.tolist())


def _images(
    file: FeaturesFile, x: Array, suffix: str, num_classes: int
) -> records.Images:
    """Returns rows with their labels and keys, sorted by key."""
    labels_name = f"{file.path}: y{suffix}"
    labels = longtail.check_labels(file.array(f"y{suffix}"), num_classes, labels_name)
    if not len(x) or len(labels) != len(x):
        raise ValueError(
            f"{labels_name} holds {len(labels)} labels for the {len(x)} rows of "
            f"x{suffix}: give one for each row, and at least one"
        )
    keys = _keys(file, f"keys{suffix}", len(x))
    order = np.argsort(keys)
    return records.Images(x[order], labels[order].astype(np.int32), keys[order])


def _keys(file: npz.ArrayFile, name: str, num_rows: int) -> Array:
    """Returns the keys `[N]` of the rows; without such an array, from their numbers."""
    if name not in file.names:
        return np.array([f"row_{row:08d}" for row in range(num_rows)])
    return longtail.check_keys(file.array(name), num_rows, f"{file.path}: {name}")
