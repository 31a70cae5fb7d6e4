"""Streams batches of images that stay on disk.

Grain reads, crops and stacks them while the training step runs. A batch is a function
of the seed and the step only. So a stream has no position to save: it starts at any
step, with any number of workers, and gives the same bytes.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np

from ltkd_jax.data.records import Records
from ltkd_jax.data.sampling import Array, steps_per_epoch

# Without workers, as many threads read a batch each, and as many batches are ready.
_NUM_THREADS = min(16, os.cpu_count() or 4)
_PREFETCH_PER_WORKER = 2  # batches
# Exit status of a worker that runs the script which started it.
_RUNS_SCRIPT = 76


class WorkerError(RuntimeError):
    """Reports a worker process that ended before its stream did."""


class StreamedBatch(NamedTuple):
    """Holds a batch of training views, each a random crop; leaves `[B, …]`.

    Attributes:
      images: uint8 `[B, H, W, channels]`.
      labels: int32 `[B]`.
      random_bits: uint32 `[B]`, the randomness of what is drawn on the device.
    """

    images: Array
    labels: Array
    random_bits: Array


@dataclasses.dataclass(frozen=True)
class Order:
    """Describes which image is at each position of the endless stream, and its seed.

    Position s · B + i is image i of batch s. As in `sampling.epoch_indices`, an epoch
    is ceil(N / B) full batches: a permutation, filled with the first images of the next
    one. Permutations are computed one entry at a time, so they take no memory.

    Attributes:
      seed: of the order and of all that is drawn for the images.
      num_examples: N.
      batch_size: B, of the global batch.

    >>> order = Order(seed=0, num_examples=5, batch_size=3)
    >>> sorted(order.index(position) for position in range(5))
    [0, 1, 2, 3, 4]
    >>> order.index(5) == order.index(6)  # the filling, and the next epoch
    True
    """

    seed: int
    num_examples: int
    batch_size: int
    # Grain's data set of all permutations, one after the other.
    _permutations: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import grain

        examples = grain.MapDataset.range(self.num_examples).seed(self.seed)
        # `repeat` after `shuffle` shuffles every repetition anew.
        permutations = examples.shuffle().repeat()
        # The only way to set a field of a frozen dataclass.
        object.__setattr__(self, "_permutations", permutations)

    def index(self, position: int) -> int:
        """Returns the index of the image at a position."""
        num_steps = steps_per_epoch(self.num_examples, self.batch_size)
        epoch, offset = divmod(position, num_steps * self.batch_size)
        # Beyond N, the offset runs into the next permutation, which fills the epoch.
        return self._permutations[epoch * self.num_examples + offset]

    def rng(self, position: int) -> np.random.Generator:
        """Returns the generator from which the view at a position is drawn."""
        return np.random.default_rng((self.seed, position))


@dataclasses.dataclass(frozen=True)
class _ViewReader:
    """Reads the training views of examples; it is pickled into Grain's workers.

    Attributes:
      records: the training set.
      order: of the stream.
      positions: those of each batch that this process reads.
    """

    records: Records
    order: Order
    positions: tuple[int, ...]

    def __call__(self, example: int) -> StreamedBatch:
        """Returns one view, as leaves without the axis B.

        Args:
          example: counts the examples that this process reads from step 0 on.
        """
        step, i = divmod(example, len(self.positions))
        position = step * self.order.batch_size + self.positions[i]
        index = self.order.index(position)
        rng = self.order.rng(position)
        image = self.records.random_crop(index, rng)
        # From the same generator: the stream depends on the order of these two draws.
        random_bits = np.asarray(rng.integers(2**32, dtype=np.uint32))
        return StreamedBatch(image, self.records.labels[index], random_bits)


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
    """Yields an iterator over the batches of consecutive steps.

    It is a context manager, which ends the reader's threads and processes.

    Args:
      records: the training set.
      seed: of the order, the crops and the flips.
      batch_size: B, of the global batch.
      first_step: the first step to read, counted from the start of epoch 0.
      num_steps: number of batches.
      num_workers: number of processes that decode; 0 decodes in threads of this one.
      positions: which positions of each batch to read, such as those of one of several
        processes; None reads all.

    Raises:
      ValueError: there are no images, an argument is negative, or a position is not in
        0 to B − 1. The iterator raises it for an image that does not decode.
      WorkerError: a worker was killed, or could not start. A script that starts workers
        must do so under `if __name__ == "__main__":`, since each worker imports it.
    """
    import grain

    positions = tuple(range(batch_size) if positions is None else map(int, positions))
    local_batch_size = len(positions)
    if not positions or not all(0 <= position < batch_size for position in positions):
        raise ValueError(
            f"positions={positions}: a batch of {batch_size} has those from 0 to "
            f"{batch_size - 1}"
        )
    if not len(records) or min(seed, first_step, num_workers) < 0:
        raise ValueError(
            f"{len(records)} images, seed={seed}, first_step={first_step}, "
            f"num_workers={num_workers}: there must be an image, and nothing may be "
            "negative"
        )
    order = Order(seed, len(records), batch_size)
    examples = grain.MapDataset.range(
        first_step * local_batch_size, (first_step + num_steps) * local_batch_size
    )
    views = examples.map(_ViewReader(records, order, positions))
    # With workers, each of them reads in the one thread of its own process.
    num_threads = 0 if num_workers else _NUM_THREADS
    stream = views.batch(local_batch_size).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    )
    if num_workers:
        exit_from_worker()
        _parse_flags()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers, per_worker_buffer_size=_PREFETCH_PER_WORKER
            )
        )
    iterator = iter(stream)
    batches = _with_worker_errors(iterator)
    try:
        # Grain starts its workers when the first batch is requested, in threads that it
        # starts then, too. Both inherit the blocked signals.
        with _blocked_signals() if num_workers else contextlib.nullcontext():
            first_batch = list(itertools.islice(batches, 1))
        # The batch's memory is shared with a worker, so it must not outlive the block:
        # popped from its list, it is referenced by the caller only.
        popped = (first_batch.pop() for _ in range(len(first_batch)))
        yield itertools.chain(popped, batches)
    finally:
        iterator.close()


def exit_from_worker() -> None:
    """Ends this process if it is a worker that runs the script which started it.

    A worker imports that script. Without `if __name__ == "__main__":` it would repeat
    all that the script does, with workers of its own, while the stream waits for it.
    """
    # The flag by which multiprocessing itself refuses to start processes there.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_RUNS_SCRIPT)


def _with_worker_errors(batches: Iterator[StreamedBatch]) -> Iterator[StreamedBatch]:
    """Yields the batches, and raises WorkerError once a worker has ended."""
    try:
        yield from batches
    except RuntimeError as error:
        status = re.search(r"Worker process .* exit code (-?\d+)", str(error))
        if status is None:
            raise
        raise WorkerError(_describe_end(int(status[1]))) from None


def _describe_end(status: int) -> str:
    """Returns why a worker has ended, from its exit status, and the remedy."""
    if status < 0:
        return (
            "a worker that reads the stream was killed by "
            f"{signal.Signals(-status).name}, as the system does if memory runs out: "
            "start again, with fewer workers (num_workers), or 0 for threads"
        )
    guard = (
        'put what the script does under `if __name__ == "__main__":`, since each '
        "worker imports it, or set num_workers to 0"
    )
    if status == _RUNS_SCRIPT:
        return f"a worker that reads the stream ran the script again: {guard}"
    return (
        f"a worker that reads the stream ended with exit status {status}, and its "
        f"error is above; if it ran the script again, {guard}"
    )


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT, also in threads and processes that the block starts.

    This thread unblocks them when the block ends; the threads and processes that it
    started never do. So a signal to the process group does not end a worker. Only the
    main process handles it, which needs its workers until it stops.
    """
    # The first process would start it otherwise, and it unblocks both signals.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _parse_flags() -> None:
    """Marks absl's flags as parsed, which Grain's workers read."""
    from absl import flags

    # A program without flags of its own never parses them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def evaluation_batches(
    records: Records, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the images and labels of an evaluation, batch by batch, in order.

    Args:
      records: the images.
      indices: integers `[S, B]`, of the images of each batch.

    Yields:
      (images uint8 `[B, H, W, channels]`, labels int32 `[B]`), S times.
    """
    import grain

    def read(index: Any) -> tuple[np.ndarray, np.ndarray]:
        return records.image(int(index)), records.labels[index]

    options = grain.ReadOptions(
        num_threads=_NUM_THREADS, prefetch_buffer_size=_NUM_THREADS
    )
    examples = grain.MapDataset.source(indices.ravel()).map(read)
    stream = examples.batch(indices.shape[1]).to_iter_dataset(options)
    with contextlib.closing(iter(stream)) as iterator:
        yield from iterator
