"""Reads teachers from files: variables of a network of the library, or the logits of any model.

`teacher.checkpoint` names the file: FILE.msgpack, as `ltkd_jax.models.convert` writes it, or FILE.npz (see
`ltkd_jax.data.logits`) with `train_logits` `[N, C]` or `[N, views, C]` and `train_labels` `[N]` of all training images
of the data set, sorted by key, and optionally `logits` `[M, C]` and `labels` `[M]` of its test images, for the report.
The labels show whether the order of the images is right; `train_keys` and `keys`, where they exist, show it surely.
"""

import dataclasses
import os

import numpy as np

from experiments.trainer.dataset import Dataset
from ltkd_jax import files, metrics
from ltkd_jax.data.logits import TRAIN_PREFIX, Logits, LogitsError, LogitsFile
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import convert
from ltkd_jax.training import hosts


def read_variables(path: str | os.PathLike, model_name: str, dataset: Dataset) -> dict:
    """Returns the variables in a msgpack file.

    Args:
      path: of the file, `teacher.checkpoint`.
      model_name: of the network, `teacher.model`.
      dataset: on which it teaches.

    Raises:
      ValueError: the file is of another model or number of classes, or cannot be read.
    """
    try:
        return convert.load(
            path, model_name, dataset.num_classes, image_shape=dataset.image_shape
        )
    except ValueError as error:
        raise ValueError(
            f"teacher.checkpoint, with teacher.model={model_name!r}: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class LogitsTeacher:
    """A teacher of which only logits exist, with what a run needs of a `Teacher`.

    Attributes:
      logits: float32 `[N, views or 1, C]` of all training images of the data set.
      keys: `[N]`, of those images, sorted.
      results: its part of `results.json`.
      variables: None; there is no network.
    """

    logits: np.ndarray
    keys: np.ndarray
    results: dict
    variables: None = None

    def table(self, images: Images | Records, stop=None) -> np.ndarray:
        """Returns the logits of images, `[n, views or 1, C]`."""
        return self.logits[np.searchsorted(self.keys, images.keys)]


def load_logits(path: str | os.PathLike, dataset: Dataset) -> LogitsTeacher:
    """Returns the teacher in an npz file; of several processes, the first one reads it.

    Args:
      path: of the file, `teacher.checkpoint`.
      dataset: on which it teaches.

    Raises:
      LogitsError: the file cannot be read, lacks an array, or its images are not the data set's.
    """
    try:
        logits, results = hosts.run_on_primary(lambda: _read_logits(path, dataset))
    except LogitsError as error:
        raise LogitsError(f"teacher.checkpoint: {error}") from None
    return LogitsTeacher(logits, dataset.source.train.keys, results)


def _read_logits(path, dataset: Dataset) -> tuple[np.ndarray, dict]:
    source = dataset.source
    file = LogitsFile(path)
    train = file.logits(TRAIN_PREFIX, views=True)
    _check_images(
        train, source.train, (len(source.train), dataset.num_classes), source.views.num
    )
    logits = train.to_logits().reshape(len(train), -1, dataset.num_classes)
    # Bias is measured on the images themselves, not on views of them.
    identity = source.views.identity if logits.shape[1] > 1 else 0
    train_sums = _eval_sums(logits[:, identity], source.train, dataset.train)
    file_hash = files.sha256(path)[:12]
    results = {
        "hash": file_hash,
        "model": f"logits {file_hash}",
        "group_mass": {"long_tailed": metrics.group_mass(train_sums, dataset.groups)},
    }
    if file.has_logits():
        test = file.logits()
        _check_images(test, source.test, (len(source.test), dataset.num_classes))
        test_sums = _eval_sums(test.to_logits(), source.test, dataset.test)
        results["test"] = metrics.summarize(test_sums, dataset.groups, dataset.shots)
        results["group_mass"]["balanced"] = metrics.group_mass(
            test_sums, dataset.groups
        )
    return logits, results


def _check_images(
    logits: Logits,
    images: Images | Records,
    shape: tuple[int, int],
    num_views: int | None = None,
):
    """Checks that logits are of the data set's images, in their order."""
    number, num_classes = shape
    allowed = (
        [shape] if num_views is None else [shape, (number, num_views, num_classes)]
    )
    if logits.values.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise LogitsError(
            f"{logits.source}: {logits.array_name} is of shape {list(logits.values.shape)}, but must be {shapes}"
        )
    if not np.array_equal(logits.labels, images.labels):
        raise LogitsError(
            f"{logits.source}: the labels of {logits.array_name} are not those of the data set, so the logits are not in its "
            "order: sort the images by their keys, for CIFAR the order of the original files"
        )
    if logits.keys is not None and not np.array_equal(logits.keys, images.keys):
        raise LogitsError(
            f"{logits.source}: the keys of {logits.array_name} are not those of the data set, sorted: sort the rows by them"
        )


def _eval_sums(
    logits: np.ndarray, all_images: Images | Records, images: Images | Records
) -> metrics.EvalSums:
    """Returns the evaluation of some of all images, of which the logits are."""
    indices = np.searchsorted(all_images.keys, images.keys)
    return metrics.eval_sums(logits[indices], images.labels, np.ones(len(images), bool))
