"""The CIFAR ResNets of the distillation literature."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models.linear import linear

NARROW = (16, 16, 32, 64)  # channels of the stem and of the three stages
WIDE = (32, 64, 128, 256)

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class CifarResNet(nn.Module):
    """ResNet for small images: a 3×3 stem, three stages of (depth − 2) / 6 basic blocks, one linear layer.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, in the variant of
    the common CIFAR distillation zoo: projections (1×1 convolution and batch norm) where the shape changes.
    Kaiming fan-out initialisation. Any image size and channel count.

    Attributes:
      depth: 6n + 2.
      widths: channels of the stem and the stages.
      num_classes: number of logits.
      dtype: of activations; None follows the input.
      precision: of convolutions and matmuls.
      axis_name: device axis of batch norm's statistics.
    """

    depth: int
    widths: tuple[int, int, int, int] = NARROW
    num_classes: int = 100
    dtype: Any = None
    precision: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[B, num_classes]` of float images `[B, H, W, channels]`."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6n + 2")
        x = images if self.dtype is None else images.astype(self.dtype)
        x = nn.relu(self._norm(train, "stem_norm")(self._conv(self.widths[0], 3, 1, "stem")(x)))
        for stage, width in enumerate(self.widths[1:]):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self._block(x, width, stride, train, f"stage{stage + 1}_block{block + 1}")
        x = x.mean(axis=(1, 2))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return linear(x, self.num_classes, precision=self.precision, name="classifier")

    def _block(self, x, width, stride, train, name):
        y = nn.relu(self._norm(train, f"{name}_norm1")(self._conv(width, 3, stride, f"{name}_conv1")(x)))
        y = self._norm(train, f"{name}_norm2")(self._conv(width, 3, 1, f"{name}_conv2")(y))
        if x.shape != y.shape:
            x = self._norm(train, f"{name}_norm3")(self._conv(width, 1, stride, f"{name}_conv3")(x))
        return nn.relu(x + y)

    def _conv(self, width, size, stride, name):
        # Explicit padding: "SAME" would pad a strided convolution on one side only.
        return nn.Conv(
            width,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=_conv_init,
            name=name,
        )

    def _norm(self, train, name):
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,  # E[x²] − E[x]² cancels
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )
