"""The weight net, which computes the weights of the loss terms per example."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models.linear import linear


class WeightNet(nn.Module):
    """Computes w = sigmoid(MLP(features)), a weight in (0, 1) for every loss term.

    The MLP has tanh between its layers, which are initialised as in PyTorch.

    Source: arXiv 2605.17839, its weight network.

    Attributes:
      num_terms: T.
      hidden: sizes of the hidden layers; in the paper (64, 64) for CIFAR-100 and (64,)
        for CIFAR-10.

    >>> net = WeightNet(num_terms=2, hidden=(8,))
    >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> net.apply(variables, jnp.ones((5, 2))).shape
    (5, 2)
    """

    num_terms: int
    hidden: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns weights `[B, T]` in float32 or wider, from features `[B, F]`."""
        # The net is tiny, and its gradient is a small difference: always in full
        # precision.
        precision = jax.lax.Precision.HIGHEST
        x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        for i, width in enumerate(self.hidden, start=1):
            x = nn.tanh(linear(x, width, precision=precision, name=f"hidden{i}"))
        return nn.sigmoid(
            linear(x, self.num_terms, precision=precision, name="weights")
        )
