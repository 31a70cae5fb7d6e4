"""Config -> data: what is drawn of a data set, in memory or still on disk."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from experiments.config import checks
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images, Records


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A long-tailed training set, balanced held-out sets, and how its classes are grouped; on the host or on disk."""

    source: datasets.Source
    train: Images | Records
    meta: Images | Records
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
        """uint8 images -> normalised float images."""
        return augment.normalize(images, self.source.mean, self.source.std)


def load(config) -> Dataset:
    """The data of a config; the last ones are kept, so that runs in one process share them.

    Raises:
      checks.ConfigError: unknown or unprepared data, or a split that the data cannot give.
    """
    keys = ("data", "groups", "seed_split")
    return _load(json.dumps({key: checks.plain(config)[key] for key in keys}))


@functools.lru_cache(maxsize=2)
def _load(key: str) -> Dataset:
    spec = json.loads(key)
    data = spec["data"]
    try:
        source = datasets.load(data["name"], data["dir"] or None, size=data["image_size"], margin=data["stream"])
        split = _split(data, source, spec["seed_split"])
        class_counts = np.bincount(source.train.labels[split.train], minlength=source.num_classes)
        by_rank = groups.ClassGroups.from_counts(class_counts, fractions=spec["groups"]["fractions"])
        test = _some(source.test, data["test_images"], source.num_classes)
        parts = [(source.train, part) for part in (split.train, split.meta, split.validation)] + [(source.test, test)]
        train, meta, validation, test = _read(parts, data["stream"])
    except ValueError as error:
        raise checks.ConfigError(str(error)) from error
    return Dataset(source, train, meta, validation, test, class_counts, by_rank, groups.shots(class_counts))


def _split(data, source, seed) -> longtail.Split:
    labels, keys = source.train.labels, source.train.keys
    held_out = {key: data[key] for key in ("meta_per_class", "validation_per_class")}
    shared = dict(num_classes=source.num_classes, seed=seed, **held_out)
    if data["subset"] not in checks.SUBSETS:
        return longtail.split_listed(longtail.read_list(data["subset"]), labels, keys, **shared)
    imbalance = data["imbalance"] if data["subset"] == "exponential" else None
    return longtail.split(labels, keys, imbalance=imbalance, n_max=data["n_max"], **shared)


def _read(parts, streams: bool):
    """The images of each (images, indices), in memory or, for a stream, still on disk."""
    if streams:
        if not all(isinstance(images, Records) for images, _ in parts):
            raise ValueError("data.stream=True: this data set has no files to stream from: leave it False")
        return [images.subset(indices) for images, indices in parts]
    size = sum(len(indices) * int(np.prod(images.shape)) for images, indices in parts)
    if size > device_memory() / 2:
        raise ValueError(
            f"the images take {size / 2**30:.1f} GiB, more than half of the device's memory: set data.stream=True, "
            "or a smaller data.image_size"
        )
    return [images.take(indices) for images, indices in parts]


def _some(images, number, num_classes):
    """Indices of a fixed, balanced part of the images; of all if 0 or at least as many are asked for."""
    if not 0 < number < len(images):
        return np.arange(len(images))
    per_class = max(number // num_classes, 1)
    return longtail.balanced(images.labels, images.keys, num_classes=num_classes, per_class=per_class)


def device_memory() -> int:
    """Bytes of this process's first device's memory; of the machine's where a device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
