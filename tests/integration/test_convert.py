"""The converter of PyTorch's checkpoints: names, shapes and errors."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from ltkd_jax.models import convert

# Modules and shapes of the zoo's smallest model with 10 classes.
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
    "layer1.0.bn1": 16,
    "layer1.0.bn2": 16,
    "layer2.0.bn1": 32,
    "layer2.0.bn2": 32,
    "layer2.0.downsample.1": 32,
    "layer3.0.bn1": 64,
    "layer3.0.bn2": 64,
    "layer3.0.downsample.1": 64,
}


@functools.cache
def _state_dict():
    shapes = {f"{module}.weight": shape for module, shape in CONVS.items()}
    shapes["fc.bias"] = (10,)
    for module, width in NORMS.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{module}.{leaf}"] = (width,)
        shapes[f"{module}.num_batches_tracked"] = ()
    rng = np.random.default_rng(0)
    return {
        key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()
    }


def test_from_torch_arrays():
    state_dict = _state_dict()
    variables = convert.from_torch("resnet8", state_dict, 10)
    leaves = jax.tree.leaves(variables)
    arrays = [x for key, x in state_dict.items() if "num_batches" not in key]
    assert sum(leaf.size for leaf in leaves) == sum(x.size for x in arrays)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    for leaf in leaves:
        assert not any(np.shares_memory(leaf, x) for x in arrays)

    params = variables["params"]
    stem = np.einsum("oihw->hwio", state_dict["conv1.weight"])
    shortcut = state_dict["layer2.0.downsample.0.weight"][..., 0, 0].T
    np.testing.assert_array_equal(params["stem"]["kernel"], stem)
    np.testing.assert_array_equal(
        params["stage2_block1_conv3"]["kernel"][0, 0], shortcut
    )
    np.testing.assert_array_equal(
        params["classifier"]["kernel"], state_dict["fc.weight"].T
    )
    norm_params = params["stage3_block1_norm2"]
    norm_stats = variables["batch_stats"]["stage3_block1_norm2"]
    for actual, leaf in (
        (norm_params["scale"], "weight"),
        (norm_stats["mean"], "running_mean"),
        (norm_stats["var"], "running_var"),
    ):
        np.testing.assert_array_equal(actual, state_dict[f"layer3.0.bn2.{leaf}"])


def test_supported_models():
    narrow = {f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)}
    wide = {"resnet8x4", "resnet32x4"}
    wrns = {"wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"}
    imagenet = {f"resnet{depth}_imagenet" for depth in (18, 34, 50)}
    assert set(convert.SUPPORTED) == narrow | wide | wrns | imagenet


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
            r"'fc.weight'.* \[7, 64\].*10 classes.* \[10, 64\]: .*num_classes=7$",
        ),
        (
            "resnet8",
            {"fc.weight": np.zeros((10, 32))},
            r"'fc.weight'.* \[10, 32\].* needs \[10, 64\]$",
        ),
        (
            "resnet8",
            {"conv1.weight": np.zeros((32, 3, 3, 3))},
            r"'conv1.weight'.* needs \[16, 3, 3, 3\]$",
        ),
        ("resnet18", {}, "'resnet18'.* resnet8, .*resnet50_imagenet"),
        (
            "resnet8",
            {"conv1.weight": np.zeros(16)},
            r"'conv1.weight'.* \[16\].* \[16, 3, 3, 3\]",
        ),
        (
            "resnet8",
            {"bn1.running_var": np.full(16, np.nan)},
            "'bn1.running_var' has 16 of 16 values that are NaN or infinite",
        ),
        # Infinite as a float32.
        ("resnet8", {"fc.bias": np.array([1e300] + [0] * 9)}, "'fc.bias' has 1 of 10"),
        # In Flax's order of the axes it would fit.
        (
            "resnet8",
            {"conv1.weight": np.zeros((3, 3, 3, 16))},
            r"'conv1.weight'.* \[3, 3, 3, 16\]",
        ),
        (
            "wrn_16_1",
            {},
            "wrn_16_1.* lacks 'block1.layer.0.bn1.bias', .* more; it holds 'layer1.0.b",
        ),
    ],
)
def test_from_torch_bad_state_dict(name, change, message):
    changed = _state_dict() | change
    state_dict = {key: x for key, x in changed.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        convert.from_torch(name, state_dict, 10)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model.", "net."]
)
def test_from_torch_prefix(prefix):
    state_dict = _state_dict()
    expected = convert.from_torch("resnet8", state_dict, 10)
    prefixed = {f"{prefix}{key}": x for key, x in state_dict.items()}
    variables = convert.from_torch("resnet8", prefixed, 10)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    with pytest.raises(ValueError, match="lacks 'fc.bias'; it holds"):
        del prefixed[f"{prefix}fc.bias"]
        convert.from_torch("resnet8", prefixed, 10)


@pytest.mark.parametrize(
    "state_dict, held",
    [
        ({"fc.weight": np.zeros((10, 64))}, "'fc.weight'"),
        ({"module.fc.weight": np.zeros((10, 64))}, "'module.fc.weight'"),
        ({"model.fc.bias": np.zeros(10), "ema.fc.bias": 0}, "'ema.fc.bias', 'model.fc"),
        ({}, "nothing"),
    ],
)
def test_from_torch_lists_what_it_has(state_dict, held):
    with pytest.raises(ValueError, match=f"lacks 'bn1.bias'.*; it holds {held}"):
        convert.from_torch("resnet8", state_dict, 10)


def _write(path, variables):
    path.write_bytes(serialization.msgpack_serialize(variables))
    return path


def test_load_round_trip(tmp_path):
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
def test_load_of_another_model(tmp_path, name, num_classes, message):
    path = _write(tmp_path / "w", convert.from_torch("resnet8", _state_dict(), 10))
    with pytest.raises(ValueError, match=message):
        convert.load(path, name, num_classes)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([np.nan] * 2 + [0] * 8), "has 2 of 10 values that are NaN"),
        (np.array([-np.inf] + [0] * 9, jnp.bfloat16), "has 1 of 10 .* such as -inf"),
        (np.zeros(10, np.int8), "is of int8, where resnet8 has float32"),
    ],
)
def test_load_values_that_are_no_weights(tmp_path, array, message):
    variables = convert.from_torch("resnet8", _state_dict(), 10)
    variables["params"]["classifier"]["bias"] = array
    with pytest.raises(ValueError, match=f"w: params/classifier/bias {message}"):
        convert.load(_write(tmp_path / "w", variables), "resnet8", 10)


@pytest.mark.parametrize(
    "content",
    [b"", b"not msgpack", serialization.msgpack_serialize({"params": {}, "x": [1]})],
)
def test_load_unreadable_file(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="w"):
        convert.load(tmp_path / "w", "resnet8", 10)
    with pytest.raises(ValueError, match="cannot read .*absent"):
        convert.load(tmp_path / "absent", "resnet8", 10)


def test_read_state_dict_without_torch(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        convert.read_state_dict("checkpoint.pth")
    out = tmp_path / "out"
    assert convert.main(["resnet8", "checkpoint.pth", str(out)]) == 2
    assert "pip install torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_line(monkeypatch, capsys, tmp_path):
    """An error leaves the old file as it was; no temporary file remains."""
    out = tmp_path / "resnet8.msgpack"
    out.write_bytes(b"old")
    monkeypatch.setattr(convert, "read_state_dict", lambda path: _state_dict())
    # The default is 100 classes.
    assert convert.main(["resnet8", "x.pth", str(out)]) == 2
    assert "'fc.bias' has shape [10]" in capsys.readouterr().err
    assert out.read_bytes() == b"old"

    assert convert.main(["resnet8", "x.pth", str(out), "--num_classes=10"]) == 0
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    variables = convert.load(out, "resnet8", 10)
    bias = variables["params"]["classifier"]["bias"]
    np.testing.assert_array_equal(bias, _state_dict()["fc.bias"])

    out_in_absent_folder = str(tmp_path / "absent" / "out")
    arguments = ["resnet8", "x.pth", out_in_absent_folder, "--num_classes=10"]
    assert convert.main(arguments) == 2
