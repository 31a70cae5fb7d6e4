"""The converter of the zoo's checkpoints beside PyTorch: the same logits, and files that torch.save wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import models
from ltkd_jax.models import convert

torch = pytest.importorskip("torch")
from experiments.benchmark import pytorch_models


@pytest.mark.parametrize("name", ["resnet8x4", "resnet32x4", "wrn_40_2"])
def test_logits(name):
    model = pytorch_models.create(name, 100)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).numpy()
    variables = convert.from_torch(
        name, {key: x.numpy() for key, x in model.state_dict().items()}, 100
    )
    apply = jax.jit(functools.partial(models.create(name, 100).apply, train=False))
    logits = apply(variables, jnp.asarray(images.numpy()).transpose(0, 2, 3, 1))
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "parallel"])
def test_command_line(tmp_path, wrap):
    state = pytorch_models.create("wrn_16_2", 10).state_dict()
    content = {
        "plain": state,
        "model": {
            "epoch": 240,
            "model": state,
            "best_acc": 76.5,
            "optimizer": {"state": {}},
        },
        "state_dict": {"state_dict": {key: x.half() for key, x in state.items()}},
        "parallel": {"model": {f"module.{key}": x for key, x in state.items()}},
    }[wrap]
    torch.save(content, tmp_path / "ckpt.pth")
    out = tmp_path / "out.msgpack"
    assert (
        convert.main(
            ["wrn_16_2", str(tmp_path / "ckpt.pth"), str(out), "--num_classes=10"]
        )
        == 0
    )
    arrays = {
        key: (x.half() if wrap == "state_dict" else x).numpy()
        for key, x in state.items()
    }
    expected = convert.from_torch("wrn_16_2", arrays, 10)
    jax.tree.map(
        np.testing.assert_array_equal, convert.load(out, "wrn_16_2", 10), expected
    )


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*absent"):
        convert.read_state_dict(tmp_path / "absent")
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read .*broken"):
            convert.read_state_dict(tmp_path / "broken")
    torch.save(
        {"model": {}, "options": tmp_path}, tmp_path / "objects"
    )  # a path is an object of another class
    with pytest.raises(ValueError, match='save its "model" alone'):
        convert.read_state_dict(tmp_path / "objects")
    for content in ([1, 2], {}, {"model": {}}, {"model": {"epoch": 3}}, torch.zeros(3)):
        torch.save(content, tmp_path / "other")
        with pytest.raises(ValueError, match="holds no state dict"):
            convert.read_state_dict(tmp_path / "other")
