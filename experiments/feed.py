"""What a run's steps read, in order: rows of images that live on the device, or batches of images that stay on disk."""

import collections
import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from ltkd_jax.data import stream
from ltkd_jax.training import bilevel_steps, steps


class FromMemory:
    """Rows of numbers into a set on the device.

    Args:
      plan: `(seed, epoch) -> rows`, a pytree of leaves `[steps, B, …]`.
      steps_per_epoch: of the run.
    """

    def __init__(self, plan, steps_per_epoch: int):
        self._plan, self._steps_per_epoch = plan, steps_per_epoch

    def rows(self, seed: int, step: int, sizes) -> Iterator:
        """Rows of so many steps each, on the host, from a step on; none goes over an epoch's end."""
        plan, planned = None, None
        for size in sizes:
            epoch, row = divmod(step, self._steps_per_epoch)
            if epoch != planned:
                plan, planned = jax.tree.map(np.asarray, self._plan(seed, epoch)), epoch
            yield jax.tree.map(lambda x, row=row, size=size: x[row : row + size], plan)
            step += size


class FromDisk:
    """Batches of images from disk, `stream.Streamed` of leaves `[steps, B, …]`, with a meta set `BilevelRows` of them.

    Args:
      train, meta: `records.Records`; no meta set is None.
      batch_size: B.
      total_steps: of the run.
      ahead: K, batches that a step with learned weights looks at.
      workers: processes that decode, for each set.
    """

    def __init__(self, train, meta, *, batch_size: int, total_steps: int, ahead: int = 1, workers: int = 0):
        self._train, self._meta, self._ahead = train, meta, ahead
        self._total_steps = total_steps
        self._reading = dict(batch_size=batch_size, workers=workers)

    def rows(self, seed: int, step: int, sizes) -> Iterator:
        """As `FromMemory.rows`."""
        num_steps = self._total_steps - step
        with contextlib.ExitStack() as stack:

            def batches(records, seed, num_steps):
                reading = dict(seed=seed, first_step=step, num_steps=num_steps, **self._reading)
                return stack.enter_context(stream.batches(records, **reading))

            train = batches(self._train, seed, num_steps + self._ahead - 1)
            if self._meta is None:
                for size in sizes:
                    yield _stack([next(train) for _ in range(size)])
                return
            meta_seed = int(np.random.SeedSequence((seed, 2)).generate_state(1)[0])
            meta = batches(self._meta, meta_seed, num_steps)
            window = collections.deque((next(train) for _ in range(self._ahead - 1)), maxlen=self._ahead)
            for size in sizes:
                looked_at = []
                for _ in range(size):
                    window.append(next(train))
                    looked_at.append(_stack(list(window), axis=1))
                yield bilevel_steps.BilevelRows(_stack(looked_at), _stack([next(meta) for _ in range(size)]))


def _stack(batches, axis=0):
    # Copies, so that no array of a worker's shared memory is kept.
    return jax.tree.map(lambda *parts: np.stack(parts, axis=axis), *batches)


def paired(rows):
    """Rows with the partners that Mixup mixes them with: each image's neighbour in the global batch."""
    if isinstance(rows, bilevel_steps.BilevelRows):
        return rows._replace(train=paired(rows.train))
    return steps.Paired(rows, jax.tree.map(lambda x: np.roll(x, 1, axis=1), rows))


def chunks(source, seed: int, step: int, sizes, *, place, mixes: bool) -> Iterator[tuple[int, object]]:
    """(steps, rows on the devices) of each chunk, the next one sent while the last is computed.

    Args:
      source: `FromMemory` or `FromDisk`.
      seed, step: of the run; from which step on.
      sizes: list of the numbers of steps of the chunks.
      place: rows on the host -> rows on the devices.
      mixes: whether rows are `paired`.
    """
    ahead = collections.deque()
    with contextlib.closing(source.rows(seed, step, sizes)) as found:
        for size, rows in zip(sizes, found):
            ahead.append((size, place(paired(rows) if mixes else rows)))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead
