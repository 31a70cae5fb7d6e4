"""The ShuffleNets for small images.

They have a 1×1 stem of 24 channels, and three stages that each halve the image.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models.linear import uniform_fan_in
from ltkd_jax.models.network import Initialisers, Network

STEM_WIDTH = 24


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Returns the channels reordered, so that each group gets some of every group.

    Args:
      x: `[B, h, w, c]`.
      groups: number of groups; it divides c.

    >>> shuffle(jnp.arange(6).reshape(1, 1, 1, 6), groups=2).ravel().tolist()
    [0, 3, 1, 4, 2, 5]
    """
    *leading, channels = x.shape
    grouped = x.reshape(*leading, groups, channels // groups)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


class ShuffleNetV1(Network):
    """Defines residual blocks of grouped 1×1 convolutions with a channel shuffle.

    A depthwise 3×3 convolution comes after the shuffle. Any image size and channel
    count.

    Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
    Network for Mobile Devices", CVPR 2018 (three groups), in the variant of the common
    CIFAR distillation zoo: a 1×1 stem without pooling, a ReLU after the depthwise
    convolution. PyTorch's default initialisation.

    Attributes:
      widths: channels of the stages.
      blocks: number of blocks of each stage.
      groups: of the 1×1 convolutions.
    """

    widths: tuple[int, int, int] = (240, 480, 960)
    blocks: tuple[int, int, int] = (4, 8, 4)
    groups: int = 3

    initialisers = Initialisers(conv_kernel=uniform_fan_in)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv_norm(x, train, STEM_WIDTH, 1, name="stem")
        stages = zip(self.widths, self.blocks)
        for stage, (width, num_blocks) in enumerate(stages, start=1):
            for block in range(1, num_blocks + 1):
                # The stem has too few channels to be grouped.
                groups = 1 if stage == block == 1 else self.groups
                stride = 2 if block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = self._block(nn.relu(x), train, width, stride, groups, name)
            self.sow_feature(f"stage{stage}", x)
        return nn.relu(x)

    def _block(
        self, x: jax.Array, train: bool, width: int, stride: int, groups: int, name: str
    ) -> jax.Array:
        """Returns a block's output before its last ReLU.

        With stride 2, the pooled input is appended to the branch instead of added.
        """
        if stride == 2:
            width -= x.shape[-1]
        inner = width // 4
        y = self.conv_norm(x, train, inner, 1, groups=groups, name=name, index=1)
        y = shuffle(nn.relu(y), groups)
        y = self.conv_norm(y, train, inner, 3, stride, groups=inner, name=name, index=2)
        y = nn.relu(y)
        y = self.conv_norm(y, train, width, 1, groups=self.groups, name=name, index=3)
        if stride == 1:
            return x + y
        # Averages count the padding, as in PyTorch.
        x = nn.avg_pool(
            x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), count_include_pad=True
        )
        return jnp.concatenate([y, x], axis=-1)


class ShuffleNetV2(Network):
    """Defines blocks that change one half of the channels, and then shuffle both.

    Any image size and channel count.

    Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", ECCV 2018, in the variant of the common CIFAR distillation
    zoo: a 1×1 stem without pooling. PyTorch's default initialisation.

    The feature of a stage is taken before the last ReLU, and so before the shuffle that
    follows it.

    Attributes:
      widths: channels of the stages and of the last convolution; those of the zoo's
        "size 1".
      blocks: number of blocks of each stage, after the one that halves the image.
    """

    widths: tuple[int, int, int, int] = (116, 232, 464, 1024)
    blocks: tuple[int, int, int] = (3, 7, 3)

    initialisers = Initialisers(conv_kernel=uniform_fan_in)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(self.conv_norm(x, train, STEM_WIDTH, 1, name="stem"))
        stages = zip(self.widths, self.blocks)
        for stage, (width, num_blocks) in enumerate(stages, start=1):
            pre_relu = self._halve(x, train, width // 2, f"stage{stage}_block1")
            x = shuffle(nn.relu(pre_relu), 2)
            for block in range(2, num_blocks + 2):
                pre_relu = self._block(x, train, f"stage{stage}_block{block}")
                x = shuffle(nn.relu(pre_relu), 2)
            self.sow_feature(f"stage{stage}", pre_relu)
        return nn.relu(self.conv_norm(x, train, self.widths[-1], 1, name="last"))

    def _halve(self, x: jax.Array, train: bool, width: int, name: str) -> jax.Array:
        """Returns the output, before its ReLU, of a block that halves the image.

        Both of its branches get all channels.
        """
        channels = x.shape[-1]
        left = self.conv_norm(
            x, train, channels, 3, 2, groups=channels, name=name, index=1
        )
        left = self.conv_norm(left, train, width, 1, name=name, index=2)
        right = nn.relu(self.conv_norm(x, train, width, 1, name=name, index=3))
        right = self.conv_norm(
            right, train, width, 3, 2, groups=width, name=name, index=4
        )
        right = self.conv_norm(right, train, width, 1, name=name, index=5)
        return jnp.concatenate([left, right], axis=-1)

    def _block(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        """Returns a block's output before its last ReLU."""
        # Both halves have been through a ReLU. The next one, over both, therefore does
        # not change the first half.
        unchanged, y = jnp.split(x, 2, axis=-1)
        width = y.shape[-1]
        y = nn.relu(self.conv_norm(y, train, width, 1, name=name, index=1))
        y = self.conv_norm(y, train, width, 3, groups=width, name=name, index=2)
        y = self.conv_norm(y, train, width, 1, name=name, index=3)
        return jnp.concatenate([unchanged, y], axis=-1)
