"""The network that weighs loss terms per example."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models.linear import linear


class WeightNet(nn.Module):
    """w = sigmoid(MLP(features)), an MLP with tanh between its layers: a weight in (0, 1) for every loss term.

    Source: arXiv 2605.17839, its weight network. Initialised as PyTorch's linear layers are.

    Attributes:
      num_terms: T.
      hidden: sizes of the hidden layers; the paper's are (64, 64) for CIFAR-100 and (64,) for CIFAR-10.

    >>> net = WeightNet(num_terms=2, hidden=(8,))
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> net.apply(variables, jnp.ones((5, 2))).shape
    (5, 2)
    """

    num_terms: int
    hidden: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Weights `[B, num_terms]` of features `[B, F]`, in float32 or wider."""
        x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        # It is tiny and its gradient is a small difference: always in full precision.
        for i, width in enumerate(self.hidden):
            x = nn.tanh(
                linear(
                    x, width, precision=jax.lax.Precision.HIGHEST, name=f"hidden{i + 1}"
                )
            )
        return nn.sigmoid(
            linear(
                x, self.num_terms, precision=jax.lax.Precision.HIGHEST, name="weights"
            )
        )
