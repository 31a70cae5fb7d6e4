"""Tests every operation against Pillow, byte for byte, and the draws' distribution."""

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
RANDOM_BITS = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
CUTOUT_SIZES = (0, 1, 4, 5, 40)
CUTOUT_SHAPE = (12, 10)  # height and width of the images
apply_ops = jax.jit(autoaugment.apply_ops)


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def apply_pillow(pixels, name, magnitude, is_negative):
    """Returns the official code's operation on `[H, W, channels]`, by Pillow."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    sign = -1 if is_negative else 1
    factor = magnitude * 1.8 / 10 + 0.1
    operations = {
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
    }
    return np.asarray(operations[name]()).reshape(pixels.shape)


KINDS = (
    "noise",
    "black",
    "white",
    "one value",
    "two values",
    "two neighbours",
    "three neighbours",
    "a range",
    "mostly black",
    "smooth",
)


def random_images(kind, shape, seed=0):
    """Returns uint8 images of `shape`, `[B, H, W, channels]`, and of one of `KINDS`."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    # Two values of each channel of each image.
    first, second = rng.integers(0, 256, (2, shape[0], 1, 1, shape[-1]))
    low = np.minimum(first, second)
    high = np.maximum(first, second)
    y, x = np.indices(shape[1:3])[:, None, :, :, None]
    # Like photographs: few values of the range, and similar neighbours.
    waves = first / 4 * np.sin(x / 5 + second) + second / 4 * np.cos(y / 7 + first)
    images = {
        "noise": noise,
        "black": np.zeros(shape),
        "white": np.full(shape, 255),
        "one value": np.broadcast_to(first, shape),
        "two values": np.where(noise < 128, first, second),
        "two neighbours": np.minimum(first, 254) + noise % 2,
        "three neighbours": np.minimum(first, 253) + noise % 3,
        "a range": np.clip(noise, low, high),
        "mostly black": np.where(noise < 8, 255 - noise, 0),
        "smooth": np.clip(128 + waves, 0, 255),
    }
    return images[kind].astype(np.uint8)


def as_arrays(cases):
    names, magnitude, is_negative = zip(*cases, strict=True)
    op = [autoaugment.OP_INDEX[name] for name in names]
    return jnp.asarray(op), jnp.asarray(magnitude), jnp.asarray(is_negative)


@functools.cache
def sub_policy_draws():
    """Returns what AutoAugment draws from each of `RANDOM_BITS`."""
    draw = jax.jit(autoaugment.draw_sub_policies)
    return jax.tree.map(np.asarray, draw(RANDOM_BITS))


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (20, 9, 1), (1, 1, 3), (2, 5, 3), (11, 17, 3)], ids=str
)
def test_operations_match_pillow(shape):
    for kind in KINDS:
        images = random_images(kind, (len(CASES), *shape))
        results = apply_ops(jnp.asarray(images), *as_arrays(CASES))
        assert results.dtype == jnp.uint8 and results.shape == images.shape
        for image, result, case in zip(images, np.asarray(results), CASES, strict=True):
            expected = apply_pillow(image, *case)
            np.testing.assert_array_equal(result, expected, err_msg=f"{kind} {case}")


def test_blend_matches_pillow():
    """Tries all 10 factors on all pairs of values, which Pillow blends in float32."""
    first, second = np.indices((256, 256), dtype=np.uint8)
    result = jax.jit(autoaugment._blend)(
        jnp.int32(first)[None], jnp.int32(second)[None], jnp.arange(10)[:, None, None]
    )
    first_image = Image.fromarray(first)
    second_image = Image.fromarray(second)
    for magnitude in range(10):
        factor = magnitude * 1.8 / 10 + 0.1
        expected = np.asarray(Image.blend(first_image, second_image, factor))
        np.testing.assert_array_equal(
            result[magnitude], expected, err_msg=f"magnitude {magnitude}"
        )


def test_autocontrast_matches_pillow():
    """Tries all ranges of values; Pillow's float64 makes some whole ones too small."""
    low, high = np.nonzero(np.triu(np.ones((256, 256)), 1))
    table = jax.jit(autoaugment._autocontrast)(
        jnp.arange(256)[:, None], jnp.asarray(low)[None], jnp.asarray(high)[None]
    )
    values = np.clip(np.arange(256)[:, None], low, high).astype(np.uint8)
    # Three ranges at once, as the channels of one image.
    images = values.reshape(256, -1, 3).transpose(1, 0, 2)
    expected = []
    for image in images:
        stretched = ImageOps.autocontrast(Image.fromarray(image[None]))
        expected.append(np.asarray(stretched)[0])
    expected = np.stack(expected, 1).reshape(256, -1)
    assert (expected[high, np.arange(len(high))] == 254).any()
    result = np.take_along_axis(np.asarray(table), values, 0)
    np.testing.assert_array_equal(result, expected)


@jax.jit
def augment(images, random_bits):
    """Returns the images after `auto_augment`, and then `cutout`, `[B, 2, H, W, C]`."""
    images = autoaugment.auto_augment(images, random_bits)
    return jnp.stack([images, autoaugment.cutout(images, random_bits, size=8)], 1)


def test_policy_matches_pillow():
    assert len(autoaugment.POLICY) == 25
    images = random_images("smooth", (len(CASES), 32, 32, 3))
    expected = images.copy()
    for i, sub_policy, is_applied, is_negative in zip(
        range(len(CASES)), *sub_policy_draws()
    ):
        for turn, (name, _, magnitude) in enumerate(autoaugment.POLICY[sub_policy]):
            if is_applied[turn]:
                expected[i] = apply_pillow(
                    expected[i], name, magnitude, is_negative[turn]
                )
    assert 0.6 < (expected != images).any((1, 2, 3)).mean() < 0.95
    result = augment(images, RANDOM_BITS[: len(CASES)])[:, 0]
    np.testing.assert_array_equal(result, expected)


def test_result_independent_of_batch_and_devices():
    images = random_images("smooth", (len(CASES), 32, 32, 3), seed=1)
    bits = RANDOM_BITS[-len(CASES) :]
    expected = np.asarray(augment(images, bits))
    order = np.random.default_rng(3).permutation(len(CASES))
    np.testing.assert_array_equal(augment(images[order], bits[order]), expected[order])
    changed_bits = np.where(np.arange(len(CASES)) == 7, bits, bits[::-1])
    np.testing.assert_array_equal(augment(images, changed_bits)[7], expected[7])
    shape = (2, 5, len(CASES) // 10)  # devices, batches on each, images in each
    result = jax.pmap(jax.vmap(augment))(
        images.reshape(*shape, 32, 32, 3), bits.reshape(shape)
    )
    np.testing.assert_array_equal(np.asarray(result).reshape(expected.shape), expected)


def assert_probability(count, probability, num_draws):
    """Checks that counts are within 4.5 standard deviations of their expectation."""
    variance = num_draws * probability * (1 - probability)
    difference = np.asarray(count) - num_draws * probability
    z_score = difference / np.sqrt(np.maximum(variance, 1))
    assert np.abs(z_score).max() < 4.5


def test_draw_probabilities():
    sub_policy, is_applied, is_negative = sub_policy_draws()
    num_draws = len(RANDOM_BITS)
    sub_policy_counts = np.bincount(sub_policy, minlength=25)
    assert_probability(sub_policy_counts, 1 / 25, num_draws)
    for index, turn in itertools.product(range(25), range(2)):
        is_drawn = sub_policy == index
        probability = autoaugment.POLICY[index][turn][1]
        num_applied = is_applied[is_drawn, turn].sum()
        assert_probability(num_applied, probability, is_drawn.sum())
    assert not is_applied[sub_policy == 14, 1].any()  # Invert, with probability 0
    # The signs are fair, and independent of each other and of the sub-policy.
    assert_probability(is_negative.sum(0), 1 / 2, num_draws)
    are_equal = is_negative[:, 0] == is_negative[:, 1]
    assert_probability(are_equal.sum(), 1 / 2, num_draws)
    for sign in is_negative.T:
        negative_counts = np.bincount(sub_policy[sign], minlength=25)
        assert_probability(negative_counts, sign.mean(), sub_policy_counts)


@functools.cache
def cutouts():
    """Returns images without a black pixel, and their cutouts by size."""
    images = random_images("noise", (len(RANDOM_BITS), *CUTOUT_SHAPE, 1)) | 1
    results = {}
    for size in CUTOUT_SIZES:
        cutout = jax.jit(functools.partial(autoaugment.cutout, size=size))
        results[size] = np.asarray(cutout(images, RANDOM_BITS))
    return images, results


def cutout_centres():
    """Returns the rows and columns of the centres: the only pixel that size 1 takes."""
    is_black = cutouts()[1][1][..., 0] == 0
    assert (is_black.sum((1, 2)) == 1).all()
    return is_black.any(2).argmax(1), is_black.any(1).argmax(1)


def test_cutout_centre_distribution():
    row, column = cutout_centres()
    height, width = CUTOUT_SHAPE
    counts = np.bincount(row * width + column, minlength=height * width)
    assert_probability(counts, 1 / (height * width), len(RANDOM_BITS))


def test_cutout_independent_of_auto_augment():
    """Compares the draws from the same bits by a chi-square test."""
    row, _ = cutout_centres()
    sub_policy, _, _ = sub_policy_draws()
    height = CUTOUT_SHAPE[0]
    bins = (np.arange(26), np.arange(height + 1))
    table, _, _ = np.histogram2d(sub_policy, row, bins)
    row_sums = table.sum(1, keepdims=True)
    column_sums = table.sum(0, keepdims=True)
    expected = row_sums * column_sums / table.sum()
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = 24 * (height - 1)
    # Its mean is the number of degrees of freedom, its variance twice that.
    assert chi_square < freedom + 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", CUTOUT_SIZES)
def test_cutout_square(size):
    """Compares with squares by NumPy, and their mean area with its closed form."""
    images, results = cutouts()
    squares = np.zeros(images.shape[:3], bool)
    for square, row, column in zip(squares, *cutout_centres(), strict=True):
        top = row - size // 2
        left = column - size // 2
        rows = slice(max(top, 0), max(top + size, 0))
        columns = slice(max(left, 0), max(left + size, 0))
        square[rows, columns] = True
    expected = np.where(squares[..., None], 0, images)
    np.testing.assert_array_equal(results[size], expected)
    if size > 2 * max(CUTOUT_SHAPE):
        assert squares.all()
    else:
        # Along a side there are side · size pairs of a centre and a pixel. Those beyond
        # the border are lost: a triangle at each end.
        lost = sum(range(size // 2 + 1)) + sum(range(size - size // 2))
        mean_area = np.prod([(side * size - lost) / side for side in CUTOUT_SHAPE])
        assert squares.sum((1, 2)).mean() == pytest.approx(mean_area, rel=0.02)


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
        "bits",
        "batch",
        "channels",
        "rank",
        "cutout's dtype",
        "cutout's bits",
        "cutout's batch",
    ],
)
def test_wrong_arguments(call):
    images = jnp.zeros((2, 4, 4, 3), jnp.uint8)
    random_bits = jnp.zeros(2, jnp.uint32)
    with pytest.raises(AssertionError):
        jax.eval_shape(call, images, random_bits)


def test_cutout_negative_size():
    images = jnp.zeros((1, 4, 4, 3), jnp.uint8)
    with pytest.raises(ValueError, match="size=-1"):
        autoaugment.cutout(images, jnp.zeros(1, jnp.uint32), size=-1)
