"""The VGG nets with batch norm and one linear layer."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network

WIDTHS = (64, 128, 256, 512, 512)
LARGE = 64  # pixels from which an image is pooled once more


class VGG(Network):
    """Five stages of 3×3 convolutions with 64 to 512 channels and max pools between them.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
    in the variant of the common CIFAR distillation zoo: batch norm, a global average instead of the last max pool and
    one linear layer. The max pool before the last stage is left out for images below 64 pixels. Kaiming fan-out
    initialisation; the classifier starts normal with deviation 0.01. Images from 8×8 pixels.

    The stages are numbered from 0: the first gives no kept feature.

    Attributes:
      convs: number of convolutions of each stage.
    """

    convs: tuple[int, int, int, int, int]

    smallest = 8  # halved three times
    initialisers = Initialisers(
        kernel=nn.initializers.normal(0.01), bias=nn.initializers.zeros
    )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        pools = 4 if min(x.shape[1:3]) >= LARGE else 3
        for stage, (width, number) in enumerate(zip(WIDTHS, self.convs)):
            for index in range(1, number + 1):
                before = self.conv_norm(
                    x, train, width, 3, bias=True, name=f"stage{stage}", index=index
                )
                x = nn.relu(before)
            if stage > 0:
                self.keep(f"stage{stage}", before)
            if stage < pools:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x
