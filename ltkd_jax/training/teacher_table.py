"""The teacher's table: its logits for every view of every training image, computed once.

An evaluation-mode teacher is a function of the view, and crops and flips are few (162 for CIFAR). Looked up by
(image, view), its logits are those of the teacher in the step, up to rounding.
"""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ltkd_jax.data.sampling import BatchIndices


def table_bytes(num_examples: int, num_views: int, num_classes: int) -> int:
    """Returns the size of the table in float32, in bytes.

    >>> table_bytes(10_847, 162, 100)
    702885600
    """
    return 4 * num_examples * num_views * num_classes


def is_worthwhile(num_views: int, *, epochs: float, runs: int) -> bool:
    """Returns whether building the table costs no more forward passes than the runs that share it.

    >>> is_worthwhile(162, epochs=240, runs=1), is_worthwhile(162, epochs=60, runs=2)
    (True, False)
    """
    return num_views <= epochs * runs


def batches(
    num_examples: int, num_views: int, batch_size: int, start: int = 0
) -> Iterator[tuple[int, BatchIndices]]:
    """Yields every (image, view) from the `start`-th on, image-major, in batches, with the number of the first pair.

    The last batch is filled up with the last pair.
    """
    total = num_examples * num_views
    for first in range(start, total, batch_size):
        flat = np.minimum(np.arange(first, first + batch_size), total - 1)
        yield (
            first,
            BatchIndices(
                *(part.astype(np.int32) for part in np.divmod(flat, num_views))
            ),
        )


def build(
    logits_fn: Callable[[BatchIndices], jax.Array],
    out: np.ndarray,
    *,
    batch_size: int,
    start: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Fills `out` `[N, V, C]` with `logits_fn(indices) -> [B, C]` of every image and view.

    Args:
      logits_fn: a compiled function of the indices of one batch.
      out: writable, such as a memory map.
      batch_size: B.
      start: how many pairs, image-major, are there already.
      on_batch: called with the number of pairs that are there now.
    """
    num_examples, num_views, num_classes = out.shape
    flat, total = out.reshape(-1, num_classes), num_examples * num_views
    pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def write() -> None:
        first, logits = pending.popleft()
        stop = min(first + batch_size, total)
        flat[first:stop] = np.asarray(logits)[: stop - first]
        on_batch(stop)

    for first, indices in batches(num_examples, num_views, batch_size, start):
        pending.append((first, logits_fn(indices)))
        # A few batches in flight: the device computes while the host copies.
        if len(pending) > 4:
            write()
    while pending:
        write()
