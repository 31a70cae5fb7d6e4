"""External teachers: the content of their files, and errors."""

import functools

import jax
import numpy as np
import pytest
from flax import serialization
from helpers.small_runs import tiny

from experiments.config.spec import resolve
from experiments.trainer import dataset, external_teacher
from ltkd_jax import files, models


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset.load(resolve(tiny(tmp_path_factory.mktemp("none"), "kd")).data)


@pytest.fixture(scope="module")
def arrays(data):
    """Logits that predict every label, in the order of the data set."""
    arrays = {}
    for prefix, images in (("train_", data.source.train), ("", data.source.test)):
        arrays[f"{prefix}logits"] = 9 * np.eye(10, dtype=np.float16)[images.labels]
        arrays[f"{prefix}labels"] = images.labels
        arrays[f"{prefix}keys"] = images.keys
    return arrays


def test_logits(data, arrays, tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    teacher = external_teacher.load_logits(path, data)
    table = teacher.table(data.train)
    assert table.dtype == np.float32 and teacher.variables is None
    np.testing.assert_array_equal(table, 9 * np.eye(10)[data.train.labels][:, None])
    results = teacher.results
    assert results["hash"] == files.sha256(path)[:12]
    assert results["model"] == "own.npz"
    assert results["test"]["all"] == 100.0
    mass = results["group_mass"]
    assert mass["balanced"]["head"] == pytest.approx(0.3, abs=1e-3)
    in_head = np.asarray(data.groups.assignment) == 0
    head_fraction = data.class_counts[in_head].sum() / data.class_counts.sum()
    assert mass["long_tailed"]["head"] == pytest.approx(head_fraction, abs=2e-3)


def test_rows_are_matched_by_key(data, arrays, tmp_path):
    """In any order, beside rows of other images, with keys as bytes."""
    rng = np.random.default_rng(0)
    shuffled = {}
    for prefix in ("train_", ""):
        number = len(arrays[f"{prefix}labels"])
        # The last row is of an image that the data set does not have.
        order = np.append(rng.permutation(number), 0)
        for name in ("logits", "labels", "keys"):
            shuffled[prefix + name] = arrays[prefix + name][order]
        keys = shuffled[f"{prefix}keys"]
        keys[-1] = "other"
        shuffled[f"{prefix}keys"] = keys.astype("S30")
    # No two images of a class may have the same logits here.
    noise = rng.normal(size=(len(arrays["train_labels"]), 1))
    path = tmp_path / "own.npz"
    ordered = {**arrays, "train_logits": arrays["train_logits"] + noise}
    np.savez(path, **ordered)
    expected = external_teacher.load_logits(path, data)
    rows = np.searchsorted(arrays["train_keys"], shuffled["train_keys"].astype(str))
    rows = np.minimum(rows, len(noise) - 1)
    np.savez(path, **{**shuffled, "train_logits": ordered["train_logits"][rows]})
    teacher = external_teacher.load_logits(path, data)
    np.testing.assert_array_equal(teacher.table(data.train), expected.table(data.train))
    assert teacher.results["test"] == expected.results["test"]


def test_keys_that_are_paths(data, arrays, tmp_path):
    """The key is at the end of a path; rows of other paths are ignored."""
    path = tmp_path / "own.npz"
    noise = np.random.default_rng(0).normal(size=(len(arrays["train_labels"]), 10))
    arrays = {**arrays, "train_logits": noise, "class_names": [*"0123456789"]}
    np.savez(path, **arrays)
    expected = external_teacher.load_logits(path, data).table(data.train)
    paths = np.char.add("/home/me/train/", arrays["train_keys"])
    # Half of the rows have the very key: they go before longer paths.
    paths[::2] = arrays["train_keys"][::2]
    others = np.char.add("C:\\test\\", arrays["train_keys"][::2])
    changed = {
        **arrays,
        "train_logits": np.concatenate([noise, noise[::2] + 1]),
        "train_labels": np.concatenate(
            [arrays["train_labels"], arrays["train_labels"][::2]]
        ),
        "train_keys": np.concatenate([paths, others]),
        "keys": np.char.add("test\\", arrays["keys"]),
    }
    np.savez(path, **changed)
    teacher = external_teacher.load_logits(path, data)
    np.testing.assert_array_equal(teacher.table(data.train), expected)
    assert teacher.results["test"]["all"] == 100.0


def test_logits_of_views(data, arrays, tmp_path):
    path = tmp_path / "own.npz"
    num_views = data.source.views.num
    views = np.repeat(arrays["train_logits"][:, None], num_views, 1)
    views += np.arange(num_views, dtype=np.float16)[:, None]
    labels_and_keys = {name: arrays[name] for name in ("train_labels", "train_keys")}
    np.savez(path, train_logits=views, **labels_and_keys)
    teacher = external_teacher.load_logits(path, data)
    indices = np.searchsorted(data.source.train.keys, data.train.keys)
    np.testing.assert_array_equal(teacher.table(data.train), views[indices])
    assert "test" not in teacher.results
    assert set(teacher.results["group_mass"]) == {"long_tailed"}


def test_probabilities(data, arrays, tmp_path):
    path = tmp_path / "own.npz"
    labels = data.source.train.labels
    p = np.full((len(labels), 10), 0.05, np.float32) + 0.5 * np.eye(10)[labels]
    labels_and_keys = {name: arrays[name] for name in ("train_labels", "train_keys")}
    np.savez(path, train_probabilities=p, **labels_and_keys)
    table = external_teacher.load_logits(path, data).table(data.train)
    np.testing.assert_allclose(jax.nn.softmax(table[:, 0]).max(axis=1), 0.55, rtol=1e-5)


WRONG_SHAPE = r"shape \[%s\], but must be \[N, 10\] or"


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("train_logits", None, "lacks train_logits"),
        ("labels", None, "lacks labels"),
        ("train_logits", lambda x: x[:, None], WRONG_SHAPE % "1097, 1, 10"),
        ("train_logits", lambda x: np.repeat(x, 2, axis=1), WRONG_SHAPE % "1097, 20"),
        (
            "train_logits",
            lambda x: np.where(np.arange(10) == 3, np.nan, x),
            "1097 of 1097 rows hold NaN",
        ),
        (
            "train_logits",
            lambda x: np.full(x.shape, 0.1, np.float32),
            "name the array train_probabilities",
        ),
        ("train_labels", lambda y: np.roll(y, 1), "labels of train_logits are not"),
        ("train_labels", lambda y: y + 1, "train_labels run from 1 to 10"),
        ("train_labels", lambda y: np.eye(10)[y], "that are one-hot: give np.argmax"),
        ("train_keys", None, "lacks train_keys: labels do not show.*'digits_0000'"),
        ("keys", None, "lacks keys"),
        (
            "train_keys",
            lambda keys: np.array(["digits_0001"] * len(keys)),
            "train_keys has 'digits_0001' twice",
        ),
        (
            "train_keys",
            lambda keys: np.char.add(keys, ".png"),
            "train_keys lacks 1097 of .* such as 'digits_0000'.*'digits_0000.png'",
        ),
        (
            "keys",
            lambda keys: np.where(keys == keys[7], "other", keys),
            "keys lacks 1 of the data set's 700 images, such as 'digits_.*'",
        ),
        (
            "keys",
            lambda keys: np.where(keys == keys[7], "a/b/" + str(keys[8]), "a/" + keys),
            "keys has 'a/(?:b/)?(digits_....)' and 'a/(?:b/)?digits_.*, 'digits_",
        ),
        ("class_names", lambda _: [*"0132456789"], "class_names: class 2 is '3'"),
        ("class_names", lambda _: [*"012"], "class_names has 3 classes, .* 10"),
        ("class_names", lambda _: np.eye(10), r"class_names: shape \(10, 10\)"),
    ],
)
def test_bad_logits(data, arrays, tmp_path, name, change, message):
    arrays = dict(arrays)
    array = arrays.pop(name, None)
    if change:
        arrays[name] = change(array)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"teacher.checkpoint: .*bad.npz.*({message})"):
        external_teacher.load_logits(tmp_path / "bad.npz", data)


def test_variables(data, tmp_path):
    model = models.create("resnet8", num_classes=10)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = jax.device_get(init(jax.random.key(0), np.ones((1, *data.image_shape))))
    path = tmp_path / "own.msgpack"
    path.write_bytes(serialization.msgpack_serialize(variables))
    restored = external_teacher.read_variables(path, "resnet8", data)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    message = "teacher.checkpoint.*'resnet14'.*own.msgpack is not of resnet14"
    with pytest.raises(ValueError, match=message):
        external_teacher.read_variables(path, "resnet14", data)
    variables["params"]["classifier"]["bias"] = np.full(10, np.nan, np.float32)
    path.write_bytes(serialization.msgpack_serialize(variables))
    message = "teacher.checkpoint.*own.msgpack: params/classifier/bias has 10 of 10"
    with pytest.raises(ValueError, match=message):
        external_teacher.read_variables(path, "resnet8", data)


def test_unreadable_files(data, tmp_path):
    for name in ("bad.npz", "bad.msgpack"):
        (tmp_path / name).write_bytes(b"not a file of arrays")
    with pytest.raises(ValueError, match="teacher.checkpoint.*bad.npz"):
        external_teacher.load_logits(tmp_path / "bad.npz", data)
    with pytest.raises(ValueError, match="teacher.checkpoint.*bad.msgpack"):
        external_teacher.read_variables(tmp_path / "bad.msgpack", "resnet8", data)


@pytest.mark.parametrize(
    "argument, reason",
    [("kd,mixup=0.2", "many views"), ("reviewkd", "features"), ("kd", "never")],
)
def test_logits_without_a_table(argument, reason, tmp_path):
    path = tmp_path / "own.npz"
    path.touch()
    values = {"teacher.checkpoint": str(path)}
    if reason == "never":
        values["teacher.table"] = "never"
    config = tiny(tmp_path, argument, **values)
    with pytest.raises(ValueError, match=f"teacher.checkpoint=.*own.npz.*{reason}"):
        resolve(config)
