"""Models by name: `models.create("resnet8x4", num_classes=100)`.

A model is a Linen module called as `model.apply(variables, images, train=…)` on float images `[B, H, W, channels]`;
its logits are `[B, num_classes]` in float32 or wider. Most are those of the common CIFAR distillation zoo (mdistiller,
RepDistiller), and `ltkd_jax.models.convert` reads that zoo's checkpoints; those named `…_imagenet` are torchvision's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax import names
from ltkd_jax.models import resnet
from ltkd_jax.models.mobilenet import MobileNetV2
from ltkd_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from ltkd_jax.models.vgg import VGG
from ltkd_jax.models.weight_net import WeightNet
from ltkd_jax.models.wide_resnet import WideResNet

_VGG = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_resnet18 = functools.partial(resnet.ResNet, (2, 2, 2, 2))
_resnet34 = functools.partial(resnet.ResNet, (3, 4, 6, 3))
_resnet50 = functools.partial(resnet.ResNet, (3, 4, 6, 3), bottleneck=True)

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    **{
        f"resnet{depth}": functools.partial(resnet.CifarResNet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}x4": functools.partial(resnet.CifarResNet, depth, resnet.WIDE)
        for depth in (8, 32)
    },
    **{
        f"wrn_{depth}_{k}": functools.partial(WideResNet, depth, k)
        for depth in (16, 40)
        for k in (1, 2)
    },
    **{f"vgg{depth}": functools.partial(VGG, convs) for depth, convs in _VGG.items()},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "resnet18_imagenet": functools.partial(_resnet18, imagenet_stem=True),
    "resnet34_imagenet": functools.partial(_resnet34, imagenet_stem=True),
    "resnet50_imagenet": functools.partial(_resnet50, imagenet_stem=True),
}

# Explicit, because the default on accelerators is not float32. `None` keeps the input's dtype.
_PRECISIONS = {
    "float32": (None, jax.lax.Precision.HIGHEST),
    "tf32": (None, jax.lax.Precision.HIGH),
    "bfloat16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),
}
PRECISIONS = tuple(_PRECISIONS)

__all__ = [
    "PRECISIONS",
    "REGISTRY",
    "Model",
    "WeightNet",
    "apply_with_features",
    "create",
    "resnet",
]


class Model(Protocol):
    """What training asks of a network: a Linen module as `create` makes it has it, and so has `review.Reviewed`."""

    def init(self, key: jax.Array, images: jax.Array, /, *, train: bool) -> Any:
        """Variables, by the name of their collection."""

    def apply(
        self,
        variables: Any,
        images: jax.Array,
        /,
        *,
        train: bool,
        mutable: Sequence[str] = (),
    ) -> Any:
        """Logits `[B, C]`; with `mutable` also a dict of the collections named there, updated."""


def create(
    name: str,
    num_classes: int,
    *,
    precision: str = "float32",
    axis_name: str | None = None,
) -> nn.Module:
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
        raise ValueError(names.unknown("model", name, REGISTRY))
    if precision not in _PRECISIONS:
        raise ValueError(
            f"precision={precision!r} must be one of {', '.join(_PRECISIONS)}"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be positive")
    dtype, matmul_precision = _PRECISIONS[precision]
    return REGISTRY[name](
        num_classes=num_classes,
        dtype=dtype,
        precision=matmul_precision,
        axis_name=axis_name,
    )


def apply_with_features(
    model: Model,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    mutable: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
    """`model.apply`, and the intermediate features that a model of `create` hands out; without it none is kept.

    Args:
      model: a model of `create`.
      variables: of `model.init`.
      images: float `[B, H, W, channels]`.
      train: whether batch norm takes the batch's statistics.
      mutable: names of the collections to return updated, such as "batch_stats".

    Returns:
      logits `[B, num_classes]`; a dict of features: `stage1` to `stageN`, each `[B, h, w, c]`, the end of a stage
      before its last ReLU, and `pooled`, `[B, D]`, the classifier's input; a dict of the updated collections.

    >>> model = create("resnet8", num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    >>> _, features, _ = apply_with_features(model, variables, jnp.zeros((2, 8, 8, 1)), train=False)
    >>> {name: feature.shape for name, feature in features.items()}
    {'stage1': (2, 8, 8, 16), 'stage2': (2, 4, 4, 32), 'stage3': (2, 2, 2, 64), 'pooled': (2, 64)}
    """
    logits, updates = model.apply(
        variables, images, train=train, mutable=[*mutable, "intermediates"]
    )
    kept = updates.pop("intermediates", {})
    # Linen keeps a tuple of each name, one entry per call.
    return logits, {name: values[-1] for name, values in kept.items()}, updates
