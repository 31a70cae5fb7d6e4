"""Tests the loaded data sets against their sources."""

import json
import os
import pwd
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.content import random_content

from ltkd_jax.data import augment, datasets, records
from ltkd_jax.data.prepare import recipes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a data directory with two small data sets, and their contents by name."""
    data_dir = tmp_path_factory.mktemp("tfds")
    contents = {
        "cifar10": random_content((32, 32, 3), 10),
        "fashion_mnist": random_content((28, 28, 1), 10),
    }
    for name, content in contents.items():
        recipe = recipes.Recipe(name, (), lambda _, content=content: content)
        recipes.prepare(recipe, data_dir, "any")
    return data_dir, contents


def take_all(images):
    return images.take(np.arange(len(images)))


def check_form(source):
    """Checks the types, shapes, keys and labels of a data set."""
    for split in (source.train, source.test):
        images = take_all(split)
        assert images.images.dtype == np.uint8 and images.images.ndim == 4
        assert images.labels.dtype == np.int32
        assert images.keys.dtype.kind == "U"
        assert len(images) == len(images.images) == len(images.keys)
        assert len(set(images.keys)) == len(images)
        assert (images.keys[1:] > images.keys[:-1]).all()
        assert images.labels.min() == 0
        assert images.labels.max() == source.num_classes - 1
    assert len(source.class_names) == source.num_classes
    assert len(source.mean) == len(source.std) == source.train.shape[-1]


def test_digits():
    from sklearn.datasets import load_digits

    source = datasets.load("digits")
    bunch = load_digits()
    check_form(source)
    assert source.train.shape == (8, 8, 1) and len(source.train) == 1097
    assert np.bincount(source.test.labels).tolist() == [70] * 10
    assert not set(source.train.keys) & set(source.test.keys)
    for images in (source.train, source.test):
        indices = [int(key.removeprefix("digits_")) for key in images.keys]
        pixels = np.round(images.images[..., 0] / 255 * 16)
        np.testing.assert_array_equal(pixels, bunch.images[indices])
        np.testing.assert_array_equal(images.labels, bunch.target[indices])
    pixels = source.train.images / 255
    np.testing.assert_allclose(source.mean[0], pixels.mean(), atol=1e-4)
    np.testing.assert_allclose(source.std[0], pixels.std(), atol=1e-4)
    assert source.views == augment.Views(pad=1, flip=False)


def test_digits_frozen_test_set():
    """A change of the hash would silently change every reported accuracy."""
    keys = datasets.load("digits").test.keys[:4].tolist()
    assert keys == ["digits_0002", "digits_0007", "digits_0010", "digits_0011"]


def test_digits_without_tfds():
    code = (
        "import sys; from ltkd_jax.data import datasets; datasets.load('digits'); "
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("cifar_100", "did you mean 'cifar100'"),
        ("svhn", "digits, fashion_mnist, imagenet2012.*prepare folder --name svhn"),
    ],
)
def test_load_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name)


def test_load_unprepared(tmp_path):
    with pytest.raises(records.DatasetNotPreparedError) as error:
        datasets.load("cifar100", tmp_path)
    command = f"python -m ltkd_jax.data.prepare cifar100 --data_dir {tmp_path}"
    assert command in str(error.value)


@pytest.mark.parametrize("depth", ["cifar10", "cifar10/3.0.2"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "pets"])
def test_load_from_a_directory_too_deep(name, depth, prepared):
    """The remedy is the directory above, not a second copy inside."""
    data_dir, _ = prepared
    with pytest.raises(records.DatasetNotPreparedError) as error:
        datasets.load(name, data_dir / depth)
    message = str(error.value)
    assert f"{data_dir / depth} is the folder of a single data set" in message
    assert f"the directory above it, {data_dir}, as data.dir" in message
    assert "run:" not in message


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"


def test_no_home_directory(monkeypatch):
    """A user without HOME and without an entry in the list of users."""

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(FileNotFoundError, match="HOME.*--data_dir.*TFDS_DATA_DIR"):
        datasets.load("cifar10")


def test_load_another_file_format(prepared, tmp_path):
    shutil.copytree(prepared[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(records.DatasetNotPreparedError, match="tfrecord files"):
        datasets.load("cifar10", tmp_path)


def test_load_another_version(prepared, tmp_path):
    shutil.copytree(prepared[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(json.dumps(json.loads(info.read_text()) | {"version": "1.0.0"}))
    os.rename(info.parent, info.parent.with_name("1.0.0"))
    with pytest.raises(records.DatasetNotPreparedError, match="not prepared"):
        datasets.load("cifar10", tmp_path)


def test_load_with_ids(prepared):
    data_dir, contents = prepared
    source = datasets.load("cifar10", data_dir)
    check_form(source)
    for split, split_records in (("train", source.train), ("test", source.test)):
        pixels, labels = contents["cifar10"].splits[split]
        images = take_all(split_records)
        assert images.keys.tolist() == [f"{split}_{i:05d}" for i in range(len(pixels))]
        np.testing.assert_array_equal(images.images, pixels)
        np.testing.assert_array_equal(images.labels, labels["label"])
    assert source.views == augment.Views(pad=4, flip=True)
    assert source.mean == (0.4914, 0.4822, 0.4465)


def test_load_without_ids(prepared):
    data_dir, contents = prepared
    source = datasets.load("fashion_mnist", data_dir)
    check_form(source)
    pixels, labels = contents["fashion_mnist"].splits["train"]
    expected = dict(zip([image.tobytes() for image in pixels], labels["label"]))
    train = take_all(source.train)
    result = dict(zip([image.tobytes() for image in train.images], train.labels))
    assert result == expected
    assert source.views == augment.Views(pad=2, flip=True)
    assert source.class_names[9] == "Ankle boot"


def test_content_keys_independent_of_order():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    images[3] = 1
    labels = np.array([2, 1, 0, 0, 1, 2])
    digests = np.array([image.tobytes().hex() for image in images])
    keys = records.content_keys(digests, labels)
    order = np.random.default_rng(0).permutation(6)
    permuted_keys = records.content_keys(digests[order], labels[order])
    label_of = dict(zip(permuted_keys, labels[order]))
    assert label_of == dict(zip(keys, labels)) and len(label_of) == 6


def test_load_bad_labels(prepared, monkeypatch):
    labels = np.arange(24) % 12
    keys = np.arange(24).astype(str)
    monkeypatch.setattr(records, "read_index", lambda *_: (labels, keys))
    with pytest.raises(ValueError, match=r"=10: 4 labels are outside 0\.\.9"):
        datasets.load("cifar10", prepared[0])
