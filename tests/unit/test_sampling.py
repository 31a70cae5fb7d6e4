"""The order of training: every image, full batches, and nothing but the seed and the step."""

import jax
import numpy as np
import pytest

from ltkd_jax.data import sampling


def indices(seed=0, epoch=0, num_examples=10, batch_size=4):
    batches = sampling.epoch_indices(
        seed, epoch, num_examples=num_examples, batch_size=batch_size, num_views=9
    )
    return jax.tree.map(np.asarray, batches)


@pytest.mark.parametrize(
    "num_examples, batch_size", [(10, 4), (12, 4), (5, 64), (1, 3), (10_847, 64)]
)
def test_batches_are_full_and_hold_every_image(num_examples, batch_size):
    batches = indices(num_examples=num_examples, batch_size=batch_size)
    assert (
        batches.index.shape
        == batches.view.shape
        == (-(-num_examples // batch_size), batch_size)
    )
    flat = batches.index.ravel()
    assert sorted(flat[:num_examples]) == list(range(num_examples))
    following = indices(
        epoch=1, num_examples=num_examples, batch_size=batch_size
    ).index.ravel()
    filling = flat[num_examples : 2 * num_examples]
    np.testing.assert_array_equal(filling, following[: len(filling)])


def test_function_of_seed_and_epoch():
    expected = indices(3, 7)
    assert not np.array_equal(expected.index, indices(3, 8).index)
    assert not np.array_equal(expected.index, indices(4, 7).index)
    jitted = jax.jit(
        lambda s, e: sampling.epoch_indices(
            s, e, num_examples=10, batch_size=4, num_views=9
        )
    )
    for device in jax.devices()[:3]:
        with jax.default_device(device):
            jax.tree.map(np.testing.assert_array_equal, jitted(3, 7), expected)


def test_views_are_uniform():
    views = np.concatenate(
        [
            indices(epoch=epoch, num_examples=2_000, batch_size=100).view
            for epoch in range(10)
        ]
    )
    counts = np.bincount(views.ravel(), minlength=9)
    assert len(counts) == 9
    expected = views.size / 9
    # Chi-square with 8 degrees of freedom: above 26.1 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 26.1
