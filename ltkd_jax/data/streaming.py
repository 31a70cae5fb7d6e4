"""Batches of images that stay on disk: read, cropped and stacked by Grain, beside the step that uses them.

A batch is a function of (seed, step) alone, so a stream has no position but the step: it starts anywhere, with any
number of workers, and gives the same bytes.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np

from ltkd_jax.data.records import Records
from ltkd_jax.data.sampling import Array, steps_per_epoch

_THREADS = min(
    16, os.cpu_count() or 4
)  # as many batches are read side by side, and wait, decoded
_PREFETCH = 2  # batches that each worker keeps ready


class StreamedBatch(NamedTuple):
    """A batch of training views, each a random resized crop; leaves `[B, …]`."""

    images: Array  # uint8 [B, H, W, C]
    labels: Array  # int32 [B]
    random_bits: Array  # uint32 [B], for what is drawn on the device


@dataclasses.dataclass(frozen=True)
class Order:
    """Which image stands at which position of the endless stream, and what is drawn for it.

    As `sampling.epoch_indices`: an epoch is ceil(N / B) full batches, a permutation filled up from the next one.
    Permutations are computed entry by entry, so that they take no memory whatever N is.

    Attributes:
      seed: of the order and of all that is drawn.
      num_examples: N.
      batch_size: B, of the global batch.

    >>> order = Order(seed=0, num_examples=5, batch_size=3)
    >>> sorted(order.index(position) for position in range(5)), order.index(5) == order.index(6)
    ([0, 1, 2, 3, 4], True)
    """

    seed: int
    num_examples: int
    batch_size: int
    _shuffled: Any = dataclasses.field(
        init=False, repr=False, compare=False
    )  # of Grain

    def __post_init__(self) -> None:
        import grain

        order = (
            grain.MapDataset.range(self.num_examples).seed(self.seed).shuffle().repeat()
        )
        object.__setattr__(self, "_shuffled", order)

    def index(self, position: int) -> int:
        """The image at a position: at place p of batch s for s · B + p."""
        of_epoch = steps_per_epoch(self.num_examples, self.batch_size) * self.batch_size
        epoch, offset = divmod(position, of_epoch)
        return self._shuffled[epoch * self.num_examples + offset]

    def rng(self, position: int) -> np.random.Generator:
        """From which the view at a position is drawn."""
        return np.random.default_rng((self.seed, position))


@dataclasses.dataclass(frozen=True)
class _Views:
    """What Grain maps over: the number of an example of this process to the example."""

    records: Records
    order: Order
    positions: tuple[int, ...]  # of each batch that this process reads

    def __call__(self, number: int) -> StreamedBatch:
        step, i = divmod(number, len(self.positions))
        position = step * self.order.batch_size + self.positions[i]
        index, rng = self.order.index(position), self.order.rng(position)
        image = self.records.crop(index, rng)
        return StreamedBatch(
            image,
            self.records.labels[index],
            np.asarray(rng.integers(2**32, dtype=np.uint32)),
        )


@contextlib.contextmanager
def batches(
    records: Records,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    num_steps: int,
    num_workers: int = 0,
    positions: Sequence[int] | None = None,
) -> Iterator[Iterator[StreamedBatch]]:
    """The batches of `num_steps` steps from a step on; a context, since it may run processes.

    Args:
      records: the training set.
      seed: of order, crops and flips.
      batch_size: B, of the global batch.
      first_step: of the stream, from which to go on.
      num_steps: how many batches.
      num_workers: processes that decode; 0 does it by threads of this one.
      positions: of each batch that are read, such as those of one of several processes; all by default.

    Raises:
      ValueError: nothing to read, or positions that a batch does not have. On the way, an image that does not decode.
    """
    import grain

    positions = tuple(range(batch_size) if positions is None else map(int, positions))
    share = len(positions)
    if not positions or not all(0 <= position < batch_size for position in positions):
        raise ValueError(
            f"positions={positions}: a batch of {batch_size} has those from 0 to {batch_size - 1}"
        )
    if not len(records) or min(seed, first_step, num_workers) < 0:
        raise ValueError(
            f"{len(records)} images, seed={seed}, first_step={first_step}, num_workers={num_workers}: there must be "
            "an image, and nothing may be negative"
        )
    views = _Views(records, Order(seed, len(records), batch_size), positions)
    numbers = grain.MapDataset.range(
        first_step * share, (first_step + num_steps) * share
    )
    threads = 0 if num_workers else _THREADS
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    stream = numbers.map(views).batch(share).to_iter_dataset(read)
    if num_workers:
        _parse_flags()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_PREFETCH)
        )
    iterator = iter(stream)
    try:
        # Grain starts its workers for the first batch, in threads that start then too, and all inherit the mask.
        with _blocked_signals() if num_workers else contextlib.nullcontext():
            first = list(itertools.islice(iterator, 1))
        # Taken out, since its memory is shared with a worker: it must not outlive the block.
        yield itertools.chain((first.pop() for _ in range(len(first))), iterator)
    finally:
        iterator.close()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT in this thread, and for good in the threads and processes that it starts meanwhile.

    A signal to the whole process group is for the program alone, and reaches it when the block ends.
    """
    resource_tracker.ensure_running()  # started later, by the first process, it would unblock them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _parse_flags() -> None:
    """Grain's workers read absl's flags, which a program that has none of its own never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def in_order(
    records: Records, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (images, labels) as they are evaluated, a batch for each row of `indices` `[S, B]`."""
    import grain

    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    examples = grain.MapDataset.source(indices.ravel()).map(
        lambda i: (records.image(int(i)), records.labels[i])
    )
    with contextlib.closing(
        iter(examples.batch(indices.shape[1]).to_iter_dataset(read))
    ) as iterator:
        yield from iterator
