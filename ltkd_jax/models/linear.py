"""The linear layer with PyTorch's initialisation."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from flax.typing import PrecisionLike
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

# Uniform in ±1/√fan_in, which has the variance 1/(3 fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def linear(
    x: jax.Array,
    features: int,
    *,
    name: str,
    precision: PrecisionLike = None,
    kernel_init: Initializer = uniform_fan_in,
    bias_init: Initializer | None = None,
) -> jax.Array:
    """Applies a linear layer; to be called inside a compact method of a Linen module.

    Args:
      x: `[…, fan_in]`.
      features: size of the output's last axis.
      name: of the layer.
      precision: of the matmul.
      kernel_init: initialises the kernel.
      bias_init: initialises the bias; by default uniform in ±1/√fan_in.
    """
    # Defined where fan_in is known: an initialiser gets the bias's shape only.
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
