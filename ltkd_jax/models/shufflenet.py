"""The ShuffleNets for small images: a 1×1 stem of 24 channels, three stages of which each halves the image."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models.linear import uniform_by_fan_in
from ltkd_jax.models.network import Initialisers, Network

STEM = 24


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deals the channels of each group out over all groups: `[B, h, w, c]`, the same shape.

    >>> shuffle(jnp.arange(6).reshape(1, 1, 1, 6), groups=2).ravel().tolist()
    [0, 3, 1, 4, 2, 5]
    """
    *image, channels = x.shape
    return (
        x.reshape(*image, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)
    )


class ShuffleNetV1(Network):
    """Residual blocks of grouped 1×1 convolutions with a channel shuffle and a depthwise 3×3 between them.

    Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR
    2018 (three groups), in the variant of the common CIFAR distillation zoo: a 1×1 stem without pooling, a ReLU after
    the depthwise convolution. PyTorch's default initialisation. Any image size and channel count.

    Attributes:
      widths: channels of the stages.
      blocks: of the stages.
      groups: of the 1×1 convolutions.
    """

    widths: tuple[int, int, int] = (240, 480, 960)
    blocks: tuple[int, int, int] = (4, 8, 4)
    groups: int = 3

    initialisers = Initialisers(conv=uniform_by_fan_in)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv_norm(x, train, STEM, 1, name="stem")
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks), start=1):
            for block in range(1, blocks + 1):
                # The stem has too few channels to be grouped.
                groups = 1 if stage == block == 1 else self.groups
                stride = 2 if block == 1 else 1
                x = self._block(
                    nn.relu(x),
                    train,
                    width,
                    stride,
                    groups,
                    f"stage{stage}_block{block}",
                )
            self.keep(f"stage{stage}", x)
        return nn.relu(x)

    def _block(
        self, x: jax.Array, train: bool, width: int, stride: int, groups: int, name: str
    ) -> jax.Array:
        """The block before its last ReLU. One that halves the image appends the pooled input to the branch."""
        if stride == 2:
            width -= x.shape[-1]
        inner = width // 4
        y = shuffle(
            nn.relu(
                self.conv_norm(x, train, inner, 1, groups=groups, name=name, index=1)
            ),
            groups,
        )
        y = nn.relu(
            self.conv_norm(y, train, inner, 3, stride, groups=inner, name=name, index=2)
        )
        y = self.conv_norm(y, train, width, 1, groups=self.groups, name=name, index=3)
        if stride == 1:
            return x + y
        # The padding counts, as in PyTorch.
        x = nn.avg_pool(
            x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), count_include_pad=True
        )
        return jnp.concatenate([y, x], axis=-1)


class ShuffleNetV2(Network):
    """Blocks that leave half of the channels as they are, and shuffle them with the other half at the end.

    Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, in the
    variant of the common CIFAR distillation zoo: a 1×1 stem without pooling. PyTorch's default initialisation. Any
    image size and channel count.

    A stage's kept feature is before the ReLU, and so also before the shuffle that follows it.

    Attributes:
      widths: channels of the stages and of the last convolution; these are size 1.
      blocks: of the stages, after the one that halves the image.
    """

    widths: tuple[int, int, int, int] = (116, 232, 464, 1024)
    blocks: tuple[int, int, int] = (3, 7, 3)

    initialisers = Initialisers(conv=uniform_by_fan_in)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(self.conv_norm(x, train, STEM, 1, name="stem"))
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks), start=1):
            for block in range(1, blocks + 2):
                name = f"stage{stage}_block{block}"
                before = (
                    self._halve(x, train, width // 2, name)
                    if block == 1
                    else self._block(x, train, name)
                )
                x = shuffle(nn.relu(before), 2)
            self.keep(f"stage{stage}", before)
        return nn.relu(self.conv_norm(x, train, self.widths[-1], 1, name="last"))

    def _halve(self, x: jax.Array, train: bool, width: int, name: str) -> jax.Array:
        """Both branches see all channels and halve the image; before their ReLU."""
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
        # The first half comes out of a ReLU, so that the one to come leaves it as it is.
        same, y = jnp.split(x, 2, axis=-1)
        width = y.shape[-1]
        y = nn.relu(self.conv_norm(y, train, width, 1, name=name, index=1))
        y = self.conv_norm(y, train, width, 3, groups=width, name=name, index=2)
        y = self.conv_norm(y, train, width, 1, name=name, index=3)
        return jnp.concatenate([same, y], axis=-1)
