"""Computes AutoAugment's CIFAR-10 policy and Cutout on the device, in integers, with the results of Pillow.

Every pixel is computed in int32, so that it is the same byte on every device and under every fusion.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ltkd_jax.data.sampling import Array

# The 25 sub-policies for CIFAR-10 of AutoAugment's paper (https://arxiv.org/abs/1805.09501, appendix): twice an
# (operation, probability, magnitude). The official code (tensorflow/models, research/autoaugment, `good_policies`)
# draws from 95, which include these except numbers 15 to 19.
# fmt: off
POLICY = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)), (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)), (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)), (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)), (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)), (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)), (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)), (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 6)), (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)), (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)), (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)
# fmt: on
# First the operations that replace each value by another, in the order of `_lut`.
OPS = (
    *(
        "Identity",
        "Invert",
        "Solarize",
        "Posterize",
        "AutoContrast",
        "Equalize",
        "Brightness",
        "Contrast",
    ),
    *("Color", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
)
INDEX = {name: index for index, name in enumerate(OPS)}
_STREAM = {
    "auto_augment": 0x6175746F,
    "cutout": 0x6375746F,
}  # a stream of draws for each use of a word


def auto_augment(images: jax.Array, bits: Array) -> jax.Array:
    """Applies one of the 25 sub-policies to each image: its two operations in turn, each with its probability.

    An image's result depends on its pixels and its word only, not on its batch or device.

    Args:
      images: uint8 `[B, H, W, C]`, C 1 or 3.
      bits: uint32 `[B]`, a random word for each image.

    Raises:
      AssertionError: for a wrong dtype, rank or C, or a different B.

    >>> jax.eval_shape(auto_augment, jnp.zeros((2, 32, 32, 3), jnp.uint8), jnp.zeros(2, jnp.uint32)).shape
    (2, 32, 32, 3)
    """
    chex.assert_rank([images, bits], [4, 1])
    sub_policy, applied, negative = draw(bits)
    op = jnp.asarray([[INDEX[name] for name, _, _ in pair] for pair in POLICY])[
        sub_policy
    ]
    op = jnp.where(applied, op, INDEX["Identity"])
    magnitude = jnp.asarray(
        [[magnitude for _, _, magnitude in pair] for pair in POLICY]
    )[sub_policy]
    # A scan rather than two calls compiles in half the time, and XLA cannot recompute the first result for each use.
    step = jax.tree.map(jnp.transpose, (op, magnitude, negative))
    return jax.lax.scan(
        lambda images, step: (apply_op(images, *step), None), images, step
    )[0]


def draw(bits: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `auto_augment` draws from each word of `bits`, uint32 `[B]`.

    These are the sub-policy, int32 `[B]`, uniform over the 25; whether each operation is applied, bool `[B, 2]`; and
    whether its magnitude is negative, bool `[B, 2]`, with probability 1/2 as in the official code.

    >>> [x.shape for x in jax.eval_shape(draw, jnp.zeros(3, jnp.uint32))]
    [(3,), (3, 2), (3, 2)]
    """
    uniform = _uniform("auto_augment", bits, 5)
    sub_policy = (uniform[:, 0] * len(POLICY)).astype(jnp.int32)
    probability = jnp.asarray(
        [[probability for _, probability, _ in pair] for pair in POLICY], jnp.float32
    )
    return sub_policy, uniform[:, 1:3] < probability[sub_policy], uniform[:, 3:] >= 0.5


def cutout(images: jax.Array, bits: Array, *, size: int) -> jax.Array:
    """Blackens a square of side `size` in each image, its centre uniform over the pixels, clipped at the border.

    Cutout (DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552): around a centre in row y the `size` rows from
    `y - size // 2` on, and columns likewise. The authors' code masks after normalisation, which fills with the mean;
    here the fill is 0 before it, as for a crop's padding, and an odd size is not one smaller.

    Args:
      images: uint8 `[B, H, W, C]`.
      bits: uint32 `[B]`, a random word for each image. It may be that of `auto_augment`: the draws are independent.
      size: side of the square in pixels (static); 0 changes nothing.

    Raises:
      AssertionError: for a wrong dtype or rank, or a different B.
      ValueError: for a negative size.

    >>> cutout(jnp.ones((1, 2, 2, 1), jnp.uint8), jnp.zeros(1, jnp.uint32), size=4).sum().item()
    0
    """
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank([images, bits], [4, 1])
    chex.assert_equal_shape_prefix([images, bits], 1)
    if size < 0:
        raise ValueError(f"size={size}: give 0 (no cutout) or more pixels")
    _, height, width, _ = images.shape
    start = (_uniform("cutout", bits, 2) * jnp.array([[height, width]])).astype(
        jnp.int32
    ) - size // 2

    def covered(start: jax.Array, side: int) -> jax.Array:
        pixel = jnp.arange(side)[None]
        return (pixel >= start[:, None]) & (pixel < start[:, None] + size)

    square = (
        covered(start[:, 0], height)[:, :, None] & covered(start[:, 1], width)[:, None]
    )
    return jnp.where(square[..., None], jnp.uint8(0), images)


def apply_op(
    images: jax.Array, op: jax.Array, magnitude: jax.Array, negative: jax.Array
) -> jax.Array:
    """Applies operation `OPS[op[b]]` to `images[b]`, byte for byte as Pillow 13 does on x86-64.

    A magnitude m means what it does in the official code (tensorflow/models, `augmentation_transforms.py`):

      ShearX, ShearY          ± 0.3 m / 10; what comes in is black
      TranslateX, TranslateY  ± m pixels; what comes in is black
      Rotate                  ± int(30 m / 10) degrees, nearest neighbour; what comes in is black
      Solarize                256 − int(256 m / 10) is the least value to be inverted
      Posterize               4 − int(4 m / 10) bits remain
      Brightness, Contrast, Color, Sharpness    1.8 m / 10 + 0.1 is the factor of Pillow's `ImageEnhance`
      Identity, Invert, AutoContrast, Equalize  nothing

    There, a pixel that came in from outside and is still transparent at the end gets the mean colour; here it is
    black throughout. Other ports (torchvision's is one) give the magnitudes other meanings.

    Args:
      images: uint8 `[B, H, W, C]`, C 1 or 3. With C = 1, Color is the identity, as for Pillow's mode L.
      op: int `[B]`, indices into `OPS`. A value outside is not detected under jit, here and below.
      magnitude: int `[B]` in 0..9.
      negative: bool `[B]`, the sign of a shear, a translation or a rotation.

    Raises:
      AssertionError: for a wrong dtype, rank or C, or a different B.

    >>> white = jnp.full((1, 1, 1, 1), 255, jnp.uint8)
    >>> jax.jit(apply_op)(white, jnp.array([INDEX["Invert"]]), jnp.array([0]), jnp.array([False])).item()
    0
    """
    chex.assert_type([images, op, magnitude, negative], [jnp.uint8, int, int, bool])
    chex.assert_rank([images, op, magnitude, negative], [4, 1, 1, 1])
    chex.assert_equal_shape_prefix([images, op, magnitude, negative], 1)
    chex.assert_axis_dimension_comparator(images, -1, (1, 3).__contains__, "be 1 or 3")
    matrix = jnp.asarray(_matrices(*images.shape[1:3]))[
        op, magnitude, negative.astype(jnp.int32)
    ]
    return jax.vmap(_apply_op)(images, op, magnitude, matrix)


def _uniform(use: str, bits: Array, number: int) -> jax.Array:
    """Returns uniform draws in [0, 1), float32 `[B, number]`, by threefry whatever JAX's default generator is."""
    chex.assert_type(bits, jnp.uint32)
    key = jax.random.key(_STREAM[use], impl="threefry2x32")
    return jax.vmap(
        lambda word: jax.random.uniform(
            jax.random.fold_in(key, word), (number,), jnp.float32
        )
    )(bits)


def _apply_op(
    image: jax.Array, op: jax.Array, magnitude: jax.Array, matrix: jax.Array
) -> jax.Array:
    """Applies a warp, a look-up and a blend to an image `[H, W, C]`; all but at most one are the identity."""
    image, channel = image.astype(jnp.int32), jnp.arange(image.shape[-1])[None, None]
    # Look-up and degenerate image are those of the image, not of the step before: the same wherever they count.
    result = _lut(image, op, magnitude)[_warp(image, matrix), channel]
    is_color, is_sharpness = op == INDEX["Color"], op == INDEX["Sharpness"]
    degenerate = jnp.where(is_color, _grey(image), _smooth(image))
    return _blend(
        degenerate, result, jnp.where(is_color | is_sharpness, magnitude, 5)
    ).astype(jnp.uint8)


@functools.cache
def _matrices(height: int, width: int) -> np.ndarray:
    """Returns the map from a pixel to its source of each operation, magnitude and sign, int32 `[15, 10, 2, 6]`.

    Source x is `(a x + b y + c) >> 16` and source y `(d x + e y + f) >> 16`: the fixed point of Pillow's C code.
    """
    a, b, c, d, e, f = range(6)
    amount = np.arange(10)[:, None] * np.array([1, -1])[None]
    matrix = np.zeros((len(OPS), 10, 2, 6))
    matrix[..., [a, e]] = 1
    matrix[INDEX["ShearX"], ..., b] = matrix[INDEX["ShearY"], ..., d] = (
        amount * 0.3 / 10
    )
    matrix[INDEX["TranslateX"], ..., c] = matrix[INDEX["TranslateY"], ..., f] = amount
    cos, sin = (
        function(np.radians(3 * amount)).round(15) for function in (np.cos, np.sin)
    )
    x, y = width / 2, height / 2
    matrix[INDEX["Rotate"]] = np.stack(
        [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], -1
    )
    matrix[..., [c, f]] += (
        matrix[..., [a, d]] + matrix[..., [b, e]]
    ) / 2  # from the centre of the pixel
    return np.floor(matrix * 65536 + 0.5).astype(np.int32)


def _warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns the nearest source of each pixel, and black where that is outside."""
    height, width, channels = image.shape
    x, y = jnp.arange(width)[None], jnp.arange(height)[:, None]
    source_x = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    source_y = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    inside = (
        (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    )
    pixels = image.reshape(-1, channels)[
        jnp.where(inside, source_y * width + source_x, 0)
    ]
    return jnp.where(inside[..., None], pixels, 0)


def _lut(image: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Returns what replaces each value, int32 `[256, C]`: the value itself unless op is one of the first of `OPS`."""
    value, grey = jnp.arange(256)[:, None], _grey(image)
    mean = (2 * jnp.sum(grey, dtype=jnp.int32) + grey.size) // (
        2 * grey.size
    )  # int(mean + 1/2)
    tables = (
        value,
        255 - value,
        jnp.where(value < 256 - 256 * magnitude // 10, value, 255 - value),
        value & (-16 << (4 * magnitude // 10)),
        _autocontrast(value, image.min((0, 1))[None], image.max((0, 1))[None]),
        _equalize(value, image),
        _blend(0, value, magnitude),
        _blend(mean, value, magnitude),
    )
    # Stacked rather than selected: fused into the look-up, a pixel's value is computed by its own operation only.
    stacked = jnp.stack(
        [jnp.broadcast_to(table, (256, image.shape[-1])) for table in tables]
    )
    return stacked[jnp.where(op < len(tables), op, 0)]


def _autocontrast(value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Computes `ImageOps.autocontrast`: int(255 (value − low) / (high − low)), or the identity for a single value."""
    span = jnp.maximum(high - low, 1)
    scaled = 255 * (value - low)
    stretched = scaled // span
    nth = jnp.clip(
        stretched * jnp.asarray(np.gcd(np.arange(256), 255))[span] // 255, 0, 31
    )
    short = (jnp.asarray(_falls_short())[low, high] >> nth) & 1
    stretched -= jnp.where(scaled % span == 0, short, 0)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), value)


@functools.cache
def _falls_short() -> np.ndarray:
    """Returns whether Pillow's float64 falls short of the n-th whole 255 (value − low) / (high − low), as bit n.

    The result is int32 `[low, high]`.

    That quotient is whole gcd(high − low, 255) times over the range. Pillow multiplies by the rounded 255 / (high −
    low), subtracts and truncates, so that in 5,958 of the 32,640 ranges some become one less, mostly the largest:
    254 for 255. None of them is beyond the 17th.
    """
    low, high = np.indices((256, 256))
    span = np.maximum(high - low, 1)
    scale, bits = 255 / span, np.zeros((256, 256), np.int32)
    for nth in range(18):
        value = np.minimum(low + nth * (span // np.gcd(span, 255)), high)
        bits |= (
            np.int32(value * scale + -low * scale) < 255 * (value - low) // span
        ) << nth
    return bits


def _equalize(value: jax.Array, image: jax.Array) -> jax.Array:
    """Computes `ImageOps.equalize`: the number of smaller values over a 255th of the number of all but the largest."""
    channel = jnp.arange(image.shape[-1])[None, None]
    count = jnp.zeros((256, image.shape[-1]), jnp.int32).at[image, channel].add(1)
    smaller = jnp.cumsum(count, 0) - count
    step = (
        jnp.sum(image < image.max((0, 1))[None, None], (0, 1), dtype=jnp.int32)[None]
        // 255
    )
    return jnp.where(
        step > 0, jnp.minimum((step // 2 + smaller) // jnp.maximum(step, 1), 255), value
    )


def _grey(image: jax.Array) -> jax.Array:
    """Computes Pillow's luminance (ITU-R 601-2), `[H, W, 1]`; an image of one channel is grey already."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = jnp.split(image, 3, -1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _smooth(image: jax.Array) -> jax.Array:
    """Computes `ImageFilter.SMOOTH`: 5 times the pixel plus its 8 neighbours, over 13, rounded; the border stays."""
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _blend(
    degenerate: jax.Array | int, image: jax.Array, magnitude: jax.Array
) -> jax.Array:
    """Computes `Image.blend`: degenerate + factor (image − degenerate), truncated; factor 1.8 magnitude / 10 + 0.1."""
    gain = (5 + 9 * magnitude) * (
        image - degenerate
    )  # in 50ths, of which every factor is a whole number
    result = (50 * degenerate + gain) // 50
    # Pillow's float32 is a little below 1.18, hence below a whole gain, and the sum is truncated to one less where
    # it has no more bits than the gain (else it is rounded up). Of no other factor does the rounding show.
    short = (magnitude == 6) & (gain > 0) & (gain % 50 == 0)
    result -= short & (jax.lax.clz(result - 1) == jax.lax.clz(gain // 50 - 1))
    return jnp.clip(result, 0, 255)
