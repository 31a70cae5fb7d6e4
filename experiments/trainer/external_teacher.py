"""Teachers that come from a file: variables of a network of ours, or the logits of any model whatever.

`teacher.checkpoint` names it: FILE.msgpack, as `ltkd_jax.models.convert` writes it, or FILE.npz with `train_logits`
`[N, C]` or `[N, views, C]` and `train_labels` `[N]` of all training images of the data set, in the order of its keys,
and, where the report is to show the teacher too, `logits` `[M, C]` and `labels` `[M]` of its test images. Labels tell
another order of classes; `train_keys` and `keys`, where they are given, any other order.
"""

import dataclasses
import pathlib

import numpy as np

from experiments.config import checks
from experiments.trainer import dataset
from ltkd_jax import metrics
from ltkd_jax.data.logits import DAMAGED
from ltkd_jax.models import convert
from ltkd_jax.training import hosts


def read_variables(config) -> dict:
    """The variables in the msgpack file of a config's `teacher.checkpoint`.

    Raises:
      checks.ConfigError: the file is of another model or number of classes, or cannot be read.
    """
    data, path, model = dataset.load(config), config.teacher.checkpoint, config.teacher.model
    try:
        return convert.load(path, model, data.num_classes, image_shape=data.image_shape)
    except ValueError as error:
        raise checks.ConfigError(f"config.teacher.checkpoint, with config.teacher.model={model!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class GivenLogits:
    """A teacher of which there are only logits; what a run asks of `teachers.Teacher`.

    Attributes:
      logits: float32 `[N, views or 1, C]` of the data set's training images.
      keys: `[N]`, of those images, sorted.
      results: its part of `results.json`.
    """

    logits: np.ndarray
    keys: np.ndarray
    results: dict
    variables: None = None

    def table(self, images, stop) -> np.ndarray:
        """The logits of these images, `[n, views or 1, C]`."""
        return self.logits[np.searchsorted(self.keys, images.keys)]


def load_logits(config) -> GivenLogits:
    """The teacher of a config whose `teacher.checkpoint` is an npz file.

    Raises:
      checks.ConfigError: the file cannot be read, lacks an array, or is not of the config's data set.
    """
    data = dataset.load(config)
    path, of_file = pathlib.Path(config.teacher.checkpoint), checks.file_hash(config.teacher.checkpoint)

    def read():
        arrays, views = _arrays(path), data.source.views.num
        logits = _checked(path, arrays, "train_logits", "train_labels", data.source.train, data.num_classes, views)
        logits = logits.reshape(len(logits), -1, data.num_classes)
        seen = logits[:, data.source.views.identity if logits.shape[1] > 1 else 0]
        on_train = _sums(seen, data.source.train, data.train)
        results = {"hash": of_file, "model": f"logits {of_file}", "group_mass": {}}
        results["group_mass"]["long_tailed"] = metrics.group_mass(on_train, data.groups)
        if "logits" in arrays:
            of_test = _checked(path, arrays, "logits", "labels", data.source.test, data.num_classes)
            on_test = _sums(of_test, data.source.test, data.test)
            results["test"] = metrics.summarize(on_test, data.groups, data.shots)
            results["group_mass"]["balanced"] = metrics.group_mass(on_test, data.groups)
        return logits, results

    logits, results = hosts.run_on_primary(read)
    return GivenLogits(logits, data.source.train.keys, results)


def _arrays(path):
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (*DAMAGED, ValueError, TypeError, AttributeError) as error:  # the last two: an array and no archive
        raise checks.ConfigError(
            f"config.teacher.checkpoint={str(path)!r} cannot be read as an npz file ({error}): write it by numpy.savez"
        ) from None


def _checked(path, arrays, name, labels, images, num_classes, views=None):
    """The logits of a name as float32; their labels, which must be the data set's, say that the order is its too."""
    problem = f"config.teacher.checkpoint={str(path)!r}:"
    for needed in (name, labels):
        if needed not in arrays:
            raise checks.ConfigError(
                f"{problem} it lacks {needed!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}"
            )
    found, wanted = arrays[name], [(len(images), num_classes)]
    wanted += [(len(images), views, num_classes)] if views else []
    if found.shape not in wanted or not np.issubdtype(found.dtype, np.floating):
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise checks.ConfigError(
            f"{problem} {name} is {found.dtype}{list(found.shape)}, but must be floats of {shapes}"
        )
    if not np.array_equal(arrays[labels], images.labels):
        raise checks.ConfigError(
            f"{problem} {labels} are not those of the data set, so the logits are not in its order: sort the images "
            "by their keys, of CIFAR the order of the original files"
        )
    keys = arrays.get(labels.replace("labels", "keys"))
    if keys is not None and not np.array_equal(keys, images.keys):
        raise checks.ConfigError(f"{problem} its keys are not those of the data set, sorted: sort the rows by them")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise checks.ConfigError(f"{problem} {name} holds values that are not finite")
    return found


def _sums(logits, whole, part):
    """`metrics.EvalSums` over the images of a part."""
    place = np.searchsorted(whole.keys, part.keys)
    return metrics.eval_sums(logits[place], part.labels, np.ones(len(part), bool))
