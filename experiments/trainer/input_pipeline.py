"""The inputs of a run's steps, in order.

If the images are on the device, the inputs are indices of images; if they stay on disk,
the inputs are the images themselves. Each process reads only its devices' positions of
a global batch.

A call of the compiled function takes several steps. `call_sizes` has the number of
steps of each call; no call goes beyond the end of an epoch.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ltkd_jax.data import sampling, streaming
from ltkd_jax.data.records import Records
from ltkd_jax.training.steps import StepInputs


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """Describes this process's part of each global batch.

    Mixup mixes each image with its left neighbour in the global batch. The neighbour of
    the part's first image belongs to another process's part, so it is read, too.

    Attributes:
      positions: this process's positions in the global batch, consecutive numbers.
      batch_size: B, of the global batch.
      mixup: whether images are mixed.
    """

    positions: np.ndarray
    batch_size: int
    mixup: bool = False

    @property
    def to_read(self) -> np.ndarray:
        """The positions to read: `positions`, after the left neighbour under Mixup."""
        if not self.mixup:
            return self.positions
        # Modulo B: the left neighbour of a batch's first image is its last.
        neighbour = (self.positions[:1] - 1) % self.batch_size
        return np.concatenate([neighbour, self.positions])

    def inputs(self, train: Any, outer: Any = None) -> StepInputs:
        """Returns the inputs of S steps.

        Args:
          train: training batches, leaves `[S, len(to_read), …]`.
          outer: this process's part of the batches of the outer set.
        """
        if not self.mixup:
            return StepInputs(train, outer=outer)
        neighbours = jax.tree.map(lambda x: x[:, :-1], train)
        train = jax.tree.map(lambda x: x[:, 1:], train)
        return StepInputs(train, mixup=neighbours, outer=outer)


def from_memory(
    epoch_fn: Callable[[int, int], tuple[Any, Any]],
    seed: int,
    step: int,
    call_sizes: Sequence[int],
    *,
    steps_per_epoch: int,
    shard: BatchShard,
    outer_shard: BatchShard,
) -> Generator[StepInputs, None, None]:
    """Yields the inputs of each call, as arrays on the host.

    Args:
      epoch_fn: `(seed, epoch) -> (training indices, outer indices or None)` of the
        global batches, with leaves `[S, B, …]` for the S steps of an epoch.
      seed: of the run.
      step: the first step.
      call_sizes: the number of steps of each call.
      steps_per_epoch: of the run.
      shard: this process's part of each training batch.
      outer_shard: its part of each batch of the outer set, if there is one.
    """
    inputs = None
    inputs_epoch = None
    for size in call_sizes:
        epoch, start = divmod(step, steps_per_epoch)
        if epoch != inputs_epoch:
            # Copied to the host: slicing on the device would compile for every start.
            train, outer = jax.tree.map(np.asarray, epoch_fn(seed, epoch))
            train = jax.tree.map(lambda x: x[:, shard.to_read], train)
            outer = jax.tree.map(lambda x: x[:, outer_shard.positions], outer)
            inputs = shard.inputs(train, outer)
            inputs_epoch = epoch
        steps = slice(start, start + size)
        yield jax.tree.map(lambda x, steps=steps: x[steps], inputs)
        step += size


def from_disk(
    train: Records,
    outer: Records | None,
    seed: int,
    step: int,
    call_sizes: Sequence[int],
    *,
    shard: BatchShard,
    outer_shard: BatchShard,
    lookahead: int = 1,
    num_workers: int = 0,
) -> Generator[StepInputs, None, None]:
    """Yields the inputs of each call, with their images, as arrays on the host.

    Args:
      train: the training set.
      outer: the outer set; None if weights are static.
      seed, step, call_sizes, shard, outer_shard: see `from_memory`.
      lookahead: K, the number of batches that a step with learned weights reads.
      num_workers: the number of processes that decode, for each set.
    """
    num_steps = sum(call_sizes)
    with contextlib.ExitStack() as stack:

        def read(
            records: Records, seed: int, num_steps: int, shard: BatchShard
        ) -> Iterator[streaming.StreamedBatch]:
            return stack.enter_context(
                streaming.batches(
                    records,
                    seed=seed,
                    batch_size=shard.batch_size,
                    first_step=step,
                    num_steps=num_steps,
                    num_workers=num_workers,
                    positions=shard.to_read.tolist(),
                )
            )

        # The last step looks K − 1 batches ahead.
        batches = read(train, seed, num_steps + lookahead - 1, shard)
        if outer is None:
            for size in call_sizes:
                yield shard.inputs(_stack_next(batches, size))
            return
        outer_seed = int(sampling.outer_seed(seed))
        outer_batches = read(outer, outer_seed, num_steps, outer_shard)
        windows = _windows(batches, lookahead)
        for size in call_sizes:
            yield shard.inputs(
                _stack_next(windows, size), _stack_next(outer_batches, size)
            )


def _windows(batches: Iterator[Any], length: int) -> Iterator[Any]:
    """Yields each batch with those that follow it, leaves `[B, length, …]`."""
    window = collections.deque(itertools.islice(batches, length - 1), maxlen=length)
    for batch in batches:
        window.append(batch)
        yield _stack(window, axis=1)


def _stack_next(batches: Iterator[Any], number: int) -> Any:
    return _stack(itertools.islice(batches, number), axis=0)


def _stack(batches: Any, axis: int) -> Any:
    # np.stack copies, so no array in a worker's shared memory outlives the worker.
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=axis), *batches)


def prefetch(
    inputs: Generator[StepInputs, None, None],
    call_sizes: Sequence[int],
    put: Callable[[StepInputs], StepInputs],
) -> Generator[tuple[int, StepInputs], None, None]:
    """Yields the number of steps and the inputs of each call, on the devices.

    The inputs of the next call are sent while the last call is computed.

    Args:
      inputs: of each call, on the host; closed at the end.
      call_sizes: the number of steps of each call.
      put: sends inputs to the devices.
    """
    queue: collections.deque[tuple[int, StepInputs]] = collections.deque()
    with contextlib.closing(inputs):
        for size, call_inputs in zip(call_sizes, inputs):
            queue.append((size, put(call_inputs)))
            if len(queue) > 1:
                yield queue.popleft()
        yield from queue
