"""Models by name: `models.create("resnet8x4", num_classes=100)`.

A model is a Linen module or another `Model`, called as `model.apply(variables, images,
train=…)` on float images `[B, H, W, channels]`; it returns logits `[B, C]` in float32
or wider. The models `mlp_DEPTH_WIDTH` take features `[B, D]` instead.

Most models are those of the common CIFAR distillation zoo (mdistiller, RepDistiller);
those named `…_imagenet` are torchvision's. `ltkd_jax.models.convert` reads checkpoints
of those in its `SUPPORTED`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ltkd_jax import names
from ltkd_jax.models import resnet
from ltkd_jax.models.mlp import MLP
from ltkd_jax.models.mobilenet import MobileNetV2
from ltkd_jax.models.network import Network
from ltkd_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from ltkd_jax.models.vgg import VGG
from ltkd_jax.models.weight_net import WeightNet
from ltkd_jax.models.wide_resnet import WideResNet

_resnet18 = functools.partial(resnet.ResNet, (2, 2, 2, 2))
_resnet34 = functools.partial(resnet.ResNet, (3, 4, 6, 3))
_resnet50 = functools.partial(resnet.ResNet, (3, 4, 6, 3), bottleneck=True)

REGISTRY: dict[str, Callable[..., "Model"]] = {
    "resnet8": functools.partial(resnet.CifarResNet, 8),
    "resnet14": functools.partial(resnet.CifarResNet, 14),
    "resnet20": functools.partial(resnet.CifarResNet, 20),
    "resnet32": functools.partial(resnet.CifarResNet, 32),
    "resnet44": functools.partial(resnet.CifarResNet, 44),
    "resnet56": functools.partial(resnet.CifarResNet, 56),
    "resnet110": functools.partial(resnet.CifarResNet, 110),
    "resnet8x4": functools.partial(resnet.CifarResNet, 8, resnet.WIDE),
    "resnet32x4": functools.partial(resnet.CifarResNet, 32, resnet.WIDE),
    "wrn_16_1": functools.partial(WideResNet, 16, 1),
    "wrn_16_2": functools.partial(WideResNet, 16, 2),
    "wrn_40_1": functools.partial(WideResNet, 40, 1),
    "wrn_40_2": functools.partial(WideResNet, 40, 2),
    "vgg8": functools.partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": functools.partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": functools.partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": functools.partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": functools.partial(VGG, (2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "resnet18_imagenet": functools.partial(_resnet18, imagenet_stem=True),
    "resnet34_imagenet": functools.partial(_resnet34, imagenet_stem=True),
    "resnet50_imagenet": functools.partial(_resnet50, imagenet_stem=True),
    "mlp_1_32": functools.partial(MLP, 1, 32),
    "mlp_1_128": functools.partial(MLP, 1, 128),
    "mlp_2_512": functools.partial(MLP, 2, 512),
}

# For each precision, the dtype of activations (None keeps that of the input) and the
# precision of matmuls. The latter is always set, because the default on accelerators
# computes float32 matmuls in fewer bits.
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
    "defining_module",
    "fold_norms",
    "register",
    "resnet",
]


class Model(Protocol):
    """Declares what training needs of a network.

    Linen modules, `nnx.NnxModel` and `review.StudentWithFusion` have it.
    """

    def init(self, key: jax.Array, images: jax.Array, /, *, train: bool) -> Any:
        """Returns new variables, as a dict with an entry for each collection."""

    def apply(
        self,
        variables: Any,
        images: jax.Array,
        /,
        *,
        train: bool,
        mutable: Sequence[str] = (),
    ) -> Any:
        """Returns logits `[B, C]`; with `mutable`, (logits, updated collections)."""


def register(name: str, constructor: Callable[..., Model]) -> None:
    """Adds a model to those of `create`.

    A plain Linen module is enough, and so is an NNX module in `nnx.NnxModel`. A Linen
    module's `__call__(images, train)` maps float images
    `[B, H, W, channels]` to float32 logits `[B, C]`; where `train` is true, batch norm
    takes the batch's statistics. ReviewKD also needs features, see
    `apply_with_features`. For an export, take B from `images.shape[0]`, since `len`
    needs a number.

    Args:
      name: the new name.
      constructor: called as `constructor(num_classes=…, dtype=…, precision=…,
        axis_name=…)`, see `create`; dtype and precision are those that Linen's layers
        take. It may ignore the last three if it is only used in float32 and with
        `parallel=jit`.

    Raises:
      ValueError: another module has registered that name.

    >>> from flax import linen as nn
    >>> class Linear(nn.Module):
    ...     num_classes: int
    ...     @nn.compact
    ...     def __call__(self, images, train):
    ...         return nn.Dense(self.num_classes)(images.reshape((images.shape[0], -1)))
    >>> register("linear", lambda num_classes, **_: Linear(num_classes))
    >>> model = create("linear", 3)
    >>> model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), train=False).keys()
    dict_keys(['params'])
    >>> del REGISTRY["linear"]
    """
    if name in REGISTRY and defining_module(name) != _module_of(constructor):
        raise ValueError(
            f"there is a model {name!r} already, of {defining_module(name)}: choose "
            "another name"
        )
    REGISTRY[name] = constructor


def defining_module(name: str) -> str:
    """Returns the name of the module that defines a model's constructor."""
    return _module_of(REGISTRY[name])


def _module_of(constructor: Callable[..., Model]) -> str:
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    return constructor.__module__


def create(
    name: str,
    num_classes: int,
    *,
    precision: str = "float32",
    axis_name: str | None = None,
) -> Model:
    """Returns the model of that name.

    Args:
      name: a key of `REGISTRY`.
      num_classes: C, the number of logits.
      precision: of convolutions and matmuls: "float32", "tf32" (three-pass bfloat16 on
        TPU) or "bfloat16" (activations are bfloat16 too). Parameters and batch
        statistics are float32 in all three.
      axis_name: the device axis over which batch norm takes its statistics, under
        `pmap` or `shard_map`.

    Raises:
      ValueError: an unknown name or precision, or num_classes < 1.

    >>> model = create("resnet8", num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 1)), train=False).shape
    (2, 10)
    """
    if name not in REGISTRY:
        raise ValueError(names.unregistered("model", name, REGISTRY))
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


def fold_norms(model: Model) -> Model:
    """Returns a model that folds batch norm into convolutions in evaluation.

    It has the same variables and, up to rounding, the same results, by fewer passes
    over the activations. A norm that does not follow a convolution stays; so does every
    norm of a module that is not a `network.Network`. Each call computes the kernels
    anew, so for small batches on a CPU it is slower.

    Args:
      model: a model of `create`.

    >>> model = create("resnet8", num_classes=10)
    >>> fold_norms(model).fold_norms
    True
    """
    if isinstance(model, Network):
        return model.copy(fold_norms=True)
    return model


def apply_with_features(
    model: Model,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    mutable: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
    """Applies a model, and returns its intermediate features too.

    Plain `model.apply` does not keep them.

    Args:
      model: a model of `create`.
      variables: of `model.init`.
      images: float `[B, H, W, channels]`.
      train: whether batch norm takes the batch's statistics.
      mutable: names of the collections to update, such as "batch_stats".

    Returns:
      (logits, features, updates). Logits are `[B, C]`. Features are a dict: `stage1` to
      `stageN`, `[B, h, w, c]`, the end of each stage before its last ReLU; and
      `pooled`, `[B, D]`, the classifier's input. Updates are the collections of
      `mutable`.

    >>> model = create("resnet8", num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    >>> _, features, _ = apply_with_features(
    ...     model, variables, jnp.zeros((2, 8, 8, 1)), train=False)
    >>> features["stage1"].shape, features["stage3"].shape, features["pooled"].shape
    ((2, 8, 8, 16), (2, 2, 2, 64), (2, 64))
    """
    logits, updates = model.apply(
        variables, images, train=train, mutable=[*mutable, "intermediates"]
    )
    # Linen's `sow` collects a tuple, with one entry for each call of the module.
    intermediates = updates.pop("intermediates", {})
    features = {name: values[-1] for name, values in intermediates.items()}
    return logits, features, updates
