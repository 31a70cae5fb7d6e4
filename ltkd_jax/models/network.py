"""The base classes of the networks: layers, and what all classifiers share."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import PrecisionLike
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ltkd_jax.models import batch_norm
from ltkd_jax.models.linear import linear, uniform_fan_in

kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Initialisers(NamedTuple):
    """Holds the initialisers of a network's weights.

    Attributes:
      conv_kernel: of all convolutions.
      classifier_kernel: of the last linear layer.
      classifier_bias: of the last linear layer; None is uniform in ±1/√fan_in.
    """

    conv_kernel: Initializer = kaiming_fan_out
    classifier_kernel: Initializer = uniform_fan_in
    classifier_bias: Initializer | None = None


class Layers(nn.Module, kw_only=True):
    """Provides convolutions and batch norm to the networks.

    Attributes:
      dtype: of activations; None keeps the dtype of the input.
      precision: of convolutions and matmuls.
      axis_name: the device axis over which batch norm takes its statistics, if any.
      fold_norms: whether `conv_norm` is a single convolution in evaluation, with batch
        norm in its kernel and bias. That changes results by rounding only. It pays for
        large batches: the kernels are computed in every call.
    """

    dtype: DTypeLike | None = None
    precision: PrecisionLike = None
    axis_name: str | None = None
    fold_norms: bool = False

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
        """Applies a square convolution; with stride 1 it keeps the image's size.

        Args:
          x: `[B, h, w, c]`.
          width: number of output channels.
          size: side of the kernel, odd.
          stride: in both directions.
          groups: number of groups of channels; the input's channels for a depthwise
            convolution.
          bias: whether it has a bias.
          name: of the layer.
        """
        layer = self._conv_layer(width, size, stride, groups, bias)
        return layer.copy(name=name)(x)

    def _conv_layer(
        self, width: int, size: int, stride: int, groups: int, bias: bool
    ) -> nn.Conv:
        """Returns a convolution without variables."""
        return nn.Conv(
            width,
            (size, size),
            strides=stride,
            # Explicit, as in PyTorch: "SAME" would pad a strided convolution of an even
            # image on the right and bottom only.
            padding=size // 2,
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=self.initialisers.conv_kernel,
            parent=None,
        )

    def norm(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        """Applies batch norm, with PyTorch's momentum and epsilon."""
        layer = batch_norm.BatchNorm(
            dtype=self.dtype, axis_name=self.axis_name, name=name
        )
        return layer(x, train=train)

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
        norm_name: str | None = None,
    ) -> jax.Array:
        """Applies a convolution and batch norm.

        Args:
          x, width, size, stride, groups, bias: see `conv`.
          train: whether batch norm takes the batch's statistics.
          name: of the convolution.
          index: number of the convolution in a block, if any: then `name` is the
            block's, and the layers are `{name}_conv{index}` and `{name}_norm{index}`.
          norm_name: of the norm; without an index `{name}_norm` by default.
        """
        conv_name = name
        if index is not None:
            conv_name = f"{name}_conv{index}"
            norm_name = norm_name or f"{name}_norm{index}"
        norm_name = norm_name or f"{name}_norm"
        if self.fold_norms and not train and not self.is_initializing():
            params = self.variables["params"]
            folded_params = batch_norm.fold(
                params[conv_name],
                params[norm_name],
                self.variables["batch_stats"][norm_name],
            )
            layer = self._conv_layer(width, size, stride, groups, bias=True)
            return cast(jax.Array, layer.apply({"params": folded_params}, x))
        x = self.conv(x, width, size, stride, groups=groups, bias=bias, name=conv_name)
        return self.norm(x, train, norm_name)


class Network(Layers, kw_only=True):
    """Classifies images by a body, global average pooling and one linear layer.

    A subclass defines `body` with `conv`, `norm`, `conv_norm` and `sow_feature`. As it
    runs inside the compact `__call__`, all layers are direct children of the network,
    under the names passed to these methods.

    With `mutable=["intermediates"]`, `apply` also returns the features: `stage1` to
    `stageN`, `[B, h, w, c]`, the feature map at the end of each stage before its last
    ReLU; and `pooled`, `[B, D]`, the input of the classifier.

    Attributes:
      num_classes: C, the number of logits.
      dtype, precision, axis_name: see `Layers`.
    """

    num_classes: int = 100

    # The smallest side of an image, in pixels, from which the body has an output.
    min_image_size: ClassVar[int] = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits `[B, C]`, in float32 or wider.

        Args:
          images: float `[B, H, W, channels]`.
          train: whether batch norm takes the batch's statistics.

        Raises:
          ValueError: the images are of another rank, or too small for the model.
        """
        self.check_shape(images.shape)
        x = images if self.dtype is None else images.astype(self.dtype)
        feature_map = self.body(x, train)
        # A vector, which has no axes between the first and the last, stays as it is.
        pooled = feature_map.mean(axis=tuple(range(1, feature_map.ndim - 1)))
        # The classifier is cheap, and losses need exact logits: never in bfloat16.
        pooled = pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))
        self.sow_feature("pooled", pooled)
        return linear(
            pooled,
            self.num_classes,
            precision=self.precision,
            kernel_init=self.initialisers.classifier_kernel,
            bias_init=self.initialisers.classifier_bias,
            name="classifier",
        )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless a batch of this shape can be classified."""
        if len(shape) != 4 or min(shape[1:3]) < self.min_image_size:
            raise ValueError(
                f"{type(self).__name__} takes images [B, H, W, channels] of at least "
                f"{self.min_image_size}×{self.min_image_size} pixels, not an array of "
                f"shape {list(shape)}: choose another model, such as mlp_2_512 for "
                "features [B, D]"
            )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the last feature map, `[B, h, w, D]`.

        Args:
          x: images `[B, H, W, channels]`.
          train: whether batch norm takes the batch's statistics.
        """
        raise NotImplementedError

    def sow_feature(self, name: str, x: jax.Array) -> None:
        """Records a feature, which Linen keeps if "intermediates" is mutable."""
        self.sow("intermediates", name, x)
