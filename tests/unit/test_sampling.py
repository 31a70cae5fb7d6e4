"""The order of training: every image, full batches, and nothing but the seed and the step."""

import jax
import numpy as np
import pytest

from ltkd_jax.data import sampling as plans


def plan(seed=0, epoch=0, num_examples=10, batch_size=4, num_views=9):
    made = plans.epoch_plan(seed, epoch, num_examples=num_examples, batch_size=batch_size, num_views=num_views)
    return jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("num_examples, batch_size", [(10, 4), (12, 4), (5, 64), (1, 3), (10_847, 64)])
def test_every_batch_is_full_and_every_image_is_seen(num_examples, batch_size):
    got = plan(num_examples=num_examples, batch_size=batch_size)
    assert got.index.shape == got.view.shape == (-(-num_examples // batch_size), batch_size)
    flat = got.index.ravel()
    assert sorted(flat[:num_examples]) == list(range(num_examples))
    following = plan(epoch=1, num_examples=num_examples, batch_size=batch_size).index.ravel()
    filling = flat[num_examples : 2 * num_examples]
    np.testing.assert_array_equal(filling, following[: len(filling)])


def test_it_is_a_function_of_seed_and_epoch():
    np.testing.assert_array_equal(plan(3, 7).index, plan(3, 7).index)
    assert not np.array_equal(plan(3, 7).index, plan(3, 8).index)
    assert not np.array_equal(plan(3, 7).index, plan(4, 7).index)
    jitted = jax.jit(lambda s, e: plans.epoch_plan(s, e, num_examples=10, batch_size=4, num_views=9))
    for device in jax.devices()[:3]:
        with jax.default_device(device):
            for got, want in zip(jitted(3, 7), plan(3, 7)):
                np.testing.assert_array_equal(got, want)


def test_views_are_uniform():
    views = np.concatenate([plan(epoch=e, num_examples=2_000, batch_size=100, num_views=9).view for e in range(10)])
    counts = np.bincount(views.ravel(), minlength=9)
    assert len(counts) == 9
    expected = views.size / 9
    # Chi-square with 8 degrees of freedom: above 26.1 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 26.1
