"""What a run's steps read, in order: rows of images that live on the device, or batches of images that stay on disk.

Of each global batch a process reads what stands at the places of its own devices.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from ltkd_jax.data import streaming
from ltkd_jax.training import bilevel_steps, steps


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a global batch this process's devices stand, and whether Mixup mixes each image with its neighbour.

    Attributes:
      own: positions, in order.
      batch_size: B, of the global batch.
      mixes: whether training rows are `steps.Paired`.
    """

    own: np.ndarray
    batch_size: int
    mixes: bool = False

    @property
    def to_train(self) -> np.ndarray:
        """The places to read of the training stream: with the neighbour of the first in front, where it mixes."""
        return np.concatenate([self.own[:1] - 1, self.own]) % self.batch_size if self.mixes else self.own

    def paired(self, rows):
        """Rows of `to_train`, leaves `[steps, places, …]`, as the step takes them."""
        if not self.mixes:
            return rows
        return steps.Paired(jax.tree.map(lambda x: x[:, 1:], rows), jax.tree.map(lambda x: x[:, :-1], rows))


class FromMemory:
    """Rows of numbers into a set on the device.

    Args:
      plan: `(seed, epoch) -> rows`, a pytree of leaves `[steps, B, …]`.
      steps_per_epoch: of the run.
      places: which of each batch are this process's.
    """

    def __init__(self, plan, steps_per_epoch: int, places: Places):
        self._plan, self._steps_per_epoch, self._places = plan, steps_per_epoch, places

    def rows(self, seed: int, step: int, sizes) -> Iterator:
        """Rows of so many steps each, on the host, from a step on; none goes over an epoch's end."""
        plan, planned = None, None
        for size in sizes:
            epoch, row = divmod(step, self._steps_per_epoch)
            if epoch != planned:
                plan, planned = self._mine(jax.tree.map(np.asarray, self._plan(seed, epoch))), epoch
            yield jax.tree.map(lambda x, row=row, size=size: x[row : row + size], plan)
            step += size

    def _mine(self, plan):
        def at(places, rows):
            return jax.tree.map(lambda x: x[:, places], rows)

        if isinstance(plan, bilevel_steps.BilevelRows):
            return plan._replace(train=self._mine(plan.train), meta=at(self._places.own, plan.meta))
        return self._places.paired(at(self._places.to_train, plan))


class FromDisk:
    """Batches of images from disk, `stream.Streamed` of leaves `[steps, B, …]`, with a meta set `BilevelRows` of them.

    Args:
      train, meta: `records.Records`; no meta set is None.
      places: which of each batch are this process's: no other is read.
      total_steps: of the run.
      ahead: K, batches that a step with learned weights looks at.
      workers: processes that decode, for each set.
    """

    def __init__(self, train, meta, *, places: Places, total_steps: int, ahead: int = 1, workers: int = 0):
        self._train, self._meta, self._places, self._ahead = train, meta, places, ahead
        self._total_steps, self._workers = total_steps, workers

    def rows(self, seed: int, step: int, sizes) -> Iterator:
        """As `FromMemory.rows`."""
        num_steps = self._total_steps - step
        reading = dict(first_step=step, batch_size=self._places.batch_size, workers=self._workers)
        with contextlib.ExitStack() as stack:

            def batches(records, **options):
                return stack.enter_context(streaming.batches(records, **reading, **options))

            places = self._places.to_train
            train = batches(self._train, seed=seed, num_steps=num_steps + self._ahead - 1, places=places)
            if self._meta is None:
                for size in sizes:
                    yield self._places.paired(_stack([next(train) for _ in range(size)]))
                return
            meta_seed = int(np.random.SeedSequence((seed, 2)).generate_state(1)[0])
            meta = batches(self._meta, seed=meta_seed, num_steps=num_steps, places=self._places.own)
            window = collections.deque((next(train) for _ in range(self._ahead - 1)), maxlen=self._ahead)
            for size in sizes:
                looked_at = []
                for _ in range(size):
                    window.append(next(train))
                    looked_at.append(_stack(list(window), axis=1))
                rows = self._places.paired(_stack(looked_at))
                yield bilevel_steps.BilevelRows(rows, _stack([next(meta) for _ in range(size)]))


def _stack(batches, axis=0):
    # Copies, so that no array of a worker's shared memory is kept.
    return jax.tree.map(lambda *parts: np.stack(parts, axis=axis), *batches)


def chunks(source, seed: int, step: int, sizes, *, place) -> Iterator[tuple[int, object]]:
    """(steps, rows on the devices) of each chunk, the next one sent while the last is computed.

    Args:
      source: `FromMemory` or `FromDisk`.
      seed, step: of the run; from which step on.
      sizes: list of the numbers of steps of the chunks.
      place: rows on the host -> rows on the devices.
    """
    ahead = collections.deque()
    with contextlib.closing(source.rows(seed, step, sizes)) as found:
        for size, rows in zip(sizes, found):
            ahead.append((size, place(rows)))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead
