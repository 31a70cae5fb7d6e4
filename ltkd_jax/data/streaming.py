"""Batches of images that stay on disk: read, cropped and stacked by Grain, beside the step that uses them.

A batch is a function of (seed, step) alone, so a stream has no position but the step: it starts anywhere, with any
number of workers, and gives the same bytes.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ltkd_jax.data.records import Records
from ltkd_jax.data.sampling import Array, steps_per_epoch

_THREADS = min(16, os.cpu_count() or 4)  # as many batches are read side by side, and wait, decoded
_AHEAD = 2  # batches that each worker keeps ready


class Streamed(NamedTuple):
    """A batch of training views, each a random resized crop; leaves `[B, …]`."""

    images: Array  # uint8 [B, H, W, C]
    labels: Array  # int32 [B]
    bits: Array  # uint32 [B], for what is drawn on the device


@dataclasses.dataclass(frozen=True)
class Order:
    """Which image stands at which position of the endless stream, and what is drawn for it.

    As `plan.epoch_plan`: an epoch is ceil(N / B) full batches, a permutation filled up from the next one. Permutations
    are computed entry by entry, so that they take no memory whatever N is.

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
    _shuffled: Any = dataclasses.field(init=False, repr=False, compare=False)  # of Grain

    def __post_init__(self) -> None:
        import grain

        order = grain.MapDataset.range(self.num_examples).seed(self.seed).shuffle().repeat()
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
    places: tuple[int, ...]  # of each batch that this process reads

    def __call__(self, number: int) -> Streamed:
        step, place = divmod(number, len(self.places))
        position = step * self.order.batch_size + self.places[place]
        index, rng = self.order.index(position), self.order.rng(position)
        image = self.records.crop(index, rng)
        return Streamed(image, self.records.labels[index], np.asarray(rng.integers(2**32, dtype=np.uint32)))


@contextlib.contextmanager
def batches(
    records: Records,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    num_steps: int,
    workers: int = 0,
    places: Sequence[int] | None = None,
) -> Iterator[Iterator[Streamed]]:
    """The batches of `num_steps` steps from a step on; a context, since it may run processes.

    Args:
      records: the training set.
      seed: of order, crops and flips.
      batch_size: B, of the global batch.
      first_step: of the stream, from which to go on.
      num_steps: how many batches.
      workers: processes that decode; 0 does it by threads of this one.
      places: of each batch that are read, such as those of one of several processes; all unless given.

    Raises:
      ValueError: nothing to read, or places that a batch does not have. On the way, an image that does not decode.
    """
    import grain

    places = tuple(range(batch_size) if places is None else map(int, places))
    share = len(places)
    if not places or not all(0 <= place < batch_size for place in places):
        raise ValueError(f"places={places}: a batch of {batch_size} has those from 0 to {batch_size - 1}")
    if not len(records) or min(seed, first_step, workers) < 0:
        raise ValueError(
            f"{len(records)} images, seed={seed}, first_step={first_step}, workers={workers}: there must be an image, "
            "and nothing may be negative"
        )
    views = _Views(records, Order(seed, len(records), batch_size), places)
    numbers = grain.MapDataset.range(first_step * share, (first_step + num_steps) * share)
    threads = 0 if workers else _THREADS
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    stream = numbers.map(views).batch(share).to_iter_dataset(read)
    if workers:
        _parse_flags()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD))
    with _ignored_by_children(signal.SIGINT, signal.SIGTERM) if workers else contextlib.nullcontext():
        iterator = iter(stream)
        iterator.start_prefetch()
    try:
        yield iterator
    finally:
        iterator.close()


@contextlib.contextmanager
def _ignored_by_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that start meanwhile do not hear these signals: sent to the group, they are for the program."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a signal's handler can be set in the main thread alone
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _parse_flags() -> None:
    """Grain's workers read absl's flags, which a program that has none of its own never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def in_order(records: Records, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images as they are evaluated, in batches (images, labels): of each row of numbers `[S, B]`, one."""
    import grain

    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    examples = grain.MapDataset.source(rows.ravel()).map(lambda i: (records.image(int(i)), records.labels[i]))
    with contextlib.closing(iter(examples.batch(rows.shape[1]).to_iter_dataset(read))) as iterator:
        yield from iterator
