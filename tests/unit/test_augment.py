"""Views against a slow NumPy version, for every view and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax.data import augment

VIEWS = [
    augment.Views(pad=0, flip=False),
    augment.Views(pad=0, flip=True),
    augment.Views(pad=1, flip=False),
    augment.Views(pad=2, flip=True),
    augment.Views(pad=4, flip=True),
]


def reference(image, view, views):
    """Pad, crop, flip: one image, in NumPy."""
    flips, side = 1 + views.flip, 2 * views.pad + 1
    dy, dx, flip = view // flips // side, view // flips % side, view % flips
    height, width, _ = image.shape
    padded = np.pad(image, ((views.pad, views.pad), (views.pad, views.pad), (0, 0)))
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


def random_images(batch, shape=(7, 9, 3), seed=0):
    return np.random.default_rng(seed).integers(1, 256, (batch, *shape), dtype=np.uint8)


@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_views_match_numpy(views):
    images, numbers = random_images(views.num), np.arange(views.num, dtype=np.int32)
    result = jax.jit(augment.apply, static_argnums=2)(
        jnp.asarray(images), jnp.asarray(numbers), views
    )
    assert result.dtype == jnp.uint8
    expected = np.stack(
        [
            reference(image, view, views)
            for image, view in zip(images, numbers, strict=True)
        ]
    )
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result[views.identity], images[views.identity])


def test_under_vmap():
    views = augment.Views(pad=2, flip=True)
    images = random_images(6).reshape(2, 3, 7, 9, 3)
    numbers = jnp.asarray([[0, 17, 49], [24, 25, 3]])
    result = jax.vmap(lambda i, v: augment.apply_views(i, v, views))(
        jnp.asarray(images), numbers
    )
    for row in range(2):
        np.testing.assert_array_equal(
            result[row], augment.apply_views(jnp.asarray(images[row]), numbers[row], views)
        )


def test_normalize():
    images = random_images(3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    expected = (images.astype(np.float64) / 255 - mean) / std
    result = augment.normalize(jnp.asarray(images), mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    half = jax.jit(lambda i: augment.normalize(i, mean, std, jnp.bfloat16))(
        jnp.asarray(images)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32), expected, rtol=2**-7, atol=1e-6
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda i, v: augment.apply_views(i.astype(jnp.float32), v, VIEWS[1]),
        lambda i, v: augment.apply_views(i, v[:1], VIEWS[1]),
        lambda i, v: augment.apply_views(i[0], v, VIEWS[1]),
        lambda i, v: augment.normalize(i, (0.5,), (0.5,)),
        lambda i, v: augment.normalize(i.astype(jnp.float32), (0.5,) * 3, (0.5,) * 3),
    ],
    ids=["dtype", "batch", "rank", "channels", "normalised twice"],
)
def test_wrong_arguments(call):
    with pytest.raises(AssertionError):
        call(jnp.asarray(random_images(2)), jnp.asarray([0, 1]))


def test_views_negative_pad():
    with pytest.raises(ValueError, match="pad=-1"):
        augment.Views(pad=-1, flip=True)


# More than views.


def test_mixup_share_distribution():
    bits = jax.random.bits(jax.random.key(0), (4000,))
    share = np.asarray(jax.jit(augment.mixup_share, static_argnums=1)(bits, 0.4))
    assert share.shape == (4000,) and share.min() >= 0 and share.max() <= 1
    # Beta(α, α): mean 1/2, variance 1 / (4 (2α + 1)).
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() - 1 / (4 * 1.8)) < 0.01
    order = np.random.default_rng(0).permutation(4000)
    np.testing.assert_array_equal(augment.mixup_lam(bits[order], 0.4), share[order])


def test_mix():
    a, b = (
        np.random.default_rng(seed).normal(size=(3, 2, 2, 1)).astype(np.float32)
        for seed in (0, 1)
    )
    share = np.array([0.0, 0.25, 1.0], np.float32)
    weight = share[:, None, None, None]
    np.testing.assert_allclose(
        augment.mix(a, b, share), weight * a + (1 - weight) * b, rtol=1e-6
    )


def test_apply_extra():
    images = jnp.asarray(
        np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    )
    assert augment.apply_extra(images, None, augment.NO_EXTRA) is images
    cut = augment.apply_extra(images, jnp.zeros(2, jnp.uint32), augment.Extra(cutout=3))
    assert cut.shape == images.shape and (cut != images).any()


@pytest.mark.parametrize(
    "values",
    [{"policy": "rand"}, {"cutout": -1}, {"mixup": -0.1}, {"mixup": float("nan")}],
)
def test_extra_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        augment.Extra(**values)
