"""The multilayer perceptron, for features."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from ltkd_jax.models.network import Network


class MLP(Network):
    """Classifies features by hidden layers with batch norm and ReLU.

    Attributes:
      depth: number of hidden layers.
      width: of each of them.
    """

    depth: int
    width: int

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless a batch is of features, `[B, D]`."""
        if len(shape) != 2:
            raise ValueError(
                f"MLP takes features [B, D], not an array of shape {list(shape)}: "
                "choose a model for images"
            )

    def body(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the last hidden layer, `[B, width]`, from features `[B, D]`."""
        for i in range(1, self.depth + 1):
            x = nn.Dense(
                self.width,
                # Batch norm has a bias, and would subtract this one.
                use_bias=False,
                dtype=self.dtype,
                precision=self.precision,
                kernel_init=nn.initializers.he_normal(),
                name=f"hidden{i}",
            )(x)
            x = nn.relu(self.norm(x, train, f"hidden{i}_norm"))
        return x
