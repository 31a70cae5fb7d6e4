"""MobileNetV2 for small images."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network

# Of each group of blocks: expansion, channels at full width, number of blocks, stride of the first.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STAGES = {2: 1, 3: 2, 5: 3, 7: 4}  # the groups whose output is kept, and as which stage


class MobileNetV2(Network):
    """Inverted residual blocks: 1×1 expansion, 3×3 depthwise convolution, 1×1 projection without ReLU.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, in the variant of the
    common CIFAR distillation zoo: ReLU instead of ReLU6, stride 1 in the group of 24 channels, an expansion also in
    the first block, 1280 channels in the last convolution at any width. Kaiming fan-out initialisation; the classifier
    starts normal with deviation 0.01. Any image size; 32 pixels become 2.

    Attributes:
      width: multiplies the channels; the zoo's is a half.
    """

    width: float = 0.5

    initialisers = Initialisers(
        kernel=nn.initializers.normal(0.01), bias=nn.initializers.zeros
    )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(self.conv_norm(x, train, int(32 * self.width), 3, 2, name="stem"))
        for group, (expansion, channels, blocks, stride) in enumerate(GROUPS, start=1):
            for block in range(1, blocks + 1):
                first_stride = stride if block == 1 else 1
                x = self._block(
                    x,
                    train,
                    expansion,
                    int(channels * self.width),
                    first_stride,
                    f"group{group}_block{block}",
                )
            if group in STAGES:
                self.keep(f"stage{STAGES[group]}", x)
        return nn.relu(self.conv_norm(x, train, 1280, 1, name="last"))

    def _block(
        self,
        x: jax.Array,
        train: bool,
        expansion: int,
        width: int,
        stride: int,
        name: str,
    ) -> jax.Array:
        inner = expansion * x.shape[-1]
        y = nn.relu(self.conv_norm(x, train, inner, 1, name=name, index=1))
        y = nn.relu(
            self.conv_norm(y, train, inner, 3, stride, groups=inner, name=name, index=2)
        )
        y = self.conv_norm(y, train, width, 1, name=name, index=3)
        return x + y if stride == 1 and x.shape[-1] == width else y
