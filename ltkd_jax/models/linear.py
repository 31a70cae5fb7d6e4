"""The linear layer as PyTorch initialises it."""

import jax
from flax import linen as nn

uniform_by_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # ±1/√fan_in


def linear(
    x: jax.Array, features: int, *, name: str, precision=None, kernel_init=uniform_by_fan_in, bias_init=None
) -> jax.Array:
    """A linear layer of `x`; kernel and bias uniform in ±1/√fan_in unless given. To be called inside a Linen module."""
    bound = x.shape[-1] ** -0.5

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    layer = nn.Dense(features, precision=precision, kernel_init=kernel_init, bias_init=bias_init or uniform, name=name)
    return layer(x)
