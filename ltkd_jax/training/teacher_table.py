"""The teacher's table: its logits for every view of every training image.

In evaluation mode, a teacher is a function of the view alone, and crops and flips have
few views (162 for CIFAR). So its logits are computed once and then looked up by
(image, view); they equal those of a teacher in the step up to rounding.
"""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ltkd_jax.data.sampling import BatchIndices

# Batches of the table that the device may have in its queue.
_MAX_PENDING = 4


def table_bytes(num_examples: int, num_views: int, num_classes: int) -> int:
    """Returns the size in bytes of a table in float32.

    >>> table_bytes(10_847, 162, 100)
    702885600
    """
    return 4 * num_examples * num_views * num_classes


def is_worthwhile(num_views: int, *, epochs: float, runs: int) -> bool:
    """Returns whether a table takes no more forward passes than it saves.

    Args:
      num_views: V, the forward passes per image that the table takes.
      epochs: of one run, the forward passes per image without a table.
      runs: number of runs that share the table.

    >>> is_worthwhile(162, epochs=240, runs=1), is_worthwhile(162, epochs=60, runs=2)
    (True, False)
    """
    return num_views <= epochs * runs


def batches(
    num_examples: int, num_views: int, batch_size: int, start: int = 0
) -> Iterator[tuple[int, BatchIndices]]:
    """Yields batches of all (image, view) pairs, with the number of the first pair.

    Pairs are numbered image by image: pair p is image p // V, view p % V. The last
    batch is filled up with the last pair, so that one compiled function fits all.

    Args:
      num_examples: N.
      num_views: V.
      batch_size: B.
      start: number of the first pair to yield.
    """
    num_pairs = num_examples * num_views
    for first in range(start, num_pairs, batch_size):
        pairs = np.minimum(np.arange(first, first + batch_size), num_pairs - 1)
        index, view = np.divmod(pairs, num_views)
        yield first, BatchIndices(index.astype(np.int32), view.astype(np.int32))


def build(
    logits_fn: Callable[[BatchIndices], jax.Array],
    out: np.ndarray,
    *,
    batch_size: int,
    start: int = 0,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> None:
    """Fills a table with the teacher's logits.

    Args:
      logits_fn: a compiled function from the indices of a batch to logits `[B, C]`.
      out: the table to fill, `[N, V, C]`; a memory map for example.
      batch_size: B.
      start: number of pairs that the table already has, see `batches`.
      on_batch: called after each batch with the number of pairs that the table has.
    """
    num_examples, num_views, num_classes = out.shape
    num_pairs = num_examples * num_views
    # A view of the same memory, with one row for each pair.
    flat_table = out.reshape(-1, num_classes)
    pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def write_oldest() -> None:
        first, logits = pending.popleft()
        stop = min(first + batch_size, num_pairs)
        # `np.asarray` waits for the device; the padding of the last batch is cut off.
        flat_table[first:stop] = np.asarray(logits)[: stop - first]
        on_batch(stop)

    for first, indices in batches(num_examples, num_views, batch_size, start):
        # JAX returns before the logits are computed. With some batches pending, the
        # device computes while the host writes.
        pending.append((first, logits_fn(indices)))
        if len(pending) > _MAX_PENDING:
            write_oldest()
    while pending:
        write_oldest()
