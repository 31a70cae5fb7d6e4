"""Converts PyTorch checkpoints of the CIFAR zoo's and of torchvision's networks.

    python -m ltkd_jax.models.convert resnet32x4 ckpt_epoch_240.pth resnet32x4.msgpack
    python -m ltkd_jax.models.convert resnet50_imagenet resnet50.pth \
        resnet50.msgpack --num_classes=1000

reads a checkpoint of mdistiller or RepDistiller (ResNets and WRNs for CIFAR), or a
state dict of torchvision's ResNet-18, 34 or 50, and writes {"params", "batch_stats"} in
Flax's msgpack format, which `load` reads. Only reading the checkpoint needs PyTorch.
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from ltkd_jax import console, files, models
from ltkd_jax.models.wide_resnet import WideResNet

# Patterns of the layers' names, and PyTorch's name for each: its first {} is the stage,
# its second the block. Blocks are numbered from 1 in this library, from 0 in PyTorch.
_BASIC_RESNET = {
    r"stem": "conv1",
    r"stem_norm": "bn1",
    r"stage(\d+)_block(\d+)_conv([12])": "layer{}.{}.conv{}",
    r"stage(\d+)_block(\d+)_norm([12])": "layer{}.{}.bn{}",
    r"stage(\d+)_block(\d+)_conv3": "layer{}.{}.downsample.0",
    r"stage(\d+)_block(\d+)_norm3": "layer{}.{}.downsample.1",
    r"classifier": "fc",
}
# The projection comes after the convolutions of the block, of which there are three.
_BOTTLENECK_RESNET = {
    r"stage(\d+)_block(\d+)_conv4": "layer{}.{}.downsample.0",
    r"stage(\d+)_block(\d+)_norm4": "layer{}.{}.downsample.1",
    r"stage(\d+)_block(\d+)_conv(3)": "layer{}.{}.conv{}",
    r"stage(\d+)_block(\d+)_norm(3)": "layer{}.{}.bn{}",
    **_BASIC_RESNET,
}
_WIDE_RESNET = {
    r"stem": "conv1",
    r"last_norm": "bn1",
    r"stage(\d+)_block(\d+)_conv([12])": "block{}.layer.{}.conv{}",
    r"stage(\d+)_block(\d+)_norm([12])": "block{}.layer.{}.bn{}",
    r"stage(\d+)_block(\d+)_conv3": "block{}.layer.{}.convShortcut",
    r"classifier": "fc",
}
# Flax's names of a layer's arrays, and PyTorch's.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# By rank, the order of PyTorch's axes in Flax: [out, in, h, w] becomes [h, w, in, out],
# and [out, in] becomes [in, out].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

_CIFAR_SHAPE = (32, 32, 3)
# Of missing or unexpected keys, an error names the first ones.
_MAX_LISTED_KEYS = 5


def _module_patterns(name: str) -> dict[str, str] | None:
    """Returns the patterns of a model's layers, None if it has no converter."""
    model = models.create(name, 1)
    if isinstance(model, models.resnet.CifarResNet):
        return _BASIC_RESNET
    if isinstance(model, WideResNet):
        return _WIDE_RESNET
    # The zoo's variants for small images have other names.
    if isinstance(model, models.resnet.ResNet) and model.imagenet_stem:
        return _BOTTLENECK_RESNET if model.bottleneck else _BASIC_RESNET
    return None


SUPPORTED = tuple(name for name in models.REGISTRY if _module_patterns(name))


def from_torch(
    name: str, state_dict: dict[str, np.ndarray], num_classes: int
) -> dict[str, Any]:
    """Returns a model's variables with the weights of a PyTorch state dict.

    Args:
      name: of the model, one of `SUPPORTED`.
      state_dict: arrays by the names of the zoo or of torchvision, see
        `read_state_dict`. A prefix of all names, such as "module." or
        "_orig_mod.model.", does not matter; `num_batches_tracked` is ignored.
      num_classes: C, of the model.

    Returns:
      {"params", "batch_stats"} as from the model's `init`, as float32 NumPy arrays.

    Raises:
      ValueError: the model has no converter; a key is missing or unexpected, or its
        array has another shape, or values that are not finite.
    """
    if name not in SUPPORTED:
        raise ValueError(
            f"cannot convert {name!r}: the models with a converter are "
            f"{', '.join(SUPPORTED)}"
        )
    arrays = {
        key: np.asarray(x)
        for key, x in state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    modules = _module_patterns(name)
    assert modules is not None
    expected = _expected_variables(name, num_classes)
    torch_keys = {}
    for path in expected:
        _, layer, leaf = path.split("/")
        torch_keys[path] = _torch_key(modules, layer, leaf)
    expected_keys = set(torch_keys.values())
    arrays = _without_prefix(arrays, expected_keys)
    _check_keys(name, set(arrays), expected_keys)

    variables = {}
    for path, variable in expected.items():
        shape = variable.shape
        key = torch_keys[path]
        array = arrays[key]
        axes = _AXES[len(shape)]
        if array.ndim != len(axes) or array.transpose(axes).shape != shape:
            torch_shape = [shape[axes.index(axis)] for axis in range(len(axes))]
            remedy = ""
            is_classifier = path.startswith("params/classifier/")
            if is_classifier and list(array.shape[1:]) == torch_shape[1:]:
                remedy = (
                    f": if it has {len(array)} classes, give num_classes={len(array)}"
                )
            raise ValueError(
                f"{key!r} has shape {list(array.shape)}, but {name} with {num_classes} "
                f"classes needs {torch_shape}{remedy}"
            )
        # A copy, which shares no memory with PyTorch's tensor. Numbers too large for
        # float32 become infinite, and are refused.
        with np.errstate(over="ignore"):
            variables[path] = np.array(array.transpose(axes), np.float32, order="C")
        _check_finite(variables[path], f"the state dict: {key!r}")
    return traverse_util.unflatten_dict(variables, sep="/")


def read_state_dict(path: files.PathLike) -> dict[str, np.ndarray]:
    """Returns the state dict in a file of `torch.save`, as float32 arrays.

    The file holds the state dict itself, or a checkpoint with it under "model",
    "state_dict", or one in the other.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      ValueError: the file cannot be read, or holds no state dict.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading a PyTorch checkpoint needs PyTorch (its CPU build is enough): pip "
            "install torch"
        ) from None
    try:
        # `weights_only`, because any other pickle can run code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(
            f"cannot read {path} ({type(error).__name__}): it must be a file of "
            "torch.save with tensors only; if it holds other objects, save its "
            '"model" alone'
        ) from error
    for key in ("model", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    has_tensors_only = (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) for key in content)
        and all(torch.is_tensor(value) for value in content.values())
    )
    if not has_tensors_only:
        is_dict = isinstance(content, dict)
        held = _list_keys(content) if is_dict else type(content).__name__
        raise ValueError(
            f"{path} holds no state dict: it must have tensors by name, plain or under "
            f'"model"; it holds {held}'
        )
    arrays = {}
    for key, tensor in content.items():
        try:
            if tensor.is_complex():
                raise TypeError("it is complex")
            # A parameter has a gradient, which NumPy cannot hold.
            arrays[key] = tensor.detach().to(torch.float32).numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: {key!r} cannot become a NumPy array ({error}): save it as a "
                "dense tensor of floats"
            ) from error
    return arrays


def load(
    path: files.PathLike,
    name: str,
    num_classes: int,
    *,
    image_shape: tuple[int, ...] = _CIFAR_SHAPE,
) -> dict[str, Any]:
    """Returns the variables in a file of this module, once they fit the model.

    Args:
      path: the file.
      name: of the model, any one of `models.REGISTRY`.
      num_classes: C, of the model.
      image_shape: `(H, W, channels)` of its input.

    Raises:
      ValueError: the file cannot be read, is of another model or number of classes, or
        has values that are not finite.
    """
    try:
        variables = serialization.msgpack_restore(pathlib.Path(path).read_bytes())
        flat_variables = traverse_util.flatten_dict(variables, sep="/")
        arrays = {key: np.asarray(leaf) for key, leaf in flat_variables.items()}
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(
            f"cannot read {path} as variables in Flax's msgpack: {error}"
        ) from error
    expected = _expected_variables(name, num_classes, image_shape)
    for key in sorted(expected.keys() | arrays.keys()):
        shape = _describe_shape(arrays.get(key))
        expected_shape = _describe_shape(expected.get(key))
        if shape != expected_shape:
            raise ValueError(
                f"{path} is not of {name} with {num_classes} classes: of {key} it has "
                f"{shape}, not {expected_shape}"
            )
        if _kind(arrays[key]) != _kind(expected[key]):
            raise ValueError(
                f"{path}: {key} is of {arrays[key].dtype}, where {name} has "
                f"{expected[key].dtype}"
            )
    check_finite(variables, path)
    return variables


def check_finite(variables: dict[str, Any], source: files.PathLike) -> None:
    """Checks that all variables are finite.

    Args:
      variables: nested, such as {"params", "batch_stats"}.
      source: where they come from, for the message.

    Raises:
      ValueError: an array holds NaN or an infinite number.
    """
    for key, array in traverse_util.flatten_dict(variables, sep="/").items():
        _check_finite(np.asarray(array), f"{source}: {key}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns the exit code.

    On an error it is 2, with a message on standard error.
    """
    console.replace_unencodable()
    parser = argparse.ArgumentParser(
        "ltkd_jax.models.convert", description="Weights from PyTorch to Flax."
    )
    parser.add_argument("model", help=f"one of {', '.join(SUPPORTED)}")
    parser.add_argument(
        "checkpoint",
        type=console.path_argument,
        help="a file of torch.save, by mdistiller, RepDistiller or torchvision",
    )
    parser.add_argument("out", type=console.path_argument, help="the file to write")
    parser.add_argument(
        "--num_classes",
        type=console.at_least(1),
        default=100,
        help="of the checkpoint, 1000 for ImageNet (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        state_dict = read_state_dict(args.checkpoint)
        variables = from_torch(args.model, state_dict, args.num_classes)
        with files.atomic_write(args.out) as temporary:
            temporary.write_bytes(serialization.msgpack_serialize(variables))
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.model} with {args.num_classes} classes: {args.out}")
    return 0


def _expected_variables(
    name: str, num_classes: int, image_shape: tuple[int, ...] = _CIFAR_SHAPE
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a model's variables as shapes, by paths like params/stem/kernel."""
    model = models.create(name, num_classes)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )
    return traverse_util.flatten_dict(variables, sep="/")


def _torch_key(modules: dict[str, str], layer: str, leaf: str) -> str:
    """Returns PyTorch's name of an array.

    Args:
      modules: see `_module_patterns`.
      layer: name of a layer, such as stage1_block1_conv2.
      leaf: name of the array in the layer.
    """
    for pattern, module in modules.items():
        match = re.fullmatch(pattern, layer)
        if match is None:
            continue
        if match.groups():
            stage, block, *index = match.groups()
            module = module.format(stage, int(block) - 1, *index)
        return f"{module}.{_LEAVES[leaf]}"
    raise AssertionError(f"no name in PyTorch for {layer}")


def _without_prefix(
    arrays: dict[str, np.ndarray], expected_keys: set[str]
) -> dict[str, np.ndarray]:
    """Returns the arrays without the prefix of modules that all their names share.

    DataParallel puts "module." before every name, torch.compile "_orig_mod.", and a
    module that holds the network the name of its attribute, often "model.".
    """
    common = os.path.commonprefix(list(arrays))
    prefix = common[: common.rfind(".") + 1]
    stripped = {key.removeprefix(prefix): array for key, array in arrays.items()}
    # What the names of a few layers share may be part of their names.
    return arrays if expected_keys.isdisjoint(stripped) else stripped


def _check_keys(name: str, keys: set[str], expected_keys: set[str]) -> None:
    """Raises ValueError if keys are missing or unexpected."""
    missing = expected_keys - keys
    unexpected = keys - expected_keys
    if missing:
        raise ValueError(
            f"not a state dict of {name}: it lacks {_list_keys(missing)}; it holds "
            f"{_list_keys(unexpected or keys)}"
        )
    if unexpected:
        raise ValueError(
            f"not a state dict of {name}: it has also {_list_keys(unexpected)}"
        )


def _list_keys(keys: Iterable[Any]) -> str:
    """Returns the first of some keys, sorted, and the number of the others."""
    listed = sorted(repr(key) for key in keys)
    text = ", ".join(listed[:_MAX_LISTED_KEYS]) or "nothing"
    num_others = len(listed) - _MAX_LISTED_KEYS
    return f"{text} and {num_others} more" if num_others > 0 else text


def _check_finite(array: np.ndarray, name: str) -> None:
    """Raises ValueError unless an array is finite."""
    is_wrong = ~np.isfinite(array)
    if is_wrong.any():
        raise ValueError(
            f"{name} has {is_wrong.sum()} of {array.size} values that are NaN or "
            f"infinite, such as {array[is_wrong][0]}: the training that wrote it "
            "diverged, so use an earlier checkpoint"
        )


def _describe_shape(array: np.ndarray | jax.ShapeDtypeStruct | None) -> str:
    return "none" if array is None else f"shape {list(array.shape)}"


def _kind(array: np.ndarray | jax.ShapeDtypeStruct) -> str:
    """Returns "f" for all floats, and NumPy's letter for the kind of other types."""
    # JAX's `issubdtype` knows bfloat16.
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return "f" if is_float else array.dtype.kind


if __name__ == "__main__":
    sys.exit(main())
