"""A small random data set."""

import numpy as np

from ltkd_jax.data.prepare import archives


def random_content(shape, num_classes, train=24, test=12, seed=0):
    """A small data set in the form that an archive is read to."""
    rng = np.random.default_rng(seed)
    splits = {
        split: (
            rng.integers(0, 256, (size, *shape), dtype=np.uint8),
            {"label": np.arange(size) % num_classes},
        )
        for split, size in (("train", train), ("test", test))
    }
    return archives.Content(splits, class_names={})
