"""Evaluates a model on a set of images, batch by batch; each image counts once."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.trainer.dataset import Dataset
from ltkd_jax import metrics, models
from ltkd_jax.data import streaming
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training import steps
from ltkd_jax.training.parallel import Parallel


class Evaluator:
    """Evaluates one model on the sets of a data set.

    Args:
      model: without a device axis.
      data: for its preprocessing and sizes.
      parallel: the devices.
      batch_size: the largest global batch, rounded up to a multiple of the devices.
      temperature: by which the logits are divided.
    """

    def __init__(
        self,
        model: models.Model,
        data: Dataset,
        parallel: Parallel,
        batch_size: int,
        temperature: float = 1.0,
    ):
        self._data = data
        self._parallel = parallel
        # A batch larger than the largest set would be padding.
        size = min(batch_size, max(len(data.train), len(data.test)))
        num_devices = parallel.num_devices
        self._batch_size = -(-size // num_devices) * num_devices

        def eval_step(variables: Any, batch: steps.EvalBatch) -> metrics.EvalSums:
            return steps.eval_step(
                variables,
                batch,
                model=model,
                preprocess=data.preprocess,
                temperature=temperature,
                axis_name=parallel.axis_name,
            )

        self._eval_step = parallel.compile(eval_step, batch_axis=0)
        self._kept_batches: dict[str, list[steps.EvalBatch]] = {}

    def evaluate(self, variables: Any, images: Images | Records) -> metrics.EvalSums:
        """Returns the sums over a set of images.

        Args:
          variables: of the model, replicated.
          images: the set.
        """
        sums = []
        for batch in self._batches(images):
            sums.append(self._parallel.unreplicate(self._eval_step(variables, batch)))

        def add(*batch_sums: jax.Array) -> np.ndarray:
            # In float64: float32 would lose counts above 2²⁴.
            return np.sum([np.asarray(x, np.float64) for x in batch_sums], axis=0)

        return jax.tree.map(add, *sums)

    def lower(self, variables: Any, images: Images) -> Any:
        """Returns the evaluation of a batch, lowered as by `jax.jit(f).lower`.

        Args:
          variables: of the model; leaves have a shape and a dtype.
          images: the set.
        """
        positions = self._parallel.local_positions(self._batch_size)
        batch = next(padded_batches(images, self._batch_size, positions))
        describe = self._parallel.describe
        # What `compile` returns can be lowered, which the type of functions hides.
        eval_step: Any = self._eval_step
        return eval_step.lower(describe(variables), describe(batch, 0))

    def _batches(self, images: Images | Records) -> Iterable[steps.EvalBatch]:
        """Returns the batches of a set on the devices.

        Those of the test and the validation set stay there if they are in memory, since
        these sets are evaluated again and again during training.
        """
        sets = {"test": self._data.test, "validation": self._data.validation}
        for name, kept_images in sets.items():
            if images is kept_images and isinstance(images, Images):
                if name not in self._kept_batches:
                    self._kept_batches[name] = list(self._put_batches(images))
                return self._kept_batches[name]
        return self._put_batches(images)

    def _put_batches(self, images: Images | Records) -> Iterator[steps.EvalBatch]:
        positions = self._parallel.local_positions(self._batch_size)
        for batch in padded_batches(images, self._batch_size, positions):
            yield self._parallel.shard(batch, 0)


def padded_batches(
    images: Images | Records, batch_size: int, positions: np.ndarray
) -> Iterator[steps.EvalBatch]:
    """Yields a set of images in full batches; the last one is padded and masked.

    Args:
      images: the set.
      batch_size: of the global batch.
      positions: the positions of each global batch to read, such as those on the
        devices of this process.
    """
    num_examples = len(images)
    starts = np.arange(0, num_examples, batch_size)
    indices = starts[:, None] + positions[None, :]
    # The last image serves as padding.
    clipped = np.minimum(indices, num_examples - 1)
    batches: Iterable[Any]
    if isinstance(images, Records):
        batches = streaming.evaluation_batches(images, clipped)
    else:
        batches = (
            (images.images[batch_indices], images.labels[batch_indices])
            for batch_indices in clipped
        )
    for mask, (batch_images, labels) in zip(indices < num_examples, batches):
        yield steps.EvalBatch(batch_images, labels, mask)
