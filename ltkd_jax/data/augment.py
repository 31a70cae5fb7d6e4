"""Augments images on the device; of this, features have Mixup and normalisation.

Each combination of a crop offset and a flip is a numbered view. AutoAugment, Cutout and
Mixup are drawn beyond the views.
"""

import dataclasses
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltkd_jax.data import autoaugment
from ltkd_jax.data.sampling import Array

POLICIES = ("none", "autoaugment")


@dataclasses.dataclass(frozen=True)
class Views:
    """Numbers the views of an image: crops after zero padding, and their mirror images.

    There is a crop at each of (2·pad+1)² offsets. View number v is

        v = (dy · (2·pad+1) + dx) · F + flip,

    with F = 2 if `flip` else 1. dy and dx, in 0 to 2·pad, are the top and left edge of
    the crop in the padded image. A `Views` is hashable, so it can be a static argument
    of `jit`.

    Attributes:
      pad: number of black pixels added at each side before the crop.
      flip: whether there are mirror images.

    >>> Views(pad=4, flip=True).num, Views(pad=4, flip=True).identity
    (162, 80)
    """

    pad: int
    flip: bool

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad={self.pad}: give 0 (no crop) or more pixels")

    @property
    def num(self) -> int:
        """Returns the number of views."""
        return (2 * self.pad + 1) ** 2 * self.num_flips

    @property
    def identity(self) -> int:
        """Returns the view that leaves an image unchanged: the centre crop, no flip."""
        return (self.pad * (2 * self.pad + 1) + self.pad) * self.num_flips

    @property
    def num_flips(self) -> int:
        """Returns F: 2 with mirror images, else 1."""
        return 2 if self.flip else 1

    def of_unchanged(self, logits: Array) -> Array:
        """Returns the logits `[N, C]` of unchanged images.

        Args:
          logits: `[N, num, C]` of all views, or `[N, 1, C]` of unchanged images.
        """
        return logits[:, self.identity if logits.shape[1] > 1 else 0]


@dataclasses.dataclass(frozen=True)
class Extra:
    """Describes random augmentation beyond the views.

    With any of it the possible inputs of an image can no longer be enumerated.

    Attributes:
      policy: "none", or "autoaugment", see `autoaugment.auto_augment`.
      cutout: side of the black square in pixels, see `autoaugment.cutout`; 0 for none.
      mixup: α of Beta(α, α), from which λ of Mixup is drawn, see `mixup_lam`; 0 for no
        Mixup.
    """

    policy: str = "none"
    cutout: int = 0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy={self.policy!r} must be one of {', '.join(POLICIES)}"
            )
        if self.cutout < 0 or not 0 <= self.mixup < float("inf"):
            raise ValueError(
                f"cutout={self.cutout} and mixup={self.mixup} must not be negative"
            )


NO_EXTRA = Extra()


def apply_extra(
    images: jax.Array, random_bits: Array | None, extra: Extra
) -> jax.Array:
    """Applies AutoAugment and then Cutout, where `extra` has them.

    Args:
      images: uint8 `[B, H, W, channels]`.
      random_bits: uint32 `[B]`, the only source of randomness; may be None where
        nothing is drawn.
      extra: what to apply (static).

    Returns:
      uint8 `[B, H, W, channels]`.
    """
    if extra.policy == "none" and not extra.cutout:
        return images
    assert random_bits is not None
    if extra.policy == "autoaugment":
        images = autoaugment.auto_augment(images, random_bits)
    if extra.cutout:
        images = autoaugment.cutout(images, random_bits, size=extra.cutout)
    return images


def mixup_lam(random_bits: Array, alpha: float) -> jax.Array:
    """Draws Mixup's λ for each image from Beta(α, α).

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. There
    a batch has one λ; here each image has its own.

    Args:
      random_bits: uint32 `[B]`, the only source of randomness.
      alpha: α > 0.

    Returns:
      float32 `[B]` in [0, 1].
    """
    # A key of its own, so that λ is independent of AutoAugment's draws from the bits.
    key = jax.random.key(2)

    def draw(bits: Array) -> jax.Array:
        return jax.random.beta(jax.random.fold_in(key, bits), alpha, alpha)

    return jax.vmap(draw)(random_bits)


def mix(images: jax.Array, partner_images: jax.Array, lam: jax.Array) -> jax.Array:
    """Computes Mixup's λ · images + (1 − λ) · partner images.

    Args:
      images: float `[B, H, W, channels]`, or features `[B, D]`.
      partner_images: of the same shape.
      lam: λ, `[B]`.

    Returns:
      float, of the same shape.
    """
    lam = jnp.expand_dims(lam, range(1, images.ndim)).astype(images.dtype)
    return lam * images + (1.0 - lam) * partner_images


def apply_views(images: jax.Array, view: Array, views: Views) -> jax.Array:
    """Returns view `view[b]` of `images[b]`, uint8 `[B, H, W, channels]`.

    The padding is black, before normalisation. Where there is one view only, the images
    are returned as they are, and may be features.

    Args:
      images: uint8 `[B, H, W, channels]`.
      view: int32 `[B]` in [0, views.num). Under `jit`, a value outside is not detected.
      views: the numbering (static).

    Raises:
      AssertionError: a wrong dtype, a wrong rank, or a different B.

    >>> image = jnp.arange(2, dtype=jnp.uint8).reshape(1, 1, 2, 1)
    >>> apply_views(image, jnp.array([1]), Views(pad=0, flip=True)).ravel().tolist()
    [1, 0]
    """
    if views.num == 1:
        return images
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank([images, view], [4, 1])
    chex.assert_equal_shape_prefix([images, view], 1)
    pad = views.pad
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offset, flip = jnp.divmod(view, views.num_flips)
    dy, dx = jnp.divmod(offset, 2 * pad + 1)

    def crop(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
        # dynamic_slice needs start indices of one dtype, that of y.
        start = (y, x, jnp.zeros_like(y))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    crops = jax.vmap(crop)(padded, dy, dx)
    if not views.flip:
        return crops
    is_flipped = flip.astype(bool)[:, None, None, None]
    return jnp.where(is_flipped, crops[:, :, ::-1], crops)


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Computes (x / 255 − mean) / std in float32, and casts it to `dtype`.

    Features are not divided by 255.

    Args:
      images: uint8 `[B, H, W, channels]`, or features, float32 `[B, D]`.
      mean: of each channel on the [0, 1] scale, or of each column.
      std: likewise.
      dtype: of the result.

    Returns:
      An array of the same shape, of `dtype`.

    Raises:
      AssertionError: a wrong dtype, a wrong rank, or a number of means that is not the
        number of channels or columns.

    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,)).item()
    2.0
    >>> normalize(jnp.array([[3.0, 5.0]]), (1.0, 9.0), (2.0, 4.0)).tolist()
    [[1.0, -1.0]]
    """
    are_features = images.ndim == 2
    chex.assert_type(images, jnp.float32 if are_features else jnp.uint8)
    chex.assert_rank(images, {2, 4})
    values = images if are_features else images.astype(jnp.float32) / 255
    shift = jnp.asarray(mean, jnp.float32)
    scale = jnp.asarray(std, jnp.float32)
    chex.assert_shape([shift, scale], (images.shape[-1],))
    # Explicit axes, so that it also works where rank promotion is an error.
    leading_axes = range(images.ndim - 1)
    shift = jnp.expand_dims(shift, leading_axes)
    scale = jnp.expand_dims(scale, leading_axes)
    return ((values - shift) / scale).astype(dtype)
