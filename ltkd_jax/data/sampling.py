"""Which image, in which view, stands where in which batch: a function of (seed, step, position) alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # NumPy's on the host


class BatchIndices(NamedTuple):
    """Batches as numbers, leaves `[B]`, or `[S, B]` of several steps.

    Attributes:
      index: int32, the image.
      view: int32, its view, see `augment.Views`.
      random_bits: uint32, from which more is drawn for the image on the device; None where nothing is.
    """

    index: Array  # type: ignore[assignment]  # it hides tuple.index
    view: Array
    random_bits: Array | None = None


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns ceil(N / B): every batch is full and every image is seen."""
    return -(-num_examples // batch_size)


def epoch_indices(
    seed: jax.Array | int,
    epoch: jax.Array | int,
    *,
    num_examples: int,
    batch_size: int,
    num_views: int,
    random_bits: bool = False,
) -> BatchIndices:
    """Returns the batches of one epoch, `[S, B]` with S = ceil(N / B).

    The epoch's permutation comes first, and is filled up from the beginning of the next epoch's. It depends on
    nothing but the arguments: not on the device, the number of devices, or what ran before.

    Args:
      seed, epoch: int scalars, may be traced.
      num_examples: N.
      batch_size: B, the global batch.
      num_views: views of an image; each is equally likely.
      random_bits: whether to draw them too.

    >>> indices = epoch_indices(0, 0, num_examples=5, batch_size=3, num_views=9)
    >>> indices.index.shape, sorted(indices.index.ravel()[:5].tolist())
    ((2, 3), [0, 1, 2, 3, 4])
    """
    shape = (steps_per_epoch(num_examples, batch_size), batch_size)
    order_key, view_key = jax.random.split(jax.random.key(seed))

    def permutation(epoch: jax.Array | int) -> jax.Array:
        return jax.random.permutation(
            jax.random.fold_in(order_key, epoch), num_examples
        )

    # A batch larger than the set takes from as many of the following permutations as it needs.
    needed = -(-shape[0] * batch_size // num_examples)
    order = jnp.concatenate([permutation(epoch + i) for i in range(needed)])[
        : shape[0] * batch_size
    ]
    view_key = jax.random.fold_in(view_key, epoch)
    view = jax.random.randint(view_key, shape, 0, num_views, jnp.int32)
    bits = (
        jax.random.bits(jax.random.fold_in(view_key, 1), shape) if random_bits else None
    )
    return BatchIndices(order.astype(jnp.int32).reshape(shape), view, bits)


def indices_from(
    seed: jax.Array | int,
    first_step: jax.Array | int,
    *,
    num_steps: int,
    num_examples: int,
    batch_size: int,
    **view_options: Any,
) -> BatchIndices:
    """Returns batches of the endless sequence of epochs from a step on, `[num_steps, B]`.

    Args:
      seed, first_step: int scalars, may be traced.
      num_steps: how many.
      num_examples, batch_size, **view_options: as `epoch_indices`.

    >>> indices = indices_from(0, 1, num_steps=2, num_examples=5, batch_size=3, num_views=9)
    >>> epochs = [epoch_indices(0, epoch, num_examples=5, batch_size=3, num_views=9) for epoch in (0, 1)]
    >>> [bool((indices.index[i] == epochs[i].index[1 - i]).all()) for i in (0, 1)]
    [True, True]
    """
    per_epoch = steps_per_epoch(num_examples, batch_size)
    epochs = first_step // per_epoch + jnp.arange(-(-num_steps // per_epoch) + 1)

    def indices_of(epoch: jax.Array) -> BatchIndices:
        return epoch_indices(
            seed,
            epoch,
            num_examples=num_examples,
            batch_size=batch_size,
            **view_options,
        )

    flat = jax.tree.map(
        lambda x: x.reshape(-1, batch_size), jax.vmap(indices_of)(epochs)
    )
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first_step % per_epoch, num_steps),
        flat,
    )


def lookahead_indices(
    seed: jax.Array | int,
    epoch: jax.Array | int,
    *,
    lookahead: int,
    num_examples: int,
    batch_size: int,
    **view_options: Any,
) -> BatchIndices:
    """Returns for each step of an epoch its own batch and the next K − 1, over the epoch's end too, `[S, B, K]`.

    Args:
      seed, epoch: int scalars, may be traced.
      lookahead: K.
      num_examples, batch_size, **view_options: as `epoch_indices`.

    >>> indices = lookahead_indices(0, 0, lookahead=2, num_examples=5, batch_size=3, num_views=9)
    >>> indices.index.shape, bool((indices.index[0, :, 1] == indices.index[1, :, 0]).all())
    ((2, 3, 2), True)
    """
    steps = steps_per_epoch(num_examples, batch_size)
    batches = indices_from(
        seed,
        epoch * steps,
        num_steps=steps + lookahead - 1,
        num_examples=num_examples,
        batch_size=batch_size,
        **view_options,
    )
    window = jnp.arange(steps)[:, None] + jnp.arange(lookahead)[None, :]
    return jax.tree.map(lambda x: jnp.moveaxis(x[window], 1, 2), batches)


def outer_seed(seed: jax.Array | int) -> jax.Array:
    """Returns the seed of the outer set's own batches in a run with this seed; it may be traced."""
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), 2))
