"""Teachers from files: what is read of them, and errors that say what is wrong."""

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
    """Logits that tell every label, in the order of the data set."""
    arrays = {}
    for prefix, images in (("train_", data.source.train), ("", data.source.test)):
        arrays[f"{prefix}logits"] = 9 * np.eye(10, dtype=np.float16)[images.labels]
        arrays[f"{prefix}labels"] = images.labels
    return arrays


def test_logits(data, arrays, tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays, train_keys=data.source.train.keys)
    teacher = external_teacher.load_logits(path, data)
    table = teacher.table(data.train)
    assert table.dtype == np.float32 and teacher.variables is None
    np.testing.assert_array_equal(table, 9 * np.eye(10)[data.train.labels][:, None])
    assert (
        teacher.results["hash"] == files.sha256(path)[:12]
        and teacher.results["hash"] in teacher.results["model"]
    )
    assert teacher.results["test"]["all"] == 100.0
    mass = teacher.results["group_mass"]
    assert mass["balanced"]["head"] == pytest.approx(0.3, abs=1e-3)
    share = (
        data.class_counts[np.asarray(data.groups.assignment) == 0].sum()
        / data.class_counts.sum()
    )
    assert mass["long_tailed"]["head"] == pytest.approx(share, abs=2e-3)


def test_logits_of_views(data, arrays, tmp_path):
    views = np.repeat(arrays["train_logits"][:, None], data.source.views.num, 1)
    views += np.arange(data.source.views.num, dtype=np.float16)[:, None]
    np.savez(
        tmp_path / "own.npz", train_logits=views, train_labels=arrays["train_labels"]
    )
    teacher = external_teacher.load_logits(tmp_path / "own.npz", data)
    indices = np.searchsorted(data.source.train.keys, data.train.keys)
    np.testing.assert_array_equal(teacher.table(data.train), views[indices])
    assert "test" not in teacher.results and teacher.results["group_mass"].keys() == {
        "long_tailed"
    }


def test_probabilities(data, arrays, tmp_path):
    p = (
        np.full((len(data.source.train), 10), 0.05, np.float32)
        + 0.5 * np.eye(10)[data.source.train.labels]
    )
    np.savez(
        tmp_path / "own.npz", train_probabilities=p, train_labels=arrays["train_labels"]
    )
    table = external_teacher.load_logits(tmp_path / "own.npz", data).table(data.train)
    np.testing.assert_allclose(jax.nn.softmax(table[:, 0]).max(axis=1), 0.55, rtol=1e-5)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("train_logits", None, "lacks train_logits"),
        ("labels", None, "lacks labels"),
        (
            "train_logits",
            lambda x: x[:, None],
            r"shape \[1097, 1, 10\], but must be \[1097, 10\] or",
        ),
        (
            "train_logits",
            lambda x: np.repeat(x, 2, axis=1),
            r"shape \[1097, 20\], but must be \[1097, 10\] or",
        ),
        (
            "train_logits",
            lambda x: np.where(np.arange(10) == 3, np.nan, x),
            "1097 of 1097 rows hold NaN",
        ),
        (
            "train_labels",
            lambda y: np.roll(y, 1),
            "labels of train_logits are not those of the data set",
        ),
        (
            "train_keys",
            lambda _: np.array(["digits_0001"] * 1097),
            "keys of train_logits are not those of the data set",
        ),
    ],
)
def test_logits_that_do_not_fit(data, arrays, tmp_path, name, change, message):
    arrays = dict(arrays)
    array = arrays.pop(name, None)
    if change:
        arrays[name] = change(array)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"teacher.checkpoint: .*bad.npz.*({message})"):
        external_teacher.load_logits(tmp_path / "bad.npz", data)


def test_variables(data, tmp_path):
    init = jax.jit(
        functools.partial(models.create("resnet8", num_classes=10).init, train=False)
    )
    variables = jax.device_get(init(jax.random.key(0), np.ones((1, *data.image_shape))))
    path = tmp_path / "own.msgpack"
    path.write_bytes(serialization.msgpack_serialize(variables))
    read = external_teacher.read_variables(path, "resnet8", data)
    jax.tree.map(np.testing.assert_array_equal, read, variables)
    with pytest.raises(
        ValueError,
        match="teacher.checkpoint.*'resnet14'.*own.msgpack is not of resnet14",
    ):
        external_teacher.read_variables(path, "resnet14", data)


def test_files_that_cannot_be_read(data, tmp_path):
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
def test_logits_where_nothing_is_looked_up(argument, reason, tmp_path):
    (tmp_path / "own.npz").touch()
    table = {"teacher.table": "never"} if reason == "never" else {}
    config = tiny(
        tmp_path, argument, **{"teacher.checkpoint": str(tmp_path / "own.npz")}, **table
    )
    with pytest.raises(ValueError, match=f"teacher.checkpoint=.*own.npz.*{reason}"):
        resolve(config)
