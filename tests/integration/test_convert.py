"""The converter of the zoo's checkpoints: names, shapes and errors."""

import functools
import sys

import jax
import numpy as np
import pytest
from flax import serialization

from ltkd_jax.models import convert

# Modules and shapes of the zoo's smallest model with 10 classes, written out once.
CONVS = {
    "conv1": (16, 3, 3, 3),
    "layer1.0.conv1": (16, 16, 3, 3),
    "layer1.0.conv2": (16, 16, 3, 3),
    "layer2.0.conv1": (32, 16, 3, 3),
    "layer2.0.conv2": (32, 32, 3, 3),
    "layer2.0.downsample.0": (32, 16, 1, 1),
    "layer3.0.conv1": (64, 32, 3, 3),
    "layer3.0.conv2": (64, 64, 3, 3),
    "layer3.0.downsample.0": (64, 32, 1, 1),
    "fc": (10, 64),
}
NORMS = {
    "bn1": 16,
    **{f"layer{stage}.0.bn{i}": 8 * 2**stage for stage in (1, 2, 3) for i in (1, 2)},
    "layer2.0.downsample.1": 32,
    "layer3.0.downsample.1": 64,
}


@functools.cache
def _state_dict():
    rng = np.random.default_rng(0)
    shapes = {f"{module}.weight": shape for module, shape in CONVS.items()} | {
        "fc.bias": (10,)
    }
    for module, width in NORMS.items():
        shapes |= {
            f"{module}.{leaf}": (width,)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        }
        shapes[f"{module}.num_batches_tracked"] = ()
    return {
        key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()
    }


def test_every_array_finds_its_place():
    state = _state_dict()
    variables = convert.from_torch("resnet8", state, 10)
    leaves = jax.tree.leaves(variables)
    assert sum(leaf.size for leaf in leaves) == sum(
        x.size for k, x in state.items() if "num_batches" not in k
    )
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    assert not any(np.shares_memory(leaf, x) for leaf in leaves for x in state.values())
    params, stats = variables["params"], variables["batch_stats"]
    shortcut = state["layer2.0.downsample.0.weight"]
    np.testing.assert_array_equal(
        params["stem"]["kernel"], np.einsum("oihw->hwio", state["conv1.weight"])
    )
    np.testing.assert_array_equal(
        params["stage2_block1_conv3"]["kernel"][0, 0], shortcut[..., 0, 0].T
    )
    np.testing.assert_array_equal(params["classifier"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(
        params["stage3_block1_norm2"]["scale"], state["layer3.0.bn2.weight"]
    )
    np.testing.assert_array_equal(
        stats["stage3_block1_norm2"]["mean"], state["layer3.0.bn2.running_mean"]
    )
    np.testing.assert_array_equal(
        stats["stage3_block1_norm2"]["var"], state["layer3.0.bn2.running_var"]
    )


def test_supported_models():
    small = {
        "resnet8",
        "resnet14",
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "resnet110",
    }
    wrns = {"wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"}
    assert set(convert.SUPPORTED) == small | wrns | {"resnet8x4", "resnet32x4"}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("vgg8", {}, "'vgg8'.* resnet8, "),
        (
            "resnet8",
            {"layer2.0.bn1.running_var": None},
            "lacks 'layer2.0.bn1.running_var'",
        ),
        (
            "resnet8",
            {"layer1.1.conv1.weight": np.zeros(3)},
            "also 'layer1.1.conv1.weight'",
        ),
        (
            "resnet8",
            {"fc.weight": np.zeros((7, 64))},
            r"'fc.weight'.* \[7, 64\].*10 classes.* \[10, 64\]",
        ),
        (
            "resnet8",
            {"conv1.weight": np.zeros(16)},
            r"'conv1.weight'.* \[16\].* \[16, 3, 3, 3\]",
        ),
        # In our order it would fit.
        (
            "resnet8",
            {"conv1.weight": np.zeros((3, 3, 3, 16))},
            r"'conv1.weight'.* \[3, 3, 3, 16\]",
        ),
        ("wrn_16_1", {}, "wrn_16_1.* lacks 'block1.layer.0.bn1.bias', "),
    ],
)
def test_a_state_dict_of_something_else(name, change, message):
    state = _state_dict() | change
    with pytest.raises(ValueError, match=message):
        convert.from_torch(
            name, {key: x for key, x in state.items() if x is not None}, 10
        )


def _write(path, variables):
    path.write_bytes(serialization.msgpack_serialize(variables))
    return path


def test_load_gives_back_what_was_written(tmp_path):
    variables = convert.from_torch("resnet8", _state_dict(), 10)
    loaded = convert.load(_write(tmp_path / "w", variables), "resnet8", 10)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(
    "name, num_classes, message",
    [
        (
            "resnet8",
            100,
            r"resnet8 with 100 classes.* params/classifier/bias .*\[10\].*\[100\]",
        ),
        ("resnet14", 10, r"resnet14 .* none, not shape \[16\]"),
        (
            "wrn_16_1",
            10,
            r"wrn_16_1 .* batch_stats/last_norm/mean .* none, not shape \[64\]",
        ),
    ],
)
def test_load_checks_the_model(tmp_path, name, num_classes, message):
    path = _write(tmp_path / "w", convert.from_torch("resnet8", _state_dict(), 10))
    with pytest.raises(ValueError, match=message):
        convert.load(path, name, num_classes)


@pytest.mark.parametrize(
    "content",
    [b"", b"not msgpack", serialization.msgpack_serialize({"params": {}, "x": [1]})],
)
def test_load_of_another_file(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="w"):
        convert.load(tmp_path / "w", "resnet8", 10)
    with pytest.raises(ValueError, match="cannot read .*absent"):
        convert.load(tmp_path / "absent", "resnet8", 10)


def test_without_torch_the_error_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        convert.read_state_dict("checkpoint.pth")
    assert convert.main(["resnet8", "checkpoint.pth", str(tmp_path / "out")]) == 2
    assert "pip install torch" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_the_command_line_writes_the_file_whole(monkeypatch, capsys, tmp_path):
    out = tmp_path / "resnet8.msgpack"
    out.write_bytes(b"old")
    monkeypatch.setattr(convert, "read_state_dict", lambda path: _state_dict())
    assert convert.main(["resnet8", "x.pth", str(out)]) == 2  # 10 classes are not 100
    assert (
        "'fc.bias' has shape [10]" in capsys.readouterr().err
        and out.read_bytes() == b"old"
    )
    assert convert.main(["resnet8", "x.pth", str(out), "--num_classes=10"]) == 0
    assert str(out) in capsys.readouterr().out and [
        path.name for path in tmp_path.iterdir()
    ] == [out.name]
    loaded = convert.load(out, "resnet8", 10)
    np.testing.assert_array_equal(
        loaded["params"]["classifier"]["bias"], _state_dict()["fc.bias"]
    )
    assert (
        convert.main(
            ["resnet8", "x.pth", str(tmp_path / "absent" / "out"), "--num_classes=10"]
        )
        == 2
    )
