"""Resizes images of different sizes to one size.

The centre is used for evaluation, and a random crop for training.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Of a random crop: the area, as a fraction of the image, and the aspect ratio.
_AREA_RANGE = (0.08, 1.0)
_RATIO_RANGE = (3 / 4, 4 / 3)
_MAX_TRIES = 10
# The fraction of the shorter side that a centre crop with a margin keeps: 224 of 256.
_MARGIN_SCALE = 0.875


def convert_mode(image: "Image.Image", channels: int) -> "Image.Image":
    """Converts a Pillow image to 8-bit grey or RGB.

    Args:
      image: of any mode, palette and CMYK included.
      channels: 1 for grey, 3 for RGB.

    Raises:
      ValueError: the image has 32-bit integers or floating-point numbers, whose range
        is not known.
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255 instead of scaling.
        scaled = (np.asarray(image, np.float64) / 257).round()
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode is {image.mode!r}: save it with 8 or 16 bits")
    return image if image.mode == mode else image.convert(mode)


def make_upright(image: "Image.Image") -> "Image.Image":
    """Returns a Pillow image, turned and mirrored as its EXIF orientation says.

    An image that is upright, or whose EXIF data cannot be read, is returned itself.
    """
    from PIL import ExifTags, ImageOps

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever Pillow raises for damaged EXIF data
        return image
    if orientation not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def center_crop(image: "Image.Image", size: int, *, margin: bool) -> np.ndarray:
    """Returns the square in the middle of an image, resized, uint8 `[size, size, C]`.

    Args:
      image: a Pillow image of mode L or RGB.
      size: side of the result.
      margin: whether the square's side is 0.875 of the image's shorter side (224 of
        256, the custom for ImageNet) or all of it.

    >>> from PIL import Image
    >>> center_crop(Image.new("RGB", (40, 20)), 8, margin=True).shape
    (8, 8, 3)
    """
    width, height = image.size
    side = min(width, height) * (_MARGIN_SCALE if margin else 1.0)
    left = (width - side) / 2
    top = (height - side) / 2
    return _resize(image, (left, top, left + side, top + side), size)


def random_crop(
    image: "Image.Image", size: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a random crop of an image, resized, uint8 `[size, size, C]`.

    The crop's area is uniform in 8 to 100 % of the image, and the logarithm of its
    aspect ratio is uniform between those of 3/4 and 4/3. If ten draws do not fit into
    the image, the crop is the largest one in the middle whose ratio is in that range.
    Half of the crops are mirrored.

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, in
    torchvision's form (`RandomResizedCrop`).

    Args:
      image: a Pillow image of mode L or RGB.
      size: side of the result.
      rng: the only source of randomness.

    >>> from PIL import Image
    >>> random_crop(Image.new("RGB", (40, 20)), 8, np.random.default_rng(0)).shape
    (8, 8, 3)
    """
    crop = _resize(image, _draw_box(*image.size, rng), size)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _draw_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draws the left, top, right and bottom edge of a crop."""
    for _ in range(_MAX_TRIES):
        area = width * height * rng.uniform(*_AREA_RANGE)
        ratio = np.exp(rng.uniform(*np.log(_RATIO_RANGE)))
        crop_width = round(np.sqrt(area * ratio))
        crop_height = round(np.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = rng.integers(0, width - crop_width + 1)
            top = rng.integers(0, height - crop_height + 1)
            return left, top, left + crop_width, top + crop_height
    ratio = np.clip(width / height, *_RATIO_RANGE)
    crop_width = min(width, round(height * ratio))
    crop_height = min(height, round(width / ratio))
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _resize(
    image: "Image.Image", box: tuple[float, float, float, float], size: int
) -> np.ndarray:
    """Returns the pixels inside of `box`, resized to `[size, size, C]`."""
    from PIL import Image

    # Pillow takes no NumPy numbers.
    left, top, right, bottom = map(float, box)
    resized = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    pixels = np.asarray(resized)
    # A grey image has no channel axis.
    return pixels if pixels.ndim == 3 else pixels[..., None]
