"""Evaluation of a model on a set of images, batch by batch, each example counted once."""

from collections.abc import Iterator

import jax
import numpy as np

from experiments.trainer.dataset import Dataset
from ltkd_jax import metrics
from ltkd_jax.data import streaming
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training import steps
from ltkd_jax.training.parallel import Parallel


class Evaluator:
    """Evaluates one model on any set of a data set.

    Args:
      model: without a device axis.
      data: for its preprocessing and sizes.
      parallel: the devices.
      batch_size: at most; rounded up to a multiple of the devices.
    """

    def __init__(self, model, data: Dataset, parallel: Parallel, batch_size: int):
        self._parallel = parallel
        largest = min(batch_size, max(len(data.train), len(data.test)))
        self._batch_size = -(-largest // parallel.num_devices) * parallel.num_devices

        def eval_step(variables, batch):
            return steps.eval_step(
                variables,
                batch,
                model=model,
                preprocess=data.preprocess,
                axis_name=parallel.axis_name,
            )

        self._eval_step = parallel.compile(eval_step, batch_axis=0)
        self._on_device = {}

    def evaluate(self, variables, images: Images | Records) -> metrics.EvalSums:
        """Returns the sums over a set; `variables` are replicated."""
        sums = [
            self._parallel.unreplicate(self._eval_step(variables, batch))
            for batch in self._batches(images)
        ]
        return jax.tree.map(
            lambda *parts: np.sum([np.asarray(x, np.float64) for x in parts], axis=0),
            *sums,
        )

    def _batches(self, images):
        """Returns the batches on the devices, where images of the memory stay from the first call on."""
        if isinstance(images, Records):
            return self._put_batches(images)
        if id(images) not in self._on_device:
            # The images are held too: were they freed, another set could get their id.
            self._on_device[id(images)] = images, list(self._put_batches(images))
        return self._on_device[id(images)][1]

    def _put_batches(self, images):
        positions = self._parallel.local_positions(self._batch_size)
        for batch in padded_batches(images, self._batch_size, positions):
            yield self._parallel.shard(batch, 0)


def padded_batches(
    images: Images | Records, batch_size: int, positions: np.ndarray
) -> Iterator[steps.EvalBatch]:
    """Yields a set in full batches, the last one padded with images that are masked out.

    Args:
      images: the set.
      batch_size: of the global batch.
      positions: of each batch that are read, such as those of one of several processes.
    """
    count = len(images)
    indices = np.arange(0, count, batch_size)[:, None] + positions[None, :]
    clipped = np.minimum(indices, count - 1)
    if isinstance(images, Records):
        batches = streaming.evaluation_batches(images, clipped)
    else:
        batches = ((images.images[row], images.labels[row]) for row in clipped)
    for mask, batch in zip(indices < count, batches):
        yield steps.EvalBatch(*batch, mask)
