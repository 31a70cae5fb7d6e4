"""The ResNets: those for CIFAR with three stages, and those of ImageNet with four."""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from ltkd_jax.models.network import Network

NARROW = (16, 16, 32, 64)  # channels of the stem and of the three stages
WIDE = (32, 64, 128, 256)

_Convs = tuple[tuple[int, int, int], ...]  # of a block: width, size, stride of each


class _Residual(Network):
    """Stages of blocks relu(x + branch(x)), with a projection of x where the branch changes its shape."""

    def _stages(
        self,
        x: jax.Array,
        train: bool,
        widths: Sequence[int],
        blocks: Sequence[int],
        branch: Callable[[int, int], _Convs],
    ) -> jax.Array:
        """The last feature map of a stem's, both `[B, h, w, c]`.

        `x` is carried before its ReLU, because the features to keep are. `branch(width, stride)` gives the
        convolutions of a block.
        """
        for stage, (width, number) in enumerate(zip(widths, blocks), start=1):
            for block in range(1, number + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                x = self._block(
                    nn.relu(x),
                    train,
                    branch(width, stride),
                    f"stage{stage}_block{block}",
                )
            self.keep(f"stage{stage}", x)
        return nn.relu(x)

    def _block(self, x: jax.Array, train: bool, convs: _Convs, name: str) -> jax.Array:
        y = self.conv_norm(x, train, *convs[0], name=name, index=1)
        for index, conv in enumerate(convs[1:], start=2):
            y = self.conv_norm(nn.relu(y), train, *conv, name=name, index=index)
        if x.shape != y.shape:
            stride = max(stride for _, _, stride in convs)
            x = self.conv_norm(
                x, train, y.shape[-1], 1, stride, name=name, index=len(convs) + 1
            )
        return x + y


def _basic(width: int, stride: int) -> _Convs:
    return (width, 3, stride), (width, 3, 1)


def _bottleneck(width: int, stride: int) -> _Convs:
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class CifarResNet(_Residual):
    """ResNet for small images: a 3×3 stem, three stages of (depth − 2) / 6 basic blocks, one linear layer.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, in the variant of
    the common CIFAR distillation zoo: projections (1×1 convolution and batch norm) where the shape changes.
    Kaiming fan-out initialisation. Any image size and channel count.

    Attributes:
      depth: 6n + 2.
      widths: channels of the stem and the stages.
    """

    depth: int
    widths: tuple[int, int, int, int] = NARROW

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6n + 2")
        x = self.conv_norm(x, train, self.widths[0], 3, name="stem")
        return self._stages(x, train, self.widths[1:], 3 * (blocks,), _basic)


class ResNet(_Residual):
    """ResNet of four stages with 64, 128, 256 and 512 channels (four times that out of bottleneck blocks).

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1, as torchvision has it: the
    stride of a bottleneck is in its 3×3 convolution. For small images, as in the common CIFAR distillation zoo, the
    stem is a 3×3 convolution that keeps the image's size. Kaiming fan-out initialisation. Any image size.

    Attributes:
      blocks: of the four stages.
      bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions instead of two of 3×3.
      imagenet_stem: a 7×7 convolution and a 3×3 max pool, each of stride 2, as stem.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    imagenet_stem: bool = False

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        if self.imagenet_stem:
            x = self.conv_norm(x, train, 64, 7, 2, name="stem")
            # Before the ReLU, with which it commutes.
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        else:
            x = self.conv_norm(x, train, 64, 3, name="stem")
        return self._stages(
            x,
            train,
            (64, 128, 256, 512),
            self.blocks,
            _bottleneck if self.bottleneck else _basic,
        )
