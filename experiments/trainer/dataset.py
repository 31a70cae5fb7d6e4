"""The images or features of a run, in memory or on disk."""

import dataclasses
import functools
import logging
import os

import jax
import numpy as np

from experiments.config.spec import DatasetSpec
from experiments.config.validation import SUBSETS, ConfigError
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training import hosts

_log = logging.getLogger(__name__)
# A test set is balanced if its classes' sizes differ by no more than this factor.
_BALANCED_RATIO = 1.25


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Holds the sets of images of a run, and the groups of its classes.

    A set is an `Images` in the host's memory, or a `Records` on disk.

    Attributes:
      source: the data set that they are drawn from.
      train: the long-tailed training set.
      outer: balanced images, held out of it for the outer loss of learned weights.
      validation: balanced images, held out of it for the choice of hyperparameters.
      test: the test set, or a part of it, as balanced as the set allows.
      class_counts: `[C]`, training images of each class.
      groups: head, medium and tail by these counts, see `group_classes`.
      shots: masks `[C]` of the classes with many, medium and few images, by name.
    """

    source: datasets.Source
    train: Images | Records
    outer: Images | Records
    validation: Images | Records
    test: Images | Records
    class_counts: np.ndarray
    groups: groups.ClassGroups
    shots: dict[str, np.ndarray]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image, or (columns,) of features."""
        return self.train.shape

    @property
    def is_streamed(self) -> bool:
        """Returns whether images stay on disk."""
        return isinstance(self.train, Records)

    def preprocess(self, images: jax.Array) -> jax.Array:
        """Returns uint8 images, or features, normalised as float32."""
        return augment.normalize(images, self.source.mean, self.source.std)


# Runs of one process share the data sets loaded last.
@functools.lru_cache(maxsize=2)
def load(spec: DatasetSpec) -> Dataset:
    """Draws the sets of images of a run.

    Raises:
      ConfigError: an unknown or unprepared data set, or one with too few images for
        the draw.
    """
    try:
        source = datasets.load(
            spec.name, spec.dir or None, size=spec.image_size, margin=spec.stream
        )
        split = _split(spec, source)
        test_indices = _balanced_indices(
            source.test, spec.test_images, source.num_classes
        )
        train, outer, validation, test = _read(
            [
                (source.train, split.train),
                (source.train, split.outer),
                (source.train, split.validation),
                (source.test, test_indices),
            ],
            spec.stream,
        )
        class_counts = np.bincount(
            source.train.labels[split.train], minlength=source.num_classes
        )
        _warn_of_few_images(spec, source, class_counts)
        _warn_of_unbalanced_test(source, test.labels)
        class_groups = _configured_groups(spec, class_counts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Dataset(
        source=source,
        train=train,
        outer=outer,
        validation=validation,
        test=test,
        class_counts=class_counts,
        groups=class_groups,
        shots=groups.shots(class_counts),
    )


def _configured_groups(
    spec: DatasetSpec, class_counts: np.ndarray
) -> groups.ClassGroups:
    fractions = spec.group_fractions
    try:
        return group_classes(class_counts, fractions)
    except ValueError as error:
        raise ValueError(f"config.groups.fractions={fractions}: {error}") from None


def group_classes(
    class_counts: np.ndarray, fractions: tuple[float, ...]
) -> groups.ClassGroups:
    """Returns the groups of the classes; with two, the default means head and tail.

    Raises:
      ValueError: see `ClassGroups.from_counts`.
    """
    if len(class_counts) == 2 and tuple(fractions) == groups.DEFAULT_FRACTIONS:
        return groups.ClassGroups.from_counts(
            class_counts, fractions=(0.5, 0.5), names=("head", "tail")
        )
    return groups.ClassGroups.from_counts(class_counts, fractions=fractions)


def _split(spec: DatasetSpec, source: datasets.Source) -> longtail.Split:
    """Returns the indices of the training, outer and validation sets.

    Raises:
      ValueError: too few images for the draw; it names the keys and the class.
    """
    labels = source.train.labels
    keys = source.train.keys
    try:
        if spec.subset not in SUBSETS:
            return longtail.split_by_list(
                longtail.read_list(spec.subset),
                labels,
                keys,
                num_classes=source.num_classes,
                seed=spec.split_seed,
                outer_per_class=spec.outer_per_class,
                validation_per_class=spec.validation_per_class,
            )
        return longtail.split(
            labels,
            keys,
            num_classes=source.num_classes,
            imbalance=spec.imbalance if spec.subset == "exponential" else None,
            n_max=spec.n_max,
            seed=spec.split_seed,
            outer_per_class=spec.outer_per_class,
            validation_per_class=spec.validation_per_class,
        )
    except longtail.ClassSizeError as error:
        name = source.class_names[error.label]
        raise ValueError(
            f"config.data: {error} (class {error.label} is {name!r})"
        ) from error


def _warn_of_few_images(
    spec: DatasetSpec, source: datasets.Source, class_counts: np.ndarray
) -> None:
    """Logs a warning if images are held out of a class that has few to train on."""
    num_held_out = spec.outer_per_class + spec.validation_per_class
    num_small = int((class_counts < longtail.FEW_IMAGES).sum())
    if not num_held_out or not num_small or not hosts.is_primary():
        return
    c = int(class_counts.argmin())
    _warn_once(
        f"{source.name}: of class {source.class_names[c]!r}, {class_counts[c]} images "
        f"remain for training ({num_small} of {source.num_classes} classes have fewer "
        f"than {longtail.FEW_IMAGES}): lower data.outer_per_class="
        f"{spec.outer_per_class} or data.validation_per_class="
        f"{spec.validation_per_class}, or draw more of them"
    )


def _warn_of_unbalanced_test(source: datasets.Source, labels: np.ndarray) -> None:
    """Logs a warning if some classes have clearly more test images than others."""
    counts = np.bincount(labels, minlength=source.num_classes)
    most, fewest = int(counts.argmax()), int(counts.argmin())
    if counts[most] <= _BALANCED_RATIO * counts[fewest] or not hosts.is_primary():
        return
    _warn_once(
        f"{source.name}: the test set is not balanced, with {counts[fewest]} examples "
        f"of class {source.class_names[fewest]!r} and {counts[most]} of "
        f"{source.class_names[most]!r}: classes with more of them count more in the "
        "accuracy on all classes. Compare methods on a balanced test set"
    )


# The data of one process may be loaded several times.
@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning that has not been logged before."""
    _log.warning(message)


def _read(
    selections: list[tuple[Images | Records, np.ndarray]], stream: bool
) -> list[Images | Records]:
    """Returns the selected images, in memory unless they are streamed."""
    if stream:
        subsets: list[Images | Records] = []
        for images, indices in selections:
            if not isinstance(images, Records):
                raise ValueError(
                    "data.stream=True: this data set has no files to stream from: set "
                    "it to False"
                )
            subsets.append(images.subset(indices))
        return subsets
    size = 0
    for images, indices in selections:
        # Records are decoded to bytes; features have four for each number.
        itemsize = images.images.itemsize if isinstance(images, Images) else 1
        size += len(indices) * int(np.prod(images.shape)) * itemsize
    # The other half is for the network, its optimizer and the teacher's table.
    if size > device_memory() / 2:
        raise ValueError(
            f"the images take {size / 2**30:.1f} GiB, more than half of the device's "
            "memory: set data.stream=True, or a smaller data.image_size; of features, "
            "keep fewer rows or columns"
        )
    return [images.take(indices) for images, indices in selections]


def _balanced_indices(
    images: Images | Records, number: int, num_classes: int
) -> np.ndarray:
    """Returns the indices of about `number` images, as many of each class if possible.

    Of a class that has fewer, all are taken. They are always the same ones; 0 takes all
    images.
    """
    if not 0 < number < len(images):
        return np.arange(len(images))
    per_class = max(number // num_classes, 1)
    class_sizes = np.bincount(images.labels, minlength=num_classes)
    has_more = class_sizes > per_class
    candidates = np.flatnonzero(has_more[images.labels])
    all_of_small = np.flatnonzero(~has_more[images.labels])
    if not candidates.size:
        return all_of_small
    # The draw depends on the keys only, so the classes may be numbered anew.
    _, labels = np.unique(images.labels[candidates], return_inverse=True)
    drawn = longtail.balanced_subset(
        labels,
        images.keys[candidates],
        num_classes=int(has_more.sum()),
        per_class=per_class,
    )
    return np.sort(np.concatenate([all_of_small, candidates[drawn]]))


def device_memory() -> int:
    """Returns the bytes of memory of this process's first device.

    A device that does not report its memory, such as a CPU, counts as having all of the
    machine's.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
