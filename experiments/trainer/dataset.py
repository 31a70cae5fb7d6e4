"""The images of a run: what is drawn of a data set, in memory or still on disk."""

import dataclasses
import functools
import os

import jax
import numpy as np

from experiments.config.spec import DatasetSpec
from experiments.config.validation import SUBSETS, ConfigError
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images, Records


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A long-tailed training set, balanced held-out sets, and how its classes are grouped; on the host or on disk."""

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
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.shape

    @property
    def streams(self) -> bool:
        """Whether images stay on disk."""
        return isinstance(self.train, Records)

    def preprocess(self, images):
        """Returns uint8 images as normalised float images."""
        return augment.normalize(images, self.source.mean, self.source.std)


@functools.lru_cache(maxsize=2)
def load(spec: DatasetSpec) -> Dataset:
    """Returns the data; the last ones are kept, so that runs in one process share them.

    Raises:
      ConfigError: unknown or unprepared data, or a split that the data cannot give.
    """
    try:
        source = datasets.load(
            spec.name, spec.dir or None, size=spec.image_size, margin=spec.stream
        )
        split = _split(spec, source)
        class_counts = np.bincount(
            source.train.labels[split.train], minlength=source.num_classes
        )
        test = _balanced_part(source.test, spec.test_images, source.num_classes)
        parts = [
            (source.train, part)
            for part in (split.train, split.outer, split.validation)
        ]
        train, outer, validation, test = _read(
            [*parts, (source.test, test)], spec.stream
        )
        class_groups = groups.ClassGroups.from_counts(
            class_counts, fractions=spec.group_fractions
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Dataset(
        source,
        train,
        outer,
        validation,
        test,
        class_counts,
        class_groups,
        groups.shots(class_counts),
    )


def _split(spec, source) -> longtail.Split:
    labels, keys = source.train.labels, source.train.keys
    options = dict(
        num_classes=source.num_classes,
        seed=spec.split_seed,
        outer_per_class=spec.outer_per_class,
        validation_per_class=spec.validation_per_class,
    )
    if spec.subset not in SUBSETS:
        return longtail.split_by_list(
            longtail.read_list(spec.subset), labels, keys, **options
        )
    imbalance = spec.imbalance if spec.subset == "exponential" else None
    return longtail.split(
        labels, keys, imbalance=imbalance, n_max=spec.n_max, **options
    )


def _read(parts, streams: bool):
    """Returns the images of each (images, indices), in memory or, for a stream, still on disk."""
    if streams:
        if not all(isinstance(images, Records) for images, _ in parts):
            raise ValueError(
                "data.stream=True: this data set has no files to stream from: leave it False"
            )
        return [images.subset(indices) for images, indices in parts]
    size = sum(len(indices) * int(np.prod(images.shape)) for images, indices in parts)
    if size > device_memory() / 2:
        raise ValueError(
            f"the images take {size / 2**30:.1f} GiB, more than half of the device's memory: set data.stream=True, "
            "or a smaller data.image_size"
        )
    return [images.take(indices) for images, indices in parts]


def _balanced_part(images, number, num_classes):
    """Returns the indices of a fixed, balanced part of the images; of all if `number` is 0 or at least as many."""
    if not 0 < number < len(images):
        return np.arange(len(images))
    per_class = max(number // num_classes, 1)
    return longtail.balanced_subset(
        images.labels, images.keys, num_classes=num_classes, per_class=per_class
    )


def device_memory() -> int:
    """Returns the bytes of this process's first device's memory; of the machine's where a device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
