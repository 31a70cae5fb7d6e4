"""The teacher's table: its logits for every view of every training image, computed once.

An evaluation-mode teacher is a function of the view, and crops and flips are few (162 for CIFAR). Looked up by
(image, view), its logits are those of the teacher in the step, up to rounding.
"""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ltkd_jax.data.sampling import Plan


def table_bytes(num_examples: int, num_views: int, num_classes: int) -> int:
    """Size of the table in float32.

    >>> table_bytes(10_847, 162, 100)
    702885600
    """
    return 4 * num_examples * num_views * num_classes


def pays(num_views: int, *, epochs: float, runs: int) -> bool:
    """Whether building the table (a forward of every view) costs no more forwards than the runs that share it.

    >>> pays(162, epochs=240, runs=1), pays(162, epochs=60, runs=2)
    (True, False)
    """
    return num_views <= epochs * runs


def batches(num_examples: int, num_views: int, batch_size: int, start: int = 0) -> Iterator[tuple[int, Plan]]:
    """Every (image, view) from the `start`-th on, image-major, in batches, each with the number of its first pair.

    The last batch is filled up with the last pair.
    """
    total = num_examples * num_views
    for first in range(start, total, batch_size):
        flat = np.minimum(np.arange(first, first + batch_size), total - 1)
        yield first, Plan(*(part.astype(np.int32) for part in np.divmod(flat, num_views)))


def build(
    logits_fn: Callable[[Plan], jax.Array],
    out: np.ndarray,
    *,
    batch_size: int,
    start: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Fills `out` `[N, V, C]` with `logits_fn(rows) -> [B, C]` of every image and view.

    Args:
      logits_fn: a compiled function of a `Plan` of one batch, index and view `[B]`.
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

    for first, rows in batches(num_examples, num_views, batch_size, start):
        pending.append((first, logits_fn(rows)))
        # A few batches in flight: the device computes while the host copies.
        if len(pending) > 4:
            write()
    while pending:
        write()
