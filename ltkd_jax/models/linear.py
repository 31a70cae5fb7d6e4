"""The linear layer as PyTorch initialises it."""

import jax
from flax import linen as nn

_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def linear(x: jax.Array, features: int, *, name: str, precision=None) -> jax.Array:
    """A linear layer of `x`; kernel and bias uniform in ±1/√fan_in. To be called inside a Linen module."""
    bound = x.shape[-1] ** -0.5

    def bias_init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    layer = nn.Dense(features, precision=precision, kernel_init=_kernel_init, bias_init=bias_init, name=name)
    return layer(x)
