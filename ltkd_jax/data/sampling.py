"""Samples the batches of training: which image, in which view, is in which batch.

Every batch is a function of the seed and the step only. So training resumes at any step
without a saved position, and on any number of devices the batches are the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # NumPy's on the host


class BatchIndices(NamedTuple):
    """Describes batches by numbers, leaves `[B]`, or `[S, B]` for S steps.

    Attributes:
      index: int32, the image.
      view: int32, the image's view, see `augment.Views`.
      random_bits: uint32, the randomness of all else that is drawn for the image on the
        device; None where nothing is.
    """

    index: Array  # type: ignore[assignment]  # it hides tuple.index
    view: Array
    random_bits: Array | None = None


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns ceil(N / B), so that every batch is full and every image is used."""
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

    They are a permutation of all images, and the last batch is filled with the first
    images of the next epoch's permutation. The result depends on the arguments only:
    not on the device, the number of devices, or earlier calls.

    Args:
      seed: int scalar, may be traced.
      epoch: int scalar, may be traced.
      num_examples: N.
      batch_size: B, of the global batch.
      num_views: number of views of an image; each is equally likely.
      random_bits: whether to draw `BatchIndices.random_bits`, too.

    Returns:
      A `BatchIndices` with leaves `[S, B]`.

    >>> batches = epoch_indices(0, 0, num_examples=5, batch_size=3, num_views=9)
    >>> batches.index.shape, sorted(batches.index.ravel()[:5].tolist())
    ((2, 3), [0, 1, 2, 3, 4])
    """
    num_steps = steps_per_epoch(num_examples, batch_size)
    shape = (num_steps, batch_size)
    order_key, view_key = jax.random.split(jax.random.key(seed))

    def permutation(epoch: jax.Array | int) -> jax.Array:
        epoch_key = jax.random.fold_in(order_key, epoch)
        return jax.random.permutation(epoch_key, num_examples)

    # Two permutations suffice, unless a batch is larger than the data set.
    num_permutations = -(-num_steps * batch_size // num_examples)
    permutations = [permutation(epoch + i) for i in range(num_permutations)]
    order = jnp.concatenate(permutations)[: num_steps * batch_size]

    view_key = jax.random.fold_in(view_key, epoch)
    view = jax.random.randint(view_key, shape, 0, num_views, jnp.int32)
    bits = None
    if random_bits:
        # From a further key, so that the views are the same with and without them.
        bits = jax.random.bits(jax.random.fold_in(view_key, 1), shape)
    return BatchIndices(order.astype(jnp.int32).reshape(shape), view, bits)


def step_indices(
    seed: jax.Array | int,
    first_step: jax.Array | int,
    *,
    num_steps: int,
    num_examples: int,
    batch_size: int,
    **view_options: Any,
) -> BatchIndices:
    """Returns the batches of consecutive steps, over the ends of epochs, `[S, B]`.

    Args:
      seed: int scalar, may be traced.
      first_step: int scalar, may be traced; counts from the start of epoch 0.
      num_steps: S.
      num_examples, batch_size, **view_options: see `epoch_indices`.

    Returns:
      A `BatchIndices` with leaves `[S, B]`.

    Steps 1 and 2 of epochs of 2 steps are the last of epoch 0 and the first of epoch 1:

    >>> options = dict(num_examples=5, batch_size=3, num_views=9)
    >>> batches = step_indices(0, 1, num_steps=2, **options)
    >>> epochs = [epoch_indices(0, epoch, **options) for epoch in (0, 1)]
    >>> [bool((batches.index[i] == epochs[i].index[1 - i]).all()) for i in (0, 1)]
    [True, True]
    """
    per_epoch = steps_per_epoch(num_examples, batch_size)
    # One epoch more than S steps fill, since the first may start at its last step.
    num_epochs = -(-num_steps // per_epoch) + 1
    epochs = first_step // per_epoch + jnp.arange(num_epochs)

    def indices_of(epoch: jax.Array) -> BatchIndices:
        return epoch_indices(
            seed,
            epoch,
            num_examples=num_examples,
            batch_size=batch_size,
            **view_options,
        )

    def select_steps(x: jax.Array) -> jax.Array:
        steps = x.reshape(-1, batch_size)
        # Not a Python slice: the first step may be traced.
        return jax.lax.dynamic_slice_in_dim(steps, first_step % per_epoch, num_steps)

    return jax.tree.map(select_steps, jax.vmap(indices_of)(epochs))


def lookahead_indices(
    seed: jax.Array | int,
    epoch: jax.Array | int,
    *,
    lookahead: int,
    num_examples: int,
    batch_size: int,
    **view_options: Any,
) -> BatchIndices:
    """Returns each batch of an epoch with the K − 1 that follow it, `[S, B, K]`.

    The batches that follow the epoch's last ones are those of the next epoch.

    Args:
      seed: int scalar, may be traced.
      epoch: int scalar, may be traced.
      lookahead: K.
      num_examples, batch_size, **view_options: see `epoch_indices`.

    Returns:
      A `BatchIndices` with leaves `[S, B, K]`.

    >>> batches = lookahead_indices(
    ...     0, 0, lookahead=2, num_examples=5, batch_size=3, num_views=9)
    >>> batches.index.shape
    (2, 3, 2)
    >>> bool((batches.index[0, :, 1] == batches.index[1, :, 0]).all())
    True
    """
    num_steps = steps_per_epoch(num_examples, batch_size)
    batches = step_indices(
        seed,
        epoch * num_steps,
        num_steps=num_steps + lookahead - 1,
        num_examples=num_examples,
        batch_size=batch_size,
        **view_options,
    )
    # `[S, K]`: step s needs batches s to s + K − 1.
    windows = jnp.arange(num_steps)[:, None] + jnp.arange(lookahead)[None, :]
    # The batch axis comes before K, so that it is axis 1 of all batches' leaves.
    return jax.tree.map(lambda x: jnp.moveaxis(x[windows], 1, 2), batches)


def outer_seed(seed: jax.Array | int) -> jax.Array:
    """Returns the seed of the outer set's batches in a run of this seed.

    Args:
      seed: int scalar, may be traced.
    """
    # `epoch_indices` splits the same key in two, which equals folding in 0 and 1.
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), 2))
