"""Models by name: `models.create("resnet8x4", num_classes=100)`.

A model is a Linen module called as `model.apply(variables, images, train=…)` on float images `[B, H, W, channels]`;
its logits are `[B, num_classes]` in float32 or wider.
"""

import difflib
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax.models import resnet
from ltkd_jax.models.weight_net import WeightNet

REGISTRY = {
    **{f"resnet{depth}": functools.partial(resnet.CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": functools.partial(resnet.CifarResNet, depth, resnet.WIDE) for depth in (8, 32)},
}

# Explicit, because the default on accelerators is not float32. `None` keeps the input's dtype.
_PRECISIONS = {
    "float32": (None, jax.lax.Precision.HIGHEST),
    "tf32": (None, jax.lax.Precision.HIGH),
    "bfloat16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),
}
PRECISIONS = tuple(_PRECISIONS)

__all__ = ["PRECISIONS", "REGISTRY", "WeightNet", "create", "resnet"]


def create(name: str, num_classes: int, *, precision: str = "float32", axis_name: str | None = None) -> nn.Module:
    """The model of a name.

    Args:
      name: a key of `REGISTRY`.
      num_classes: number of logits.
      precision: of convolutions and matmuls: "float32", "tf32" (three-pass bfloat16 on TPU) or "bfloat16" (which
        also keeps activations in bfloat16). Parameters and batch statistics are float32 in all three.
      axis_name: device axis over which batch norm takes its statistics, under `pmap` or `shard_map`.

    Raises:
      ValueError: an unknown name or precision, or no class.

    >>> model = create("resnet8", num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 1)), train=False).shape
    (2, 10)
    """
    if name not in REGISTRY:
        close = difflib.get_close_matches(str(name), REGISTRY, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown model {name!r}{hint} The models are: {', '.join(REGISTRY)}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(_PRECISIONS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be positive")
    dtype, matmul_precision = _PRECISIONS[precision]
    return REGISTRY[name](num_classes=num_classes, dtype=dtype, precision=matmul_precision, axis_name=axis_name)
