"""Weights of the CIFAR distillation zoo's ResNets and WRNs, from PyTorch's state dict to our variables.

    python -m ltkd_jax.models.convert resnet32x4 ckpt_epoch_240.pth resnet32x4.msgpack

reads a checkpoint that mdistiller or RepDistiller wrote and writes {"params", "batch_stats"} as Flax serialises it;
`load` reads that back. Only the reading of the checkpoint needs PyTorch.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from ltkd_jax import files, models
from ltkd_jax.models.wide_resnet import WideResNet

# Patterns of our layers, and the zoo's modules. Blocks count from 1 here and from 0 there.
_MODULES = {
    models.resnet.CifarResNet: {
        r"stem": "conv1",
        r"stem_norm": "bn1",
        r"stage(\d+)_block(\d+)_conv([12])": "layer{}.{}.conv{}",
        r"stage(\d+)_block(\d+)_norm([12])": "layer{}.{}.bn{}",
        r"stage(\d+)_block(\d+)_conv3": "layer{}.{}.downsample.0",
        r"stage(\d+)_block(\d+)_norm3": "layer{}.{}.downsample.1",
        r"classifier": "fc",
    },
    WideResNet: {
        r"stem": "conv1",
        r"last_norm": "bn1",
        r"stage(\d+)_block(\d+)_conv([12])": "block{}.layer.{}.conv{}",
        r"stage(\d+)_block(\d+)_norm([12])": "block{}.layer.{}.bn{}",
        r"stage(\d+)_block(\d+)_conv3": "block{}.layer.{}.convShortcut",
        r"classifier": "fc",
    },
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# By rank, the zoo's axes in our order: [out, in, h, w] becomes [h, w, in, out], and [out, in] becomes [in, out].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

SUPPORTED = tuple(
    name for name in models.REGISTRY if type(models.create(name, 1)) in _MODULES
)


def from_torch(
    name: str, state_dict: dict[str, np.ndarray], num_classes: int
) -> dict[str, Any]:
    """Our variables of a model, with the weights of a state dict.

    Args:
      name: one of `SUPPORTED`.
      state_dict: the zoo's names to arrays, as `read` gives them; `num_batches_tracked` is ignored.
      num_classes: of the model.

    Returns:
      {"params", "batch_stats"} as the model's `init` gives them, of float32 NumPy arrays.

    Raises:
      ValueError: another model; a key that is missing, left over or of another shape.
    """
    if name not in SUPPORTED:
        raise ValueError(
            f"cannot convert {name!r}: the models with a converter are {', '.join(SUPPORTED)}"
        )
    arrays = {
        key: np.asarray(x)
        for key, x in state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    modules = _MODULES[type(models.create(name, num_classes))]
    shapes = _shapes(name, num_classes)
    keys = {path: _torch_key(modules, *path.split("/")[1:]) for path in shapes}
    for problem, wrong in (
        ("lacks", {*keys.values()} - {*arrays}),
        ("has also", {*arrays} - {*keys.values()}),
    ):
        if wrong:
            raise ValueError(
                f"not a state dict of {name}: it {problem} {', '.join(map(repr, sorted(wrong)[:5]))}"
            )
    converted = {}
    for path, shape in shapes.items():
        value, axes = arrays[keys[path]], _AXES[len(shape)]
        if value.ndim != len(axes) or value.transpose(axes).shape != shape:
            needed = [shape[axes.index(axis)] for axis in range(len(axes))]
            raise ValueError(
                f"{keys[path]!r} has shape {list(value.shape)}, but {name} with {num_classes} classes needs {needed}"
            )
        converted[path] = np.array(value.transpose(axes), np.float32, order="C")
    return traverse_util.unflatten_dict(converted, sep="/")


def read(path: files.PathLike) -> dict[str, np.ndarray]:
    """The state dict in a file that `torch.save` wrote: itself, or under "model" or "state_dict" of a checkpoint.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      ValueError: the file cannot be read, or holds no state dict.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading a PyTorch checkpoint needs PyTorch (its CPU build is enough): pip install torch"
        ) from None
    try:
        # `weights_only`: a pickle may run any code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises what its bytes make it
        raise ValueError(
            f"cannot read {path} ({type(error).__name__}): expected is a file of torch.save with tensors only; if it "
            'holds other objects, save its "model" alone'
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(map(torch.is_tensor, content.values()))
    ):
        raise ValueError(
            f'{path} holds no state dict: expected are tensors by name, plain or under "model"'
        )
    # DataParallel puts a "module." before every name.
    return {
        key.removeprefix("module."): tensor.to(torch.float32).numpy()
        for key, tensor in content.items()
    }


def load(
    path: files.PathLike,
    name: str,
    num_classes: int,
    *,
    image_shape: tuple[int, ...] = (32, 32, 3),
) -> dict[str, Any]:
    """The variables in a file that this module wrote, checked against a model.

    Args:
      path: the file.
      name: any model's.
      num_classes: of the model.
      image_shape: of its input.

    Raises:
      ValueError: the file cannot be read, or is of another model or number of classes.
    """
    try:
        variables = serialization.msgpack_restore(pathlib.Path(path).read_bytes())
        found = {
            key: np.shape(leaf)
            for key, leaf in traverse_util.flatten_dict(variables, sep="/").items()
        }
    except Exception as error:  # a broken file raises what its bytes make it
        raise ValueError(
            f"cannot read {path} as variables in Flax's msgpack: {error}"
        ) from error
    expected = _shapes(name, num_classes, image_shape)
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            has, needs = (
                f"shape {list(x[key])}" if key in x else "none"
                for x in (found, expected)
            )
            raise ValueError(
                f"{path} is not of {name} with {num_classes} classes: of {key} it has {has}, not {needs}"
            )
    return variables


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 with a message on the standard error if it can't be done."""
    parser = argparse.ArgumentParser(
        "ltkd_jax.models.convert", description="Weights from PyTorch to Flax."
    )
    parser.add_argument("model", help=f"one of {', '.join(SUPPORTED)}")
    parser.add_argument(
        "checkpoint", help="a file of torch.save, by mdistiller or RepDistiller"
    )
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--num_classes", type=int, default=100)
    args = parser.parse_args(argv)
    try:
        variables = from_torch(args.model, read(args.checkpoint), args.num_classes)
        with files.atomic_write(args.out) as temporary:
            temporary.write_bytes(serialization.msgpack_serialize(variables))
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.model} with {args.num_classes} classes: {args.out}")
    return 0


def _shapes(
    name: str, num_classes: int, image_shape: tuple[int, ...] = (32, 32, 3)
) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's variables by their paths."""
    model = models.create(name, num_classes)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )
    return {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }


def _torch_key(modules: dict[str, str], layer: str, leaf: str) -> str:
    for pattern, module in modules.items():
        if match := re.fullmatch(pattern, layer):
            stage, block, *index = match.groups() or (None, 1)
            return f"{module.format(stage, int(block) - 1, *index)}.{_LEAVES[leaf]}"
    raise AssertionError(f"no name in the zoo for {layer}")


if __name__ == "__main__":
    sys.exit(main())
