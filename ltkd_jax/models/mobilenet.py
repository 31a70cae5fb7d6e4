"""MobileNetV2 for small images."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network

# For each group of blocks: expansion, channels at full width, number of blocks, stride
# of the first block.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# The groups whose output is a feature, and the number of its stage.
STAGES = {2: 1, 3: 2, 5: 3, 7: 4}


class MobileNetV2(Network):
    """Defines inverted residual blocks.

    A block is a 1×1 expansion, a 3×3 depthwise convolution and a 1×1 projection without
    ReLU. Any image size; a side of 32 pixels becomes 2.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, in the variant of the common CIFAR distillation zoo: ReLU instead of
    ReLU6, stride 1 in the group of 24 channels, an expansion also in the first block,
    1280 channels in the last convolution at any width. Kaiming fan-out initialisation;
    the classifier starts normal with deviation 0.01.

    Attributes:
      width: multiplies the channels; one half in the zoo.
    """

    width: float = 0.5

    initialisers = Initialisers(
        classifier_kernel=nn.initializers.normal(0.01),
        classifier_bias=nn.initializers.zeros,
    )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        stem_width = int(32 * self.width)
        x = nn.relu(self.conv_norm(x, train, stem_width, 3, 2, name="stem"))
        for group, settings in enumerate(GROUPS, start=1):
            expansion, full_width, num_blocks, group_stride = settings
            width = int(full_width * self.width)
            for block in range(1, num_blocks + 1):
                stride = group_stride if block == 1 else 1
                name = f"group{group}_block{block}"
                x = self._block(x, train, expansion, width, stride, name)
            if group in STAGES:
                self.sow_feature(f"stage{STAGES[group]}", x)
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
        y = self.conv_norm(y, train, inner, 3, stride, groups=inner, name=name, index=2)
        y = self.conv_norm(nn.relu(y), train, width, 1, name=name, index=3)
        has_shortcut = stride == 1 and x.shape[-1] == width
        return x + y if has_shortcut else y
