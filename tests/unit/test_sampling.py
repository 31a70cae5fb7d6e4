"""Tests the batches of an epoch: full, complete, and reproducible."""

import functools

import jax
import numpy as np
import pytest

from ltkd_jax.data import sampling


def epoch_indices(seed=0, epoch=0, num_examples=10, batch_size=4):
    batches = sampling.epoch_indices(
        seed, epoch, num_examples=num_examples, batch_size=batch_size, num_views=9
    )
    return jax.tree.map(np.asarray, batches)


@pytest.mark.parametrize(
    "num_examples, batch_size", [(10, 4), (12, 4), (5, 64), (1, 3), (10_847, 64)]
)
def test_batches_full_with_every_image(num_examples, batch_size):
    sizes = dict(num_examples=num_examples, batch_size=batch_size)
    batches = epoch_indices(**sizes)
    expected_shape = (-(-num_examples // batch_size), batch_size)
    assert batches.index.shape == batches.view.shape == expected_shape
    indices = batches.index.ravel()
    assert sorted(indices[:num_examples]) == list(range(num_examples))
    filling = indices[num_examples : 2 * num_examples]
    next_indices = epoch_indices(epoch=1, **sizes).index.ravel()
    np.testing.assert_array_equal(filling, next_indices[: len(filling)])


def test_function_of_seed_and_epoch():
    expected = epoch_indices(3, 7)
    assert not np.array_equal(expected.index, epoch_indices(3, 8).index)
    assert not np.array_equal(expected.index, epoch_indices(4, 7).index)
    sizes = dict(num_examples=10, batch_size=4, num_views=9)
    jitted = jax.jit(functools.partial(sampling.epoch_indices, **sizes))
    for device in jax.devices()[:3]:
        with jax.default_device(device):
            jax.tree.map(np.testing.assert_array_equal, jitted(3, 7), expected)


def test_view_distribution():
    views = []
    for epoch in range(10):
        batches = epoch_indices(epoch=epoch, num_examples=2_000, batch_size=100)
        views.append(batches.view)
    views = np.concatenate(views)
    counts = np.bincount(views.ravel(), minlength=9)
    assert len(counts) == 9
    expected = views.size / 9
    # Chi-square with 8 degrees of freedom: above 26.1 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 26.1
