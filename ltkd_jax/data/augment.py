"""Augments images on the device: each (crop offset, flip) is a numbered view; other augmentation is drawn on top."""

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
    """The views of an image: crops at each of (2·pad+1)² offsets after zero padding, and their mirror images.

    View v is `(dy · (2·pad+1) + dx) · F + flip`, with F = 2 if `flip` else 1; dy and dx in 0..2·pad are the
    top and left edge of the crop in the padded image. Hashable, so it can be a static argument of `jit`.

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
        """The number of views."""
        return (2 * self.pad + 1) ** 2 * self.flips

    @property
    def identity(self) -> int:
        """The view that leaves an image as it is: the centre crop, not flipped."""
        return (self.pad * (2 * self.pad + 1) + self.pad) * self.flips

    @property
    def flips(self) -> int:
        """2 with mirror images, else 1."""
        return 2 if self.flip else 1


@dataclasses.dataclass(frozen=True)
class Extra:
    """Describes random augmentation beyond the views. With any of it the views of an image cannot be enumerated.

    Attributes:
      policy: "none", or "autoaugment", see `autoaugment.auto_augment`.
      cutout: side of the blackened square, see `autoaugment.cutout`; 0 for none.
      mixup: α of the Beta(α, α) distribution of an image's share in a mixture of two; 0 for none.
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


NOTHING = Extra()


def apply_extra(images: jax.Array, bits: Array | None, extra: Extra) -> jax.Array:
    """Applies AutoAugment and then Cutout, if `extra` has them.

    Args:
      images: uint8 `[B, H, W, C]`.
      bits: uint32 `[B]`, the only source of randomness; may be None where nothing is drawn.
      extra: which of them to apply (static).
    """
    if extra.policy == "none" and not extra.cutout:
        return images
    assert bits is not None  # it may be None only where nothing is drawn
    if extra.policy == "autoaugment":
        images = autoaugment.auto_augment(images, bits)
    return (
        autoaugment.cutout(images, bits, size=extra.cutout) if extra.cutout else images
    )


def mixup_share(bits: Array, alpha: float) -> jax.Array:
    """Draws each image's share in a mixture of two from Beta(α, α), `[B]`.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; here each image has its own.
    """
    keys = jax.vmap(lambda word: jax.random.fold_in(jax.random.key(2), word))(bits)
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def mix(images: jax.Array, others: jax.Array, share: jax.Array) -> jax.Array:
    """Returns share · images + (1 − share) · others, float `[B, H, W, C]`, for a share `[B]`."""
    share = share[:, None, None, None].astype(images.dtype)
    return share * images + (1.0 - share) * others


def apply(images: jax.Array, view: Array, views: Views) -> jax.Array:
    """Returns view `view[b]` of `images[b]`, uint8 `[B, H, W, C]`; padding is black before normalisation.

    Args:
      images: uint8 `[B, H, W, C]`.
      view: int32 `[B]` in [0, views.num). A value outside is not detected under jit: draw below `views.num`.
      views: which views there are (static).

    Raises:
      AssertionError: for a wrong dtype or rank, or a different B.

    >>> image = jnp.arange(2, dtype=jnp.uint8).reshape(1, 1, 2, 1)
    >>> apply(image, jnp.array([1]), Views(pad=0, flip=True)).ravel().tolist()
    [1, 0]
    """
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank([images, view], [4, 1])
    chex.assert_equal_shape_prefix([images, view], 1)
    if not views.pad and not views.flip:
        return images
    pad = views.pad
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offset, flip = jnp.divmod(view, views.flips)
    dy, dx = jnp.divmod(offset, 2 * pad + 1)

    def crop(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (y, x, jnp.zeros_like(y)), images.shape[1:])

    crops = jax.vmap(crop)(padded, dy, dx)
    if not views.flip:
        return crops
    return jnp.where(flip.astype(bool)[:, None, None, None], crops[:, :, ::-1], crops)


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns (x / 255 − mean) / std, `[B, H, W, C]` of `dtype`, computed in float32.

    Args:
      images: uint8 `[B, H, W, C]`.
      mean: of each channel, `[C]`, on the [0, 1] scale.
      std: of each channel, `[C]`, on the [0, 1] scale.
      dtype: dtype of the result.

    Raises:
      AssertionError: for a wrong dtype or rank, or a number of means that is not the number of channels.

    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,)).item()
    2.0
    """
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank(images, 4)
    shift, scale = (jnp.asarray(x, jnp.float32) for x in (mean, std))
    chex.assert_shape([shift, scale], (images.shape[-1],))
    shift, scale = shift[None, None, None], scale[None, None, None]
    return ((images.astype(jnp.float32) / 255 - shift) / scale).astype(dtype)
