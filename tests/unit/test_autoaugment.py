"""Every operation against Pillow, byte for byte; the draws against their distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ltkd_jax.data import autoaugment

# Every operation with every magnitude and sign.
CASES = list(itertools.product(autoaugment.OPS, range(10), (False, True)))
WORDS = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
SIZES, SHAPE = (
    (0, 1, 4, 5, 40),
    (12, 10),
)  # of Cutout's squares, and of the images for them
apply_op = jax.jit(autoaugment.apply_ops)


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def pillow(image, name, magnitude, negative):
    """The official code's operation on `[H, W, C]`, by Pillow."""
    image, sign = (
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image),
        -1 if negative else 1,
    )
    factor = magnitude * 1.8 / 10 + 0.1
    result = {
        "Identity": lambda: image,
        "ShearX": lambda: affine(image, 1, sign * magnitude * 0.3 / 10, 0, 0, 1, 0),
        "ShearY": lambda: affine(image, 1, 0, 0, sign * magnitude * 0.3 / 10, 1, 0),
        "TranslateX": lambda: affine(image, 1, 0, sign * magnitude, 0, 1, 0),
        "TranslateY": lambda: affine(image, 1, 0, 0, 0, 1, sign * magnitude),
        "Rotate": lambda: image.rotate(sign * int(magnitude * 30 / 10)),
        "Invert": lambda: ImageOps.invert(image),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(magnitude * 256 / 10)),
        "Posterize": lambda: ImageOps.posterize(image, 4 - int(magnitude * 4 / 10)),
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "Color": lambda: ImageEnhance.Color(image).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
    }[name]()
    return np.asarray(result).reshape(*image.size[::-1], -1)


def images_of(kind, shape, seed=0):
    """uint8 `shape`, `[B, H, W, C]`, of one kind."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    each = (shape[0], 1, 1, shape[-1])
    first, second = rng.integers(0, 256, (2, *each))
    if (
        kind == "smooth"
    ):  # as photographs are: few values of the range, neighbours alike
        y, x = np.indices(shape[1:3])[:, None, :, :, None]
        image = (
            128
            + first / 4 * np.sin(x / 5 + second)
            + second / 4 * np.cos(y / 7 + first)
        )
        return np.clip(image, 0, 255).astype(np.uint8)
    return {
        "noise": lambda: noise,
        "black": lambda: np.zeros(shape, np.uint8),
        "white": lambda: np.full(shape, 255, np.uint8),
        "one value": lambda: np.broadcast_to(first, shape).astype(np.uint8),
        "two values": lambda: np.where(noise < 128, first, second).astype(np.uint8),
        "two neighbours": lambda: (np.minimum(first, 254) + noise % 2).astype(np.uint8),
        "three neighbours": lambda: (np.minimum(first, 253) + noise % 3).astype(
            np.uint8
        ),
        "a range": lambda: np.clip(
            noise, np.minimum(first, second), np.maximum(first, second)
        ).astype(np.uint8),
        "mostly black": lambda: np.where(noise < 8, 255 - noise, 0).astype(np.uint8),
    }[kind]()


KINDS = ("noise", "black", "white", "one value", "two values", "two neighbours", "three neighbours", "a range",
         "mostly black", "smooth")  # fmt: skip


def arguments(cases):
    op, magnitude, negative = zip(*cases, strict=True)
    op = [autoaugment.OP_INDEX[name] for name in op]
    return jnp.asarray(op), jnp.asarray(magnitude), jnp.asarray(negative)


@functools.cache
def draws():
    """What AutoAugment draws from each of `WORDS`."""
    return jax.tree.map(np.asarray, jax.jit(autoaugment.draw_sub_policies)(WORDS))


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (20, 9, 1), (1, 1, 3), (2, 5, 3), (11, 17, 3)], ids=str
)
def test_operations_match_pillow(shape):
    for kind in KINDS:
        images = images_of(kind, (len(CASES), *shape))
        results = apply_op(jnp.asarray(images), *arguments(CASES))
        assert results.dtype == jnp.uint8 and results.shape == images.shape
        for image, result, case in zip(images, np.asarray(results), CASES, strict=True):
            np.testing.assert_array_equal(
                result, pillow(image, *case), err_msg=f"{kind} {case}"
            )


def test_blend_matches_pillow():
    """All 10 factors of all pairs of values: the float32 of Pillow's C code, in integers."""
    first, second = np.indices((256, 256), dtype=np.uint8)
    result = jax.jit(autoaugment._blend)(
        jnp.int32(first)[None], jnp.int32(second)[None], jnp.arange(10)[:, None, None]
    )
    for magnitude in range(10):
        pair = (Image.fromarray(values) for values in (first, second))
        expected = np.asarray(Image.blend(*pair, magnitude * 1.8 / 10 + 0.1))
        np.testing.assert_array_equal(
            result[magnitude], expected, err_msg=f"magnitude {magnitude}"
        )


def test_autocontrast_matches_pillow():
    """All ranges of values: Pillow's float64 truncates some whole numbers to the one below."""
    low, high = np.nonzero(np.triu(np.ones((256, 256)), 1))
    lut = jax.jit(autoaugment._autocontrast)(
        jnp.arange(256)[:, None], jnp.asarray(low)[None], jnp.asarray(high)[None]
    )
    values = np.clip(np.arange(256)[:, None], low, high).astype(np.uint8)
    # Three ranges at once, as the channels of one image.
    images = values.reshape(256, -1, 3).transpose(1, 0, 2)
    expected = [
        np.asarray(ImageOps.autocontrast(Image.fromarray(image[None])))[0]
        for image in images
    ]
    expected = np.stack(expected, 1).reshape(256, -1)
    assert (expected[high, np.arange(len(high))] == 254).any()
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(lut), values, 0), expected
    )


@jax.jit
def augment(images, bits):
    """What `auto_augment` gives and then `cutout` with the same words, `[B, 2, H, W, C]`."""
    images = autoaugment.auto_augment(images, bits)
    return jnp.stack([images, autoaugment.cutout(images, bits, size=8)], 1)


def test_policy_matches_pillow():
    """The whole of `auto_augment`, from the draws on."""
    assert len(autoaugment.POLICY) == 25
    images = images_of("smooth", (len(CASES), 32, 32, 3))
    expected = images.copy()
    for index, sub_policy, applied, negative in zip(range(len(CASES)), *draws()):
        for turn, (name, _, magnitude) in enumerate(autoaugment.POLICY[sub_policy]):
            if applied[turn]:
                expected[index] = pillow(
                    expected[index], name, magnitude, negative[turn]
                )
    assert 0.6 < (expected != images).any((1, 2, 3)).mean() < 0.95
    np.testing.assert_array_equal(augment(images, WORDS[: len(CASES)])[:, 0], expected)


def test_result_depends_on_own_word_only():
    """Whatever the order, the batch and the number of devices."""
    images, bits = (
        images_of("smooth", (len(CASES), 32, 32, 3), seed=1),
        WORDS[-len(CASES) :],
    )
    expected = np.asarray(augment(images, bits))
    order = np.random.default_rng(3).permutation(len(CASES))
    np.testing.assert_array_equal(augment(images[order], bits[order]), expected[order])
    other = np.where(np.arange(len(CASES)) == 7, bits, bits[::-1])
    np.testing.assert_array_equal(augment(images, other)[7], expected[7])
    split = (2, 5, len(CASES) // 10)  # devices, batches on each, images in each
    parts = jax.pmap(jax.vmap(augment))(
        images.reshape(*split, 32, 32, 3), bits.reshape(split)
    )
    np.testing.assert_array_equal(np.asarray(parts).reshape(expected.shape), expected)


def z_score(count, probability, draws):
    return (np.asarray(count) - draws * probability) / np.sqrt(
        np.maximum(draws * probability * (1 - probability), 1)
    )


def test_draw_probabilities():
    sub_policy, applied, negative = draws()
    assert (
        np.abs(z_score(np.bincount(sub_policy, minlength=25), 1 / 25, len(WORDS))).max()
        < 4.5
    )
    for index, turn in itertools.product(range(25), range(2)):
        chosen, probability = sub_policy == index, autoaugment.POLICY[index][turn][1]
        assert (
            abs(z_score(applied[chosen, turn].sum(), probability, chosen.sum())) < 4.5
        ), (index, turn)
    assert not applied[sub_policy == 14, 1].any()  # Invert, with probability 0
    even = np.column_stack(
        [negative, negative[:, 0] == negative[:, 1]]
    )  # and independent of each other
    assert np.abs(z_score(even.sum(0), 1 / 2, len(WORDS))).max() < 4.5
    for fact in negative.T:
        chosen, shown = (
            np.bincount(sub_policy, minlength=25),
            np.bincount(sub_policy[fact], minlength=25),
        )
        assert (
            np.abs(z_score(shown, fact.mean(), chosen)).max() < 4.5
        )  # independent of the sub-policy


@functools.cache
def cutouts():
    """Images without a black pixel, and of each of `SIZES` what `cutout` makes of them, `[20000, H, W, 1]`."""
    images = images_of("noise", (len(WORDS), *SHAPE, 1)) | 1
    cut = jax.jit(
        lambda images, bits: {
            size: autoaugment.cutout(images, bits, size=size) for size in SIZES
        }
    )
    return images, jax.tree.map(np.asarray, cut(images, WORDS))


def centres():
    """Of each word the row and the column of the centre: the one pixel that size 1 takes."""
    hole = cutouts()[1][1][..., 0] == 0
    assert (hole.sum((1, 2)) == 1).all()
    return hole.any(2).argmax(1), hole.any(1).argmax(1)


def test_cutout_centre_is_uniform():
    row, column = centres()
    assert (
        np.abs(
            z_score(
                np.bincount(row * SHAPE[1] + column, minlength=120), 1 / 120, len(WORDS)
            )
        ).max()
        < 4.5
    )
    table = np.histogram2d(draws()[0], row, (np.arange(26), np.arange(SHAPE[0] + 1)))[0]
    expected, freedom = (
        table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum(),
        24 * (SHAPE[0] - 1),
    )
    # Independent of what AutoAugment does with the same word: chi-square, whose variance is 2 · freedom.
    assert ((table - expected) ** 2 / expected).sum() < freedom + 4.5 * np.sqrt(
        2 * freedom
    )


@pytest.mark.parametrize("size", SIZES)
def test_cutout_square(size):
    """NumPy's square, of every word, and its mean area in closed form."""
    images, results = cutouts()
    square = np.zeros(images.shape[:3], bool)
    for hole, row, column in zip(square, *centres(), strict=True):
        top, left = row - size // 2, column - size // 2
        hole[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = (
            True
        )
    np.testing.assert_array_equal(results[size], np.where(square[..., None], 0, images))
    if size > 2 * max(SHAPE):
        assert square.all()
    else:
        # Of side · size pairs of a centre and a pixel, those beyond the border are lost: a triangle at each end.
        lost = sum(range(size // 2 + 1)) + sum(range(size - size // 2))
        mean = np.prod([(side * size - lost) / side for side in SHAPE])
        assert square.sum((1, 2)).mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda i, b: autoaugment.auto_augment(i.astype(jnp.float32), b),
        lambda i, b: autoaugment.auto_augment(i, b.astype(jnp.int32)),
        lambda i, b: autoaugment.auto_augment(i, b[:1]),
        lambda i, b: autoaugment.auto_augment(i[..., :2], b),
        lambda i, b: autoaugment.auto_augment(i[0], b),
        lambda i, b: autoaugment.cutout(i.astype(jnp.float32), b, size=2),
        lambda i, b: autoaugment.cutout(i, b.astype(jnp.int32), size=2),
        lambda i, b: autoaugment.cutout(i, b[:1], size=2),
    ],
    ids=[
        "dtype",
        "word",
        "batch",
        "channels",
        "rank",
        "cutout's dtype",
        "cutout's word",
        "cutout's batch",
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(AssertionError):
        jax.eval_shape(
            call, jnp.zeros((2, 4, 4, 3), jnp.uint8), jnp.zeros(2, jnp.uint32)
        )


def test_cutout_negative_size():
    with pytest.raises(ValueError, match="size=-1"):
        autoaugment.cutout(
            jnp.zeros((1, 4, 4, 3), jnp.uint8), jnp.zeros(1, jnp.uint32), size=-1
        )
