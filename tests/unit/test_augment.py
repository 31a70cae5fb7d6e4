"""Tests views against a slow NumPy version, and Mixup against its distribution."""

import functools

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


def reference_view(image, view, views):
    """Pads, crops and flips one image in NumPy."""
    offset, flip = divmod(view, 1 + views.flip)
    dy, dx = divmod(offset, 2 * views.pad + 1)
    height, width, _ = image.shape
    padded = np.pad(image, ((views.pad, views.pad), (views.pad, views.pad), (0, 0)))
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


def random_images(number, shape=(7, 9, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (number, *shape), dtype=np.uint8)


@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_views_match_numpy(views):
    images = random_images(views.num)
    view = np.arange(views.num, dtype=np.int32)
    apply_views = jax.jit(augment.apply_views, static_argnums=2)
    result = apply_views(jnp.asarray(images), jnp.asarray(view), views)
    assert result.dtype == jnp.uint8
    expected = np.stack(
        [reference_view(images[v], int(v), views) for v in range(views.num)]
    )
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result[views.identity], images[views.identity])


def test_views_under_vmap():
    views = augment.Views(pad=2, flip=True)
    images = jnp.asarray(random_images(6).reshape(2, 3, 7, 9, 3))
    view = jnp.asarray([[0, 17, 49], [24, 25, 3]])
    apply_views = functools.partial(augment.apply_views, views=views)
    result = jax.vmap(apply_views)(images, view)
    for i in range(2):
        np.testing.assert_array_equal(result[i], apply_views(images[i], view[i]))


def test_normalize():
    images = random_images(3)
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.3, 0.25)
    expected = (images.astype(np.float64) / 255 - mean) / std
    result = augment.normalize(jnp.asarray(images), mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    to_bfloat16 = jax.jit(lambda x: augment.normalize(x, mean, std, jnp.bfloat16))
    result = to_bfloat16(jnp.asarray(images))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        result.astype(jnp.float32), expected, rtol=2**-7, atol=1e-6
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


# Beyond views.


def test_mixup_lam_distribution():
    random_bits = jax.random.bits(jax.random.key(0), (4000,))
    lam = jax.jit(augment.mixup_lam, static_argnums=1)(random_bits, 0.4)
    lam = np.asarray(lam)
    assert lam.shape == (4000,) and lam.min() >= 0 and lam.max() <= 1
    # Beta(α, α): mean 1/2, variance 1 / (4 (2α + 1)).
    assert abs(lam.mean() - 0.5) < 0.02
    assert abs(lam.var() - 1 / (4 * 1.8)) < 0.01
    order = np.random.default_rng(0).permutation(4000)
    np.testing.assert_array_equal(
        augment.mixup_lam(random_bits[order], 0.4), lam[order]
    )


def test_mix():
    shape = (3, 2, 2, 1)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    partners = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    lam = np.array([0.0, 0.25, 1.0], np.float32)
    weight = lam[:, None, None, None]
    expected = weight * images + (1 - weight) * partners
    np.testing.assert_allclose(augment.mix(images, partners, lam), expected, rtol=1e-6)


def test_apply_extra():
    images = jnp.asarray(random_images(2, (8, 8, 3)))
    assert augment.apply_extra(images, None, augment.NO_EXTRA) is images
    extra = augment.Extra(cutout=3)
    result = augment.apply_extra(images, jnp.zeros(2, jnp.uint32), extra)
    assert result.shape == images.shape and (result != images).any()


@pytest.mark.parametrize(
    "values",
    [{"policy": "rand"}, {"cutout": -1}, {"mixup": -0.1}, {"mixup": float("nan")}],
)
def test_extra_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        augment.Extra(**values)
