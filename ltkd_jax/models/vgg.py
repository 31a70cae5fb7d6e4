"""The VGG nets with batch norm and a single linear layer."""

import jax
from flax import linen as nn

from ltkd_jax.models.network import Initialisers, Network

WIDTHS = (64, 128, 256, 512, 512)

# An image whose sides have at least this many pixels is pooled a fourth time.
LARGE_IMAGE_SIZE = 64


class VGG(Network):
    """Defines five stages of 3×3 convolutions, with max pools between them.

    The stages have 64 to 512 channels. Images from 8×8 pixels.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
    Image Recognition", ICLR 2015, in the variant of the common CIFAR distillation zoo:
    batch norm, a global average instead of the last max pool and one linear layer. The
    max pool before the last stage is left out for images below 64 pixels. Kaiming
    fan-out initialisation; the classifier starts normal with deviation 0.01.

    The stages are numbered from 0, and the first has no feature.

    Attributes:
      convs: number of convolutions of each stage.
    """

    convs: tuple[int, int, int, int, int]

    # The image is halved three times.
    min_image_size = 8
    initialisers = Initialisers(
        classifier_kernel=nn.initializers.normal(0.01),
        classifier_bias=nn.initializers.zeros,
    )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        num_pools = 4 if min(x.shape[1:3]) >= LARGE_IMAGE_SIZE else 3
        for stage, (width, num_convs) in enumerate(zip(WIDTHS, self.convs)):
            name = f"stage{stage}"
            for index in range(1, num_convs + 1):
                pre_relu = self.conv_norm(
                    x, train, width, 3, bias=True, name=name, index=index
                )
                x = nn.relu(pre_relu)
            if stage > 0:
                self.sow_feature(name, pre_relu)
            if stage < num_pools:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x
