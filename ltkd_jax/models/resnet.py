"""The ResNets: those for CIFAR with three stages, and those for ImageNet with four."""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from ltkd_jax.models.network import Network

# Channels of the stem and of the three stages.
NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)

# The convolutions of a block: width, size and stride of each.
_Convs = tuple[tuple[int, int, int], ...]


class _Residual(Network):
    """Provides stages of blocks relu(x + branch(x)).

    Where the branch changes the shape, x is projected to it.
    """

    def _stages(
        self,
        x: jax.Array,
        train: bool,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        branch: Callable[[int, int], _Convs],
    ) -> jax.Array:
        """Returns the last feature map, `[B, h, w, c]`.

        Args:
          x: the stem's output before its ReLU, `[B, h, w, c]`.
          train: whether batch norm takes the batch's statistics.
          widths: of the stages.
          num_blocks: of the stages.
          branch: `(width, stride) -> convolutions of a block`.
        """
        stages = zip(widths, num_blocks)
        for stage, (width, num_stage_blocks) in enumerate(stages, start=1):
            for block in range(1, num_stage_blocks + 1):
                # The first block of each stage but the first halves the image.
                stride = 2 if stage > 1 and block == 1 else 1
                convs = branch(width, stride)
                name = f"stage{stage}_block{block}"
                # The ReLU that ends a block is applied at the start of the next one,
                # because the features are taken before it.
                x = self._block(nn.relu(x), train, convs, name)
            self.sow_feature(f"stage{stage}", x)
        return nn.relu(x)

    def _block(self, x: jax.Array, train: bool, convs: _Convs, name: str) -> jax.Array:
        y = self.conv_norm(x, train, *convs[0], name=name, index=1)
        for index, conv in enumerate(convs[1:], start=2):
            y = self.conv_norm(nn.relu(y), train, *conv, name=name, index=index)
        if x.shape != y.shape:
            width = y.shape[-1]
            stride = max(conv_stride for _, _, conv_stride in convs)
            index = len(convs) + 1
            x = self.conv_norm(x, train, width, 1, stride, name=name, index=index)
        return x + y


def _basic(width: int, stride: int) -> _Convs:
    return (width, 3, stride), (width, 3, 1)


def _bottleneck(width: int, stride: int) -> _Convs:
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class CifarResNet(_Residual):
    """Defines the ResNet for small images: a 3×3 stem and three stages of basic blocks.

    Each stage has (depth − 2) / 6 blocks. Any image size and channel count.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2, in the variant of the common CIFAR distillation zoo: projections (1×1
    convolution and batch norm) where the shape changes. Kaiming fan-out initialisation.

    Attributes:
      depth: 6n + 2.
      widths: channels of the stem and of the stages.
    """

    depth: int
    widths: tuple[int, int, int, int] = NARROW

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        num_blocks, remainder = divmod(self.depth - 2, 6)
        if remainder or num_blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6n + 2")
        x = self.conv_norm(x, train, self.widths[0], 3, name="stem")
        return self._stages(x, train, self.widths[1:], 3 * (num_blocks,), _basic)


class ResNet(_Residual):
    """Defines the ResNet of four stages, with 64, 128, 256 and 512 channels.

    Bottleneck blocks have four times as many at their ends. Any image size.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    table 1, as in torchvision: the stride of a bottleneck is in its 3×3 convolution.
    For small images, as in the common CIFAR distillation zoo, the stem is a 3×3
    convolution that keeps the image's size. Kaiming fan-out initialisation.

    Attributes:
      blocks: number of blocks of each stage.
      bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions instead of two of 3×3.
      imagenet_stem: a stem of a 7×7 convolution and a 3×3 max pool, each of stride 2.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    imagenet_stem: bool = False

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        if self.imagenet_stem:
            x = self.conv_norm(x, train, 64, 7, 2, name="stem")
            # `_stages` applies the stem's ReLU after this pool. The order does not
            # matter: both are monotonic.
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        else:
            x = self.conv_norm(x, train, 64, 3, name="stem")
        branch = _bottleneck if self.bottleneck else _basic
        return self._stages(x, train, (64, 128, 256, 512), self.blocks, branch)
