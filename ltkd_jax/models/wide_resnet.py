"""The wide ResNets."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network


class WideResNet(Network):
    """Defines the pre-activation ResNet with 16k, 32k and 64k channels.

    Each of its three stages has (depth − 4) / 6 blocks. Any image size and channel
    count.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (WRN-depth-k,
    without dropout). Where the channels change, the shortcut is a 1×1 convolution of
    the block's normalised input. Kaiming fan-out initialisation; the classifier's bias
    starts at 0.

    A stage ends in a sum without a ReLU; that sum is its feature.

    Attributes:
      depth: 6n + 4.
      widening: k.
    """

    depth: int
    widening: int = 1

    initialisers = Initialisers(classifier_bias=nn.initializers.zeros)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        num_blocks, remainder = divmod(self.depth - 4, 6)
        if remainder or num_blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6n + 4")
        x = self.conv(x, 16, 3, name="stem")
        for stage in (1, 2, 3):
            width = 2 ** (stage + 3) * self.widening
            for block in range(1, num_blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = self._block(x, train, width, stride, name)
            self.sow_feature(f"stage{stage}", x)
        # Blocks normalise their input, so the last sum still needs a norm.
        return nn.relu(self.norm(x, train, "last_norm"))

    def _block(
        self, x: jax.Array, train: bool, width: int, stride: int, name: str
    ) -> jax.Array:
        activated = nn.relu(self.norm(x, train, f"{name}_norm1"))
        y = self.conv_norm(
            activated,
            train,
            width,
            3,
            stride,
            name=f"{name}_conv1",
            norm_name=f"{name}_norm2",
        )
        y = self.conv(nn.relu(y), width, 3, name=f"{name}_conv2")
        # With equal channels the shortcut is x itself, before the norm.
        if x.shape[-1] != width:
            x = self.conv(activated, width, 1, stride, name=f"{name}_conv3")
        return x + y
