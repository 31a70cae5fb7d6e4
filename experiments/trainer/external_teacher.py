"""Reads external teachers: the variables of a network, or the logits of any model.

`teacher.checkpoint` names the file, or the work directory of a finished run, whose
student then teaches. FILE.msgpack holds the variables of a network of the library, as
`ltkd_jax.models.convert` writes it. FILE.npz (see `ltkd_jax.data.logits`) holds

- `train_logits` `[N, C]` or `[N, views, C]`, `train_labels` `[N]` and `train_keys`
  `[N]`, of all training images of the data set, not only of the long-tailed draw;
- optionally `logits` `[M, C]`, `labels` `[M]` and `keys` `[M]` of its test images, for
  the report.

A row belongs to the image of its key, or whose key its key ends in, as a path does. The
order does not matter.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import StopRequest
from ltkd_jax import files, inference, metrics
from ltkd_jax.data import longtail
from ltkd_jax.data.logits import TRAIN_PREFIX, Logits, LogitsError, LogitsFile
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import convert
from ltkd_jax.training import hosts


def read_variables(
    path: str | os.PathLike[str], model_name: str, dataset: Dataset
) -> dict:
    """Returns the variables in a msgpack file.

    Args:
      path: the file, `teacher.checkpoint`.
      model_name: the network's name, `teacher.model`.
      dataset: the data set that it teaches.

    Raises:
      ValueError: the file cannot be read, or has another model or number of classes.
    """
    try:
        return convert.load(
            path, model_name, dataset.num_classes, image_shape=dataset.image_shape
        )
    except ValueError as error:
        raise ValueError(
            f"teacher.checkpoint, with teacher.model={model_name!r}: {error}"
        ) from error


def check_data(
    folder: str | os.PathLike[str], dataset: Dataset, content: str | None
) -> None:
    """Checks that a network was trained on the data set that it teaches.

    Args:
      folder: of a finished teacher or run, `teacher.checkpoint`.
      dataset: the data set that it teaches.
      content: the hash of the data set's images if it is a custom one.

    Raises:
      ValueError: it was trained on another one, or on other images.
    """
    path = pathlib.Path(folder) / "config.json"
    recorded = files.read_json(path, "give another config.teacher.checkpoint")
    try:
        name = recorded["config"]["data"]["name"]
        recorded_content = recorded["content"]["data"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} is of another version of this program: train the teacher again"
        ) from None
    if name != dataset.source.name:
        raise ValueError(
            f"teacher.checkpoint={os.fspath(folder)!r} was trained on the data set "
            f"{name!r}, but is to teach {dataset.source.name!r}: give a teacher that "
            "was trained on that one"
        )
    if recorded_content != content:
        raise ValueError(
            f"teacher.checkpoint={os.fspath(folder)!r} was trained on other images of "
            f"{name!r} (their hash was {recorded_content}, and now is {content}): "
            "train it again on those that there are now"
        )


def check_run(
    folder: str | os.PathLike[str], dataset: Dataset, content: str | None
) -> None:
    """Checks that the student of a finished run can teach on a data set.

    Args:
      folder: the run's work directory, `teacher.checkpoint`.
      dataset, content: see `check_data`.

    Raises:
      ValueError: the student is damaged, or was trained on another data set, other
        classes or images of another shape.
    """
    check_data(folder, dataset, content)
    student = inference.load(folder)
    source = f"teacher.checkpoint={os.fspath(folder)!r}"
    check_class_names(student.class_names, dataset.source.class_names, source)
    if student.image_shape != dataset.image_shape:
        raise ValueError(
            f"{source} was trained on images of shape {list(student.image_shape)}, but "
            f"those of the config are {list(dataset.image_shape)}: give both runs the "
            "same config.data.image_size"
        )


@dataclasses.dataclass(frozen=True)
class LogitsTeacher:
    """Holds the logits of a teacher without a network, in place of a `Teacher`.

    Attributes:
      logits: float32 `[N, V, C]` of all training images of the data set, V views of
        each; V = 1 serves for all views.
      keys: `[N]`, of these images, sorted.
      results: its part of `results.json`.
      variables: None, since there is no network.

    It has the interface of `Teacher`; its `table` ignores `stop`.
    """

    logits: np.ndarray
    keys: np.ndarray
    results: dict
    variables: None = None

    def table(
        self, images: Images | Records, stop: StopRequest | None = None
    ) -> np.ndarray:
        """Returns the logits of some of the images, `[N, V, C]`, in their order."""
        return self.logits[np.searchsorted(self.keys, images.keys)]


def load_logits(path: str | os.PathLike[str], dataset: Dataset) -> LogitsTeacher:
    """Returns the teacher in an npz file, which only the primary process reads.

    Args:
      path: the file, `teacher.checkpoint`.
      dataset: the data set that it teaches.

    Raises:
      LogitsError: the file cannot be read, lacks an array, or has other images than the
        data set.
    """
    try:
        logits, results = hosts.run_on_primary(lambda: _read_logits(path, dataset))
    except LogitsError as error:
        raise LogitsError(f"teacher.checkpoint: {error}") from None
    return LogitsTeacher(logits, dataset.source.train.keys, results)


def _read_logits(
    path: str | os.PathLike[str], dataset: Dataset
) -> tuple[np.ndarray, dict]:
    """Returns the training logits `[N, V, C]`, sorted by key, and the results.

    The results are the teacher's part of `results.json`.
    """
    source = dataset.source
    num_classes = dataset.num_classes
    file = LogitsFile(path)
    _check_file_class_names(file, source.class_names)
    train = file.logits(TRAIN_PREFIX, views=True)
    rows = _match_rows(
        train, source.train, [(num_classes,), (source.views.num, num_classes)]
    )
    logits = train.to_logits()[rows].reshape(len(rows), -1, num_classes)

    # Bias is measured on the images as they are, not on crops and flips of them.
    train_sums = _eval_sums(
        source.views.of_unchanged(logits), source.train, dataset.train
    )
    group_mass = {"long_tailed": metrics.group_mass(train_sums, dataset.groups)}
    results: dict[str, Any] = {
        "hash": files.sha256(path)[:12],
        "model": pathlib.Path(path).name,
        "group_mass": group_mass,
    }
    if file.has_logits():
        test = file.logits()
        rows = _match_rows(test, source.test, [(num_classes,)])
        test_sums = _eval_sums(test.to_logits()[rows], source.test, dataset.test)
        results["test"] = metrics.summarize(test_sums, dataset.groups, dataset.shots)
        group_mass["balanced"] = metrics.group_mass(test_sums, dataset.groups)
    return logits, results


def _check_file_class_names(file: LogitsFile, class_names: tuple[str, ...]) -> None:
    """Raises LogitsError if a file has names of classes that are not the data set's."""
    if "class_names" not in file.names:
        return
    name = f"{file.path}: class_names"
    try:
        names = longtail.as_strings(file.array("class_names"), name).tolist()
    except ValueError as error:
        raise LogitsError(str(error)) from None
    check_class_names(names, class_names, name)


def check_class_names(
    names: Sequence[str], class_names: Sequence[str], source: str
) -> None:
    """Checks that a teacher has the classes of the data set, in the same order.

    Args:
      names: of the teacher's classes, in the order of its logits.
      class_names: of the data set, in label order.
      source: of the teacher, for messages.

    Raises:
      LogitsError: there are others, or they are in another order.
    """
    if len(names) != len(class_names):
        raise LogitsError(
            f"{source} has {len(names)} classes, and the data set {len(class_names)}: "
            "use a teacher of the same classes, or select its columns"
        )
    for label, (name, expected) in enumerate(zip(names, class_names)):
        if name != expected:
            raise LogitsError(
                f"{source}: class {label} is {name!r}, but {expected!r} in the data "
                "set: put the teacher's classes into the data set's order, or use a "
                "teacher of the same classes"
            )


def _match_rows(
    logits: Logits, images: Images | Records, allowed_shapes: list[tuple[int, ...]]
) -> np.ndarray:
    """Returns the row of each image, int `[M]`, found by its key.

    The rows may be in any order, and some may be of other images. Their keys may be
    longer paths, see `longtail.match_paths`.

    Args:
      logits: N rows with labels and keys.
      images: M images of the data set.
      allowed_shapes: of one row.

    Raises:
      LogitsError: rows of another shape, no keys, or keys or labels that do not fit.
    """
    shape = logits.values.shape
    if shape[1:] not in allowed_shapes:
        shapes = " or ".join(
            f"[N, {', '.join(map(str, allowed))}]" for allowed in allowed_shapes
        )
        raise LogitsError(
            f"{logits.source}: {logits.array_name} is of shape {list(shape)}, but must "
            f"be {shapes}"
        )
    keys_name = f"{logits.prefix}keys"
    if logits.keys is None:
        raise LogitsError(
            f"{logits.source} lacks {keys_name}: labels do not show which image of a "
            "class a row is of. Add the keys of the images, one for each row: "
            "split.csv beside the prepared data has them, and so has "
            "ltkd_jax.data.datasets.load(NAME, DATA_DIR), as .train.keys and "
            f".test.keys; the first is {str(images.keys[0])!r}"
        )
    rows = _rows_by_key(logits.keys, images.keys, f"{logits.source}: {keys_name}")
    is_missing = rows < 0
    if is_missing.any():
        examples = ", ".join(repr(str(key)) for key in images.keys[is_missing][:3])
        raise LogitsError(
            f"{logits.source}: {keys_name} lacks {is_missing.sum()} of the data set's "
            f"{len(images)} images, such as {examples}; it has {str(logits.keys[0])!r}"
        )
    (wrong,) = np.nonzero(logits.labels[rows] != images.labels)
    if wrong.size:
        first = wrong[0]
        raise LogitsError(
            f"{logits.source}: the labels of {logits.array_name} are not those of the "
            f"data set for {wrong.size} of {len(images)} images, such as "
            f"{str(images.keys[first])!r}, labelled {logits.labels[rows[first]]} "
            f"instead of {images.labels[first]}: the classes are in another order, or "
            "the rows are not those of the keys"
        )
    return rows


def _rows_by_key(row_keys: np.ndarray, keys: np.ndarray, name: str) -> np.ndarray:
    """Returns the row of each image, int `[M]`, -1 where there is none.

    Args:
      row_keys: str `[N]`, of the rows.
      keys: str `[M]`, of the images.
      name: of the array with the rows' keys, for messages.

    Raises:
      LogitsError: two rows are of one image.
    """
    image_of_row = longtail.match_paths(row_keys.tolist(), keys)  # -1: of no image
    (candidates,) = np.nonzero(image_of_row >= 0)
    is_exact = row_keys[candidates] == keys[image_of_row[candidates]]
    # Where a row has an image's very key, longer paths are of other images.
    has_exact_row = np.zeros(len(keys), bool)
    has_exact_row[image_of_row[candidates[is_exact]]] = True
    matched = candidates[is_exact | ~has_exact_row[image_of_row[candidates]]]
    rows = np.full(len(keys), -1)
    rows[image_of_row[matched]] = matched
    # An assignment keeps the last of several rows of an image, so the others differ.
    duplicates = matched[rows[image_of_row[matched]] != matched]
    if not duplicates.size:
        return rows
    image = image_of_row[duplicates[0]]
    key = str(row_keys[duplicates[0]])
    other_key = str(row_keys[rows[image]])
    if key == other_key:
        raise LogitsError(f"{name} has {key!r} twice: keep one of the rows")
    raise LogitsError(
        f"{name} has {key!r} and {other_key!r}, which both end in the key of one "
        f"image, {str(keys[image])!r}: keep its row only, or give the keys of split.csv"
    )


def _eval_sums(
    logits: jax.Array | np.ndarray,
    all_images: Images | Records,
    images: Images | Records,
) -> metrics.EvalSums:
    """Returns the evaluation on `images`, by the logits `[N, C]` of `all_images`."""
    indices = np.searchsorted(all_images.keys, images.keys)
    return metrics.eval_sums(
        jnp.asarray(logits[indices]),
        jnp.asarray(images.labels),
        jnp.ones(len(images), bool),
    )
