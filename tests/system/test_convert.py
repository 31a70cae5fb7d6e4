"""Converted checkpoints give PyTorch's logits; `torch.save`'s files load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import models
from ltkd_jax.models import convert

torch = pytest.importorskip("torch")
# It imports torch, whose absence skips this file above.
from experiments.benchmark import pytorch_models  # noqa: E402


def numpy_state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "name, size",
    [
        ("resnet8x4", 32),
        ("resnet32x4", 32),
        ("wrn_40_2", 32),
        # Sizes at which the strides and the pool have a remainder.
        ("resnet18_imagenet", 75),
        ("resnet34_imagenet", 64),
        ("resnet50_imagenet", 77),
    ],
)
def test_logits(name, size):
    model = pytorch_models.create(name, 100)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        expected = model(images).numpy()
    variables = convert.from_torch(name, numpy_state(model), 100)
    apply = jax.jit(functools.partial(models.create(name, 100).apply, train=False))
    # PyTorch's images are NCHW, flax's NHWC.
    logits = apply(variables, jnp.asarray(images.numpy()).transpose(0, 2, 3, 1))
    # Nearly constant logits would agree whatever the layers do.
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout", ["plain", "model", "state_dict", "parallel", "nested", "parameters"]
)
def test_command_line(tmp_path, layout):
    model = pytorch_models.create("wrn_16_2", 10)
    state = model.state_dict()
    half_state = {name: tensor.half() for name, tensor in state.items()}
    checkpoints = {
        "plain": state,
        "model": {
            "epoch": 240,
            "model": state,
            "best_acc": 76.5,
            "optimizer": {"state": {}},
        },
        "state_dict": {"state_dict": half_state},
        # `DataParallel` prefixes the names.
        "parallel": {"model": {f"module.{name}": x for name, x in state.items()}},
        "nested": {
            "state_dict": {
                "model": {f"_orig_mod.model.{name}": x for name, x in state.items()}
            }
        },
        # They have gradients.
        "parameters": {
            name: torch.nn.Parameter(x.float()) for name, x in state.items()
        },
    }
    torch.save(checkpoints[layout], tmp_path / "ckpt.pth")
    output = tmp_path / "out.msgpack"
    arguments = ["wrn_16_2", str(tmp_path / "ckpt.pth"), str(output)]
    assert convert.main([*arguments, "--num_classes=10"]) == 0
    arrays = numpy_state(model)
    if layout == "state_dict":
        arrays = {name: tensor.numpy() for name, tensor in half_state.items()}
    expected = convert.from_torch("wrn_16_2", arrays, 10)
    actual = convert.load(output, "wrn_16_2", 10)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*absent"):
        convert.read_state_dict(tmp_path / "absent")
    for data in (b"", b"not a checkpoint"):
        (tmp_path / "broken").write_bytes(data)
        with pytest.raises(ValueError, match="cannot read .*broken"):
            convert.read_state_dict(tmp_path / "broken")
    # A path is an object of a class that safe loading refuses.
    torch.save({"model": {}, "options": tmp_path}, tmp_path / "objects")
    with pytest.raises(ValueError, match='save its "model" alone'):
        convert.read_state_dict(tmp_path / "objects")
    for content in ([1, 2], {}, {"model": {}}, {"model": {"epoch": 3}}, torch.zeros(3)):
        torch.save(content, tmp_path / "other")
        with pytest.raises(ValueError, match="holds no state dict"):
            convert.read_state_dict(tmp_path / "other")
    # Sparse, complex, and without values.
    tensors = (
        torch.eye(3).to_sparse(),
        torch.eye(3) + 1j,
        torch.empty(3, device="meta"),
    )
    for tensor in tensors:
        torch.save({"fc.bias": torch.ones(3), "fc.weight": tensor}, tmp_path / "other")
        with pytest.raises(
            ValueError, match="other: 'fc.weight' cannot become a NumPy"
        ):
            convert.read_state_dict(tmp_path / "other")
    torch.save({"net": {"fc.bias": torch.zeros(3)}, "acc": 1}, tmp_path / "other")
    with pytest.raises(ValueError, match="it holds 'acc', 'net'"):
        convert.read_state_dict(tmp_path / "other")
