"""Computes AutoAugment's CIFAR-10 policy and Cutout on the device, as Pillow does.

Every pixel is computed in int32, so that it is the same byte on every device, however
XLA fuses the operations.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ltkd_jax.data.sampling import Array

# The 25 sub-policies for CIFAR-10 from the appendix of AutoAugment's paper
# (https://arxiv.org/abs/1805.09501): twice (operation, probability, magnitude). The
# official code (tensorflow/models, research/autoaugment, `good_policies`) draws from
# 95, which include these except numbers 15 to 19.
POLICY = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
    (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)
# The first 8 replace each value of a pixel by another, in the order of `_lookup_table`.
OPS = (
    "Identity",
    "Invert",
    "Solarize",
    "Posterize",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Contrast",
    "Color",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
OP_INDEX = {name: index for index, name in enumerate(OPS)}
# A seed for each use of an image's random bits, so that the draws are independent.
_SEEDS = {"auto_augment": 0x6175746F, "cutout": 0x6375746F}


def auto_augment(images: jax.Array, random_bits: Array) -> jax.Array:
    """Applies one of the 25 sub-policies to each image.

    A sub-policy is two operations, applied one after the other, each with its
    probability. The result for an image depends on its pixels and its random bits
    only, not on its batch or device.

    Args:
      images: uint8 `[B, H, W, channels]`, 1 or 3 channels.
      random_bits: uint32 `[B]`, the only source of randomness.

    Returns:
      uint8 `[B, H, W, channels]`.

    Raises:
      AssertionError: a wrong dtype, rank or number of channels, or a different B.

    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> jax.eval_shape(auto_augment, images, jnp.zeros(2, jnp.uint32)).shape
    (2, 32, 32, 3)
    """
    chex.assert_rank([images, random_bits], [4, 1])
    sub_policy, is_applied, is_negative = draw_sub_policies(random_bits)
    ops, _, magnitudes = _policy_arrays()
    # All `[B, 2]`, one column for each of the two operations.
    op = jnp.where(is_applied, jnp.asarray(ops)[sub_policy], OP_INDEX["Identity"])
    magnitude = jnp.asarray(magnitudes)[sub_policy]

    def apply(
        images: jax.Array, operation: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        return apply_ops(images, *operation), None

    # A scan instead of two calls compiles in half the time, and keeps XLA from
    # computing the first result again wherever the second operation uses it.
    operations = (op.T, magnitude.T, is_negative.T)
    images, _ = jax.lax.scan(apply, images, operations)
    return images


def draw_sub_policies(random_bits: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws what `auto_augment` does with each image.

    Args:
      random_bits: uint32 `[B]`.

    Returns:
      (sub-policy, is_applied, is_negative): the index of the sub-policy, int32 `[B]`,
      uniform over the 25; whether each of its operations is applied, bool `[B, 2]`; and
      whether their magnitudes are negative, bool `[B, 2]`, with probability 1/2 as in
      the official code.

    >>> draws = jax.eval_shape(draw_sub_policies, jnp.zeros(3, jnp.uint32))
    >>> [x.shape for x in draws]
    [(3,), (3, 2), (3, 2)]
    """
    uniform = _uniform("auto_augment", random_bits, 5)
    sub_policy = (uniform[:, 0] * len(POLICY)).astype(jnp.int32)
    _, probabilities, _ = _policy_arrays()
    probability = jnp.asarray(probabilities, jnp.float32)[sub_policy]
    return sub_policy, uniform[:, 1:3] < probability, uniform[:, 3:] >= 0.5


def cutout(images: jax.Array, random_bits: Array, *, size: int) -> jax.Array:
    """Blackens a square in each image, at a uniformly drawn centre.

    The square is clipped at the border. With a centre in row y it covers `size` rows
    from `y - size // 2` on, and columns likewise.

    Source: DeVries and Taylor, Cutout, https://arxiv.org/abs/1708.04552. The authors'
    code masks after normalisation, which fills with the mean. Here the fill is 0 before
    normalisation, as in a crop's padding, and an odd size is not rounded down.

    Args:
      images: uint8 `[B, H, W, channels]`.
      random_bits: uint32 `[B]`, the only source of randomness. They may be those of
        `auto_augment`: the draws are independent.
      size: side of the square in pixels (static); 0 changes nothing.

    Returns:
      uint8 `[B, H, W, channels]`.

    Raises:
      AssertionError: a wrong dtype or rank, or a different B.
      ValueError: a negative size.

    >>> images = jnp.ones((1, 2, 2, 1), jnp.uint8)
    >>> cutout(images, jnp.zeros(1, jnp.uint32), size=4).sum().item()
    0
    """
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank([images, random_bits], [4, 1])
    chex.assert_equal_shape_prefix([images, random_bits], 1)
    if size < 0:
        raise ValueError(f"size={size}: give 0 (no cutout) or more pixels")
    _, height, width, _ = images.shape
    uniform = _uniform("cutout", random_bits, 2)
    centre = (uniform * jnp.array([[height, width]])).astype(jnp.int32)
    start = centre - size // 2

    def is_covered(start: jax.Array, side: int) -> jax.Array:
        pixel = jnp.arange(side)[None]
        return (pixel >= start[:, None]) & (pixel < start[:, None] + size)

    rows = is_covered(start[:, 0], height)
    columns = is_covered(start[:, 1], width)
    square = rows[:, :, None] & columns[:, None]
    return jnp.where(square[..., None], jnp.uint8(0), images)


def apply_ops(
    images: jax.Array, op: jax.Array, magnitude: jax.Array, is_negative: jax.Array
) -> jax.Array:
    """Applies operation `OPS[op[b]]` to `images[b]`, byte for byte as Pillow 13 does.

    The reference is Pillow on x86-64. A magnitude m means what it does in the official
    code (tensorflow/models, `augmentation_transforms.py`):

      ShearX, ShearY          ± 0.3 m / 10; pixels from outside are black
      TranslateX, TranslateY  ± m pixels; pixels from outside are black
      Rotate                  ± int(30 m / 10) degrees, nearest neighbour; likewise
      Solarize                inverts values from 256 − int(256 m / 10) on
      Posterize               keeps 4 − int(4 m / 10) bits
      Brightness, Contrast,   1.8 m / 10 + 0.1 is the factor of Pillow's
      Color, Sharpness        `ImageEnhance`
      Identity, Invert, AutoContrast, Equalize  do not use m

    In the official code, a pixel from outside that is still transparent at the end gets
    the mean colour; here it is black. Other ports, such as torchvision's, give the
    magnitudes other meanings.

    Args:
      images: uint8 `[B, H, W, channels]`, 1 or 3 channels. With 1, Color is the
        identity, as for Pillow's mode L.
      op: int `[B]`, indices into `OPS`. Under `jit`, values outside of the range of
        `op` or `magnitude` are not detected.
      magnitude: int `[B]` in 0..9.
      is_negative: bool `[B]`, the sign of a shear, a translation or a rotation.

    Returns:
      uint8 `[B, H, W, channels]`.

    Raises:
      AssertionError: a wrong dtype, rank or number of channels, or a different B.

    >>> white = jnp.full((1, 1, 1, 1), 255, jnp.uint8)
    >>> invert = jnp.array([OP_INDEX["Invert"]])
    >>> jax.jit(apply_ops)(white, invert, jnp.array([0]), jnp.array([False])).item()
    0
    """
    arguments = [images, op, magnitude, is_negative]
    chex.assert_type(arguments, [jnp.uint8, int, int, bool])
    chex.assert_rank(arguments, [4, 1, 1, 1])
    chex.assert_equal_shape_prefix(arguments, 1)
    chex.assert_axis_dimension_comparator(images, -1, (1, 3).__contains__, "be 1 or 3")
    height, width = images.shape[1:3]
    matrices = jnp.asarray(_warp_matrices(height, width))
    matrix = matrices[op, magnitude, is_negative.astype(jnp.int32)]
    return jax.vmap(_apply_op)(images, op, magnitude, matrix)


def _policy_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the operations, probabilities and magnitudes of `POLICY`, `[25, 2]`."""
    operations = itertools.chain.from_iterable(POLICY)
    names, probabilities, magnitudes = zip(*operations)
    shape = (len(POLICY), 2)
    ops = np.array([OP_INDEX[name] for name in names]).reshape(shape)
    return ops, np.reshape(probabilities, shape), np.reshape(magnitudes, shape)


def _uniform(use: str, random_bits: Array, number: int) -> jax.Array:
    """Draws uniform numbers in [0, 1), float32 `[B, number]`, by threefry.

    The generator does not depend on JAX's default, which a user may change.
    """
    chex.assert_type(random_bits, jnp.uint32)
    key = jax.random.key(_SEEDS[use], impl="threefry2x32")

    def draw(bits: Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, bits), (number,), jnp.float32)

    return jax.vmap(draw)(random_bits)


def _apply_op(
    image: jax.Array, op: jax.Array, magnitude: jax.Array, matrix: jax.Array
) -> jax.Array:
    """Applies one operation to an image `[H, W, channels]`.

    Every operation is a warp, a look-up and a blend, of which at most one is not the
    identity. This costs less than a branch for each operation, since under `vmap` all
    branches would be computed.
    """
    image = image.astype(jnp.int32)
    channel = jnp.arange(image.shape[-1])[None, None]
    # The table and the degenerate image are those of the input, not of the result of
    # the step before: where they are used, that step is the identity.
    table = _lookup_table(image, op, magnitude)
    result = table[_warp(image, matrix), channel]
    is_color = op == OP_INDEX["Color"]
    is_sharpness = op == OP_INDEX["Sharpness"]
    degenerate = jnp.where(is_color, _grey(image), _smooth(image))
    # Magnitude 5 is a factor of 1: the blend is the identity.
    blend_magnitude = jnp.where(is_color | is_sharpness, magnitude, 5)
    return _blend(degenerate, result, blend_magnitude).astype(jnp.uint8)


@functools.cache
def _warp_matrices(height: int, width: int) -> np.ndarray:
    """Returns the warp of each operation, magnitude and sign, int32 `[15, 10, 2, 6]`.

    A warp (a, b, c, d, e, f) maps pixel (x, y) of the result to its source

        x' = (a x + b y + c) >> 16,    y' = (d x + e y + f) >> 16,

    in the fixed-point numbers of Pillow's C code.
    """
    a, b, c, d, e, f = range(6)
    # `[10, 2]`, of each magnitude and sign.
    amount = np.arange(10)[:, None] * np.array([1, -1])[None]
    matrix = np.zeros((len(OPS), 10, 2, 6))
    matrix[..., [a, e]] = 1
    matrix[OP_INDEX["ShearX"], ..., b] = amount * 0.3 / 10
    matrix[OP_INDEX["ShearY"], ..., d] = amount * 0.3 / 10
    matrix[OP_INDEX["TranslateX"], ..., c] = amount
    matrix[OP_INDEX["TranslateY"], ..., f] = amount
    # Pillow rounds to 15 digits, so that right angles are exact.
    angle = np.radians(3 * amount)
    cos = np.cos(angle).round(15)
    sin = np.sin(angle).round(15)
    x = width / 2
    y = height / 2
    rotation = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    matrix[OP_INDEX["Rotate"]] = np.stack(rotation, -1)
    # The map is of the pixels' centres, half a pixel from their corners.
    matrix[..., [c, f]] += (matrix[..., [a, d]] + matrix[..., [b, e]]) / 2
    return np.floor(matrix * 65536 + 0.5).astype(np.int32)


def _warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns the nearest source of each pixel, and black where that is outside."""
    height, width, channels = image.shape
    x = jnp.arange(width)[None]
    y = jnp.arange(height)[:, None]
    source_x = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    source_y = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    is_inside_x = (source_x >= 0) & (source_x < width)
    is_inside_y = (source_y >= 0) & (source_y < height)
    is_inside = is_inside_x & is_inside_y
    source = jnp.where(is_inside, source_y * width + source_x, 0)
    pixels = image.reshape(-1, channels)[source]
    return jnp.where(is_inside[..., None], pixels, 0)


def _lookup_table(image: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Returns what replaces each value of a pixel, int32 `[256, channels]`.

    That is the value itself unless `op` is one of the first of `OPS`.
    """
    value = jnp.arange(256)[:, None]
    solarized = jnp.where(value < 256 - 256 * magnitude // 10, value, 255 - value)
    # −16 keeps the 4 highest of 8 bits; shifted, it keeps fewer.
    posterized = value & (-16 << (4 * magnitude // 10))
    # Contrast blends with the mean of the grey image, rounded as int(mean + 1/2).
    grey = _grey(image)
    double_sum = 2 * jnp.sum(grey, dtype=jnp.int32)
    mean = (double_sum + grey.size) // (2 * grey.size)
    low = image.min((0, 1))[None]
    high = image.max((0, 1))[None]
    tables = (
        value,
        255 - value,
        solarized,
        posterized,
        _autocontrast(value, low, high),
        _equalize(value, image),
        _blend(0, value, magnitude),
        _blend(mean, value, magnitude),
    )
    # Stacked and indexed, not selected by `where`: XLA fuses that into the look-up, and
    # would then compute all tables for each pixel.
    shape = (256, image.shape[-1])
    stacked = jnp.stack([jnp.broadcast_to(table, shape) for table in tables])
    return stacked[jnp.where(op < len(tables), op, 0)]


def _autocontrast(value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Computes `ImageOps.autocontrast`: int(255 (value − low) / (high − low)).

    Where low = high, it is the identity.
    """
    span = jnp.maximum(high - low, 1)
    scaled = 255 * (value - low)
    stretched = scaled // span
    # Where the quotient is a whole number, Pillow's float64 may be just below it, and
    # is then truncated to one less. n counts the whole quotients from `low` on.
    gcd = jnp.asarray(np.gcd(np.arange(256), 255))[span]
    n = jnp.clip(stretched * gcd // 255, 0, 31)
    is_short = (jnp.asarray(_short_quotients())[low, high] >> n) & 1
    stretched -= jnp.where(scaled % span == 0, is_short, 0)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), value)


@functools.cache
def _short_quotients() -> np.ndarray:
    """Returns the whole quotients that Pillow's `autocontrast` makes one too small.

    Over the values of a range, 255 (value − low) / (high − low) is a whole number at
    every step of (high − low) / gcd(high − low, 255). Pillow multiplies by the rounded
    255 / (high − low), subtracts and truncates. In 5,958 of the 32,640 ranges some
    whole numbers become one less, mostly the largest: 254 for 255. None of them is
    beyond the 17th.

    Returns:
      int32 `[256, 256]`, by low and high: bit n is set if the n-th is too small.
    """
    low, high = np.indices((256, 256))
    span = np.maximum(high - low, 1)
    scale = 255 / span
    short = np.zeros((256, 256), np.int32)
    for n in range(18):
        value = np.minimum(low + n * (span // np.gcd(span, 255)), high)
        in_pillow = np.int32(value * scale + -low * scale)
        short |= (in_pillow < 255 * (value - low) // span) << n
    return short


def _equalize(value: jax.Array, image: jax.Array) -> jax.Array:
    """Computes `ImageOps.equalize`.

    A value becomes the number of smaller ones in the image, divided by 1/255 of the
    number of all but the largest.
    """
    channel = jnp.arange(image.shape[-1])[None, None]
    count = jnp.zeros((256, image.shape[-1]), jnp.int32).at[image, channel].add(1)
    num_smaller = jnp.cumsum(count, 0) - count
    is_not_largest = image < image.max((0, 1))[None, None]
    step = jnp.sum(is_not_largest, (0, 1), dtype=jnp.int32)[None] // 255
    equalized = (step // 2 + num_smaller) // jnp.maximum(step, 1)
    # As in Pillow, nothing changes if fewer than 255 pixels are below the largest.
    return jnp.where(step > 0, jnp.minimum(equalized, 255), value)


def _grey(image: jax.Array) -> jax.Array:
    """Computes Pillow's luminance (ITU-R 601-2), `[H, W, 1]`."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = jnp.split(image, 3, -1)
    # Pillow's weights 0.299, 0.587 and 0.114 times 2¹⁶, rounded to nearest by 2¹⁵.
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _smooth(image: jax.Array) -> jax.Array:
    """Computes `ImageFilter.SMOOTH`.

    A pixel becomes (5 times itself plus its 8 neighbours) / 13, rounded; the border
    does not change.
    """
    column_sums = image[:-2] + image[1:-1] + image[2:]
    sums = column_sums[:, :-2] + column_sums[:, 1:-1] + column_sums[:, 2:]
    total = sums + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _blend(
    degenerate: jax.Array | int, image: jax.Array, magnitude: jax.Array
) -> jax.Array:
    """Computes `Image.blend`: degenerate + factor · (image − degenerate), truncated.

    The factor is 1.8 · magnitude / 10 + 0.1.
    """
    # In 50ths, of which every factor is a whole number.
    gain = (5 + 9 * magnitude) * (image - degenerate)
    result = (50 * degenerate + gain) // 50
    # Magnitude 6 is the one whose rounding shows: Pillow's float32 is a little below
    # 1.18, hence below a whole gain. The sum is then truncated to one less if it has no
    # more bits than the gain; if it has, float32 rounds it up.
    is_short = (magnitude == 6) & (gain > 0) & (gain % 50 == 0)
    is_short &= jax.lax.clz(result - 1) == jax.lax.clz(gain // 50 - 1)
    return jnp.clip(result - is_short, 0, 255)
