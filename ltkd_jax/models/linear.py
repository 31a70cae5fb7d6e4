"""The linear layer as PyTorch initialises it."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from flax.typing import PrecisionLike
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

uniform_by_fan_in = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)  # ±1/√fan_in


def linear(
    x: jax.Array,
    features: int,
    *,
    name: str,
    precision: PrecisionLike = None,
    kernel_init: Initializer = uniform_by_fan_in,
    bias_init: Initializer | None = None,
) -> jax.Array:
    """A linear layer of `x`; kernel and bias uniform in ±1/√fan_in unless given. To be called inside a Linen module."""
    bound = x.shape[-1] ** -0.5

    def uniform(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    layer = nn.Dense(
        features,
        precision=precision,
        kernel_init=kernel_init,
        bias_init=bias_init or uniform,
        name=name,
    )
    return layer(x)
