"""What the steps of a run read, in order: indices into images on the device, or batches of images that stay on disk.

Of each global batch a process reads the positions of its own devices. A call of the compiled function takes several
steps at a time, `call_sizes`, none beyond an epoch's end.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from ltkd_jax.data import streaming
from ltkd_jax.data.records import Records
from ltkd_jax.training.steps import StepInputs


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """This process's part of a global batch.

    With Mixup each image is mixed with its left neighbour in the batch, so that the first one's is read too.

    Attributes:
      positions: of this process's devices in the global batch, one run of numbers.
      batch_size: B, of the global batch.
      mixup: whether images are mixed.
    """

    positions: np.ndarray
    batch_size: int
    mixup: bool = False

    @property
    def to_read(self) -> np.ndarray:
        """The positions to read: with the neighbour of the first in front, where images are mixed."""
        if not self.mixup:
            return self.positions
        return (
            np.concatenate([self.positions[:1] - 1, self.positions]) % self.batch_size
        )

    def inputs(self, train, outer=None) -> StepInputs:
        """Returns the steps' inputs from leaves `[S, len(to_read), …]`."""
        if not self.mixup:
            return StepInputs(train, outer=outer)
        own = jax.tree.map(lambda x: x[:, 1:], train)
        neighbours = jax.tree.map(lambda x: x[:, :-1], train)
        return StepInputs(own, mixup=neighbours, outer=outer)


def from_memory(
    epoch_fn: Callable,
    seed: int,
    step: int,
    call_sizes: Sequence[int],
    *,
    steps_per_epoch: int,
    shard: BatchShard,
) -> Iterator[StepInputs]:
    """Yields the inputs of each call, on the host.

    Args:
      epoch_fn: `(seed, epoch) -> (training indices, those of the outer set or None)`, of the global batch, with leaves
        `[S, B, …]` for the S steps of an epoch.
      seed: of the run.
      step: from which on.
      call_sizes: steps of each call.
      steps_per_epoch: of the run.
      shard: this process's part of each batch.
    """
    drawn_epoch = None
    for size in call_sizes:
        epoch, first = divmod(step, steps_per_epoch)
        if epoch != drawn_epoch:
            train, outer = jax.tree.map(np.asarray, epoch_fn(seed, epoch))
            train = jax.tree.map(lambda x: x[:, shard.to_read], train)
            outer = jax.tree.map(lambda x: x[:, shard.positions], outer)
            inputs, drawn_epoch = shard.inputs(train, outer), epoch
        yield jax.tree.map(lambda x, part=slice(first, first + size): x[part], inputs)
        step += size


def from_disk(
    train: Records,
    outer: Records | None,
    seed: int,
    step: int,
    call_sizes: Sequence[int],
    *,
    shard: BatchShard,
    lookahead: int = 1,
    num_workers: int = 0,
) -> Iterator[StepInputs]:
    """Yields the inputs of each call, on the host, with the images in them.

    Args:
      train, outer: the sets; `outer` is None where weights are static.
      seed, step, call_sizes, shard: as `from_memory`.
      lookahead: K, batches that a step with learned weights looks at.
      num_workers: processes that decode, for each set.
    """
    num_steps = sum(call_sizes)
    reading = dict(
        first_step=step, batch_size=shard.batch_size, num_workers=num_workers
    )
    with contextlib.ExitStack() as stack:

        def batches(records, **options):
            return stack.enter_context(streaming.batches(records, **reading, **options))

        num_read = num_steps + lookahead - 1
        train_batches = batches(
            train, seed=seed, num_steps=num_read, positions=shard.to_read
        )
        if outer is None:
            for size in call_sizes:
                yield shard.inputs(_stack([next(train_batches) for _ in range(size)]))
            return
        outer_seed = int(np.random.SeedSequence((seed, 2)).generate_state(1)[0])
        outer_batches = batches(
            outer, seed=outer_seed, num_steps=num_steps, positions=shard.positions
        )
        window = collections.deque(
            (next(train_batches) for _ in range(lookahead - 1)), maxlen=lookahead
        )
        for size in call_sizes:
            windows = []
            for _ in range(size):
                window.append(next(train_batches))
                windows.append(_stack(list(window), axis=1))
            yield shard.inputs(
                _stack(windows), _stack([next(outer_batches) for _ in range(size)])
            )


def _stack(batches, axis=0):
    # Copies, so that no array of a worker's shared memory is kept.
    return jax.tree.map(lambda *parts: np.stack(parts, axis=axis), *batches)


def prefetch(
    inputs: Iterator[StepInputs],
    call_sizes: Sequence[int],
    put: Callable[[StepInputs], StepInputs],
) -> Iterator[tuple[int, StepInputs]]:
    """Yields (steps, inputs on the devices) of each call; the next one is sent while the last is computed.

    Args:
      inputs: of each call, on the host; closed at the end.
      call_sizes: steps of each call.
      put: host -> devices.
    """
    queue = collections.deque()
    with contextlib.closing(inputs):
        for size, call_inputs in zip(call_sizes, inputs):
            queue.append((size, put(call_inputs)))
            if len(queue) > 1:
                yield queue.popleft()
        yield from queue
