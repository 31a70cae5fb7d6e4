"""Resizes images of differing sizes to one: the centre for evaluation, a random crop for training."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_AREA = (0.08, 1.0)  # of a random crop, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # of its sides
_TRIES = 10
_MARGIN = (
    0.875  # share of the shorter side that an evaluation with a margin sees: 224 of 256
)


def in_mode(image: "Image.Image", channels: int) -> "Image.Image":
    """Converts a Pillow image to grey for one channel, else to RGB, which includes palette and CMYK images.

    Raises:
      ValueError: values of more than 8 bits whose range is not known (32-bit integers, floating point).
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16"):
        # Pillow would cut off what is above 255.
        image = Image.fromarray(
            (np.asarray(image, np.float64) / 257).round().astype(np.uint8)
        )
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode is {image.mode!r}: save it with 8 or 16 bits")
    return image if image.mode == mode else image.convert(mode)


def center(image: "Image.Image", size: int, *, margin: bool) -> np.ndarray:
    """Returns the square in the middle of an image, resized, uint8 `[size, size, C]`.

    Args:
      image: a Pillow image.
      size: side of the result.
      margin: whether the square is 0.875 of the shorter side (224 of 256, ImageNet's habit) or all of it.

    >>> from PIL import Image
    >>> center(Image.new("RGB", (40, 20)), 8, margin=True).shape
    (8, 8, 3)
    """
    width, height = image.size
    side = min(width, height) * (_MARGIN if margin else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, (left, top, left + side, top + side), size)


def random_crop(
    image: "Image.Image", size: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a random part of an image, resized, and mirrored in half of the cases, uint8 `[size, size, C]`.

    Its area is uniform in 8 to 100 % of the image, the logarithm of its aspect ratio uniform between those of 3/4 and
    4/3. Where no such part fits in ten tries, it is the largest in the middle with an allowed ratio.
    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, in torchvision's form.

    Args:
      image: a Pillow image.
      size: side of the result.
      rng: the only source of randomness.

    >>> from PIL import Image
    >>> random_crop(Image.new("RGB", (40, 20)), 8, np.random.default_rng(0)).shape
    (8, 8, 3)
    """
    crop = _resized(image, _draw_box(*image.size, rng), size)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _draw_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREA)
        ratio = np.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return left, top, left + w, top + h
    ratio = np.clip(width / height, *_RATIO)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resized(
    image: "Image.Image", box: tuple[float, float, float, float], size: int
) -> np.ndarray:
    from PIL import Image

    left, top, right, bottom = map(float, box)
    pixels = np.asarray(
        image.resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
    )
    return pixels if pixels.ndim == 3 else pixels[..., None]
