"""What the networks share: layers, and of the image classifiers all but the way from images to a feature map."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import PrecisionLike
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ltkd_jax.models.linear import linear, uniform_by_fan_in

kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Initialisers(NamedTuple):
    """Of convolutions' kernels and of the classifier's kernel and bias; a bias of None is uniform in ±1/√fan_in."""

    conv: Initializer = kaiming_fan_out
    kernel: Initializer = uniform_by_fan_in
    bias: Initializer | None = None


class Layers(nn.Module, kw_only=True):
    """Convolutions and batch norm as all networks here have them.

    Attributes:
      dtype: of activations; None follows the input.
      precision: of convolutions and matmuls.
      axis_name: device axis of batch norm's statistics.
    """

    dtype: DTypeLike | None = None
    precision: PrecisionLike = None
    axis_name: str | None = None

    initialisers: ClassVar[Initialisers] = Initialisers()

    def conv(
        self,
        x: jax.Array,
        width: int,
        size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        name: str,
    ) -> jax.Array:
        """A square convolution, padded so that stride 1 keeps the image's size."""
        # Explicit padding: "SAME" would pad a strided convolution on one side only.
        layer = nn.Conv(
            width,
            (size, size),
            strides=stride,
            padding=size // 2,
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=self.initialisers.conv,
            name=name,
        )
        return layer(x)

    def norm(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        """Batch norm, with PyTorch's momentum and epsilon."""
        layer = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,  # E[x²] − E[x]² cancels
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )
        return layer(x)

    def conv_norm(
        self,
        x: jax.Array,
        train: bool,
        width: int,
        size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        name: str,
        index: int | None = None,
    ) -> jax.Array:
        """A convolution and its batch norm, `name` and `name_norm`; in a block `name_conv1`, `name_norm1` and so on."""
        conv, norm = (
            (name, f"{name}_norm")
            if index is None
            else (f"{name}_conv{index}", f"{name}_norm{index}")
        )
        return self.norm(
            self.conv(x, width, size, stride, groups=groups, bias=bias, name=conv),
            train,
            norm,
        )


class Network(Layers, kw_only=True):
    """An image classifier: a body that makes a feature map, its global average, one linear layer.

    A subclass defines `body`, of `conv`, `norm`, `conv_norm` and `keep`; these are called inside the compact
    `__call__`, so parameters lie flat under the names they are given.

    Under `mutable=["intermediates"]` it also returns, as Linen's `sow` does, the feature map at the end of each stage
    before its last ReLU, `stage1` to `stageN`, each `[B, h, w, c]`, and `pooled`, `[B, D]`, which the classifier reads.

    Attributes:
      num_classes: number of logits.
      dtype, precision, axis_name: as `Layers`.
    """

    num_classes: int = 100

    smallest: ClassVar[int] = (
        1  # pixels of an image's side from which there is a feature map
    )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[B, num_classes]` of float images `[B, H, W, channels]`, in float32 or wider.

        Raises:
          ValueError: the images are of another rank, or too small for the model.
        """
        if images.ndim != 4 or min(images.shape[1:3]) < self.smallest:
            raise ValueError(
                f"{type(self).__name__} takes images [B, H, W, channels] of at least {self.smallest}×{self.smallest} "
                f"pixels, not an array of shape {list(images.shape)}"
            )
        x = images if self.dtype is None else images.astype(self.dtype)
        x = self.body(x, train).mean(axis=(1, 2))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        self.keep("pooled", x)
        _, kernel_init, bias_init = self.initialisers
        return linear(
            x,
            self.num_classes,
            precision=self.precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            name="classifier",
        )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        """The last feature map `[B, h, w, D]` of images `[B, H, W, channels]`."""
        raise NotImplementedError

    def keep(self, name: str, x: jax.Array) -> None:
        """Hands out an intermediate feature, if the caller of `apply` asks for them."""
        self.sow("intermediates", name, x)
