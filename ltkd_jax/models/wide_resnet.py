"""The wide ResNets."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network


class WideResNet(Network):
    """Pre-activation ResNet of three stages with 16k, 32k and 64k channels and (depth − 4) / 6 blocks each.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (WRN-depth-k, without dropout). Where the
    channels change, the shortcut is a 1×1 convolution of the block's normalised input. Kaiming fan-out initialisation,
    and a classifier that starts without bias. Any image size and channel count.

    A stage of it ends in a sum that no ReLU follows; that sum is its kept feature.

    Attributes:
      depth: 6n + 4.
      widening: k.
    """

    depth: int
    widening: int = 1

    initialisers = Initialisers(bias=nn.initializers.zeros)

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6n + 4")
        x = self.conv(x, 16, 3, name="stem")
        for stage in (1, 2, 3):
            for block in range(1, blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                x = self._block(
                    x,
                    train,
                    2 ** (stage + 3) * self.widening,
                    stride,
                    f"stage{stage}_block{block}",
                )
            self.keep(f"stage{stage}", x)
        return nn.relu(self.norm(x, train, "last_norm"))

    def _block(
        self, x: jax.Array, train: bool, width: int, stride: int, name: str
    ) -> jax.Array:
        active = nn.relu(self.norm(x, train, f"{name}_norm1"))
        y = self.conv(active, width, 3, stride, name=f"{name}_conv1")
        y = self.conv(
            nn.relu(self.norm(y, train, f"{name}_norm2")),
            width,
            3,
            name=f"{name}_conv2",
        )
        if x.shape[-1] != width:
            x = self.conv(active, width, 1, stride, name=f"{name}_conv3")
        return x + y
