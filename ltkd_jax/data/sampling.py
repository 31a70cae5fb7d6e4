"""Which image and which view stands where in which batch: a function of (seed, step, position) alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # NumPy's on the host


class Plan(NamedTuple):
    """Batches as numbers: `index[s, b]` is the image, `view[s, b]` the view, at position b of batch s; int32.

    `bits[s, b]`, uint32, is what else is drawn for that position; None where nothing is.
    """

    index: Array  # type: ignore[assignment]  # it hides tuple.index
    view: Array
    bits: Array | None = None


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """ceil(N / B): every batch is full and every image is seen."""
    return -(-num_examples // batch_size)


def epoch_plan(
    seed: jax.Array | int,
    epoch: jax.Array | int,
    *,
    num_examples: int,
    batch_size: int,
    num_views: int,
    bits: bool = False,
) -> Plan:
    """The batches of one epoch, `[S, B]` with S = ceil(N / B).

    The epoch's permutation comes first, and is filled up from the beginning of the next epoch's. It depends on
    nothing but the arguments: not on the device, the number of devices, or what ran before.

    Args:
      seed, epoch: int scalars, may be traced.
      num_examples: N.
      batch_size: B, the global batch.
      num_views: views of an image; each is equally likely.
      bits: whether to draw them too.

    >>> plan = epoch_plan(0, 0, num_examples=5, batch_size=3, num_views=9)
    >>> plan.index.shape, sorted(plan.index.ravel()[:5].tolist())
    ((2, 3), [0, 1, 2, 3, 4])
    """
    shape = (steps_per_epoch(num_examples, batch_size), batch_size)
    order_key, view_key = jax.random.split(jax.random.key(seed))

    def permutation(epoch: jax.Array | int) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)

    # A batch larger than the set takes from as many of the following permutations as it needs.
    needed = -(-shape[0] * batch_size // num_examples)
    order = jnp.concatenate([permutation(epoch + i) for i in range(needed)])[: shape[0] * batch_size]
    view = jax.random.randint(jax.random.fold_in(view_key, epoch), shape, 0, num_views, jnp.int32)
    drawn = jax.random.bits(jax.random.fold_in(jax.random.fold_in(view_key, epoch), 1), shape) if bits else None
    return Plan(order.astype(jnp.int32).reshape(shape), view, drawn)


def stream(
    seed: jax.Array | int,
    first_step: jax.Array | int,
    *,
    num_steps: int,
    num_examples: int,
    batch_size: int,
    **of_view: Any,
) -> Plan:
    """Batches of the endless stream of epochs, `[num_steps, B]`, from a step on.

    Args:
      seed, first_step: int scalars, may be traced.
      num_steps: how many.
      num_examples, batch_size: as `epoch_plan`.
      **of_view: likewise.

    >>> plan = stream(0, 1, num_steps=2, num_examples=5, batch_size=3, num_views=9)
    >>> epochs = [epoch_plan(0, epoch, num_examples=5, batch_size=3, num_views=9) for epoch in (0, 1)]
    >>> [bool((plan.index[i] == epochs[i].index[1 - i]).all()) for i in (0, 1)]
    [True, True]
    """
    per_epoch = steps_per_epoch(num_examples, batch_size)
    epochs = first_step // per_epoch + jnp.arange(-(-num_steps // per_epoch) + 1)
    each = jax.vmap(lambda epoch: epoch_plan(seed, epoch, num_examples=num_examples, batch_size=batch_size, **of_view))(
        epochs
    )
    flat = jax.tree.map(lambda x: x.reshape(-1, batch_size), each)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first_step % per_epoch, num_steps), flat)
