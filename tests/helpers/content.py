"""A small random data set, and a pickle that runs code."""

import os

import numpy as np

from ltkd_jax.data.prepare import archives


def random_content(shape, num_classes, train=24, test=12, seed=0):
    """Returns a small data set as `archives` reads one."""
    rng = np.random.default_rng(seed)
    splits = {}
    for split, size in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        splits[split] = images, {"label": np.arange(size) % num_classes}
    return archives.DecodedImages(splits, class_names={})


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)
