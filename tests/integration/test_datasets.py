"""Data sets against the libraries they come from, and against TFDS's own decoding."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.content import random_content

from ltkd_jax.data import augment, datasets, records
from ltkd_jax.data.prepare import recipes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data directory with a small CIFAR-10 and a small Fashion-MNIST, and what is in them."""
    data_dir = tmp_path_factory.mktemp("tfds")
    contents = {
        "cifar10": random_content((32, 32, 3), 10),
        "fashion_mnist": random_content((28, 28, 1), 10),
    }
    for name, content in contents.items():
        recipes.prepare(
            recipes.Recipe(name, (), lambda _, content=content: content),
            data_dir,
            "any",
        )
    return data_dir, contents


def whole(part):
    return part.take(np.arange(len(part)))


def check_form(source):
    for part in (whole(source.train), whole(source.test)):
        assert (
            part.images.dtype == np.uint8
            and part.labels.dtype == np.int32
            and part.keys.dtype.kind == "U"
        )
        assert part.images.ndim == 4 and len(part) == len(part.images) == len(
            part.keys
        ) == len(set(part.keys))
        assert (part.keys[1:] > part.keys[:-1]).all()
        assert part.labels.min() == 0 and part.labels.max() == source.num_classes - 1
    assert len(source.class_names) == source.num_classes
    assert len(source.mean) == len(source.std) == source.train.shape[-1]


def test_digits():
    from sklearn.datasets import load_digits

    source, bunch = datasets.load("digits"), load_digits()
    check_form(source)
    assert source.train.shape == (8, 8, 1) and len(source.train) == 1097
    assert np.bincount(source.test.labels).tolist() == [70] * 10
    assert not set(source.train.keys) & set(source.test.keys)
    for part in (source.train, source.test):
        indices = [int(key.removeprefix("digits_")) for key in part.keys]
        np.testing.assert_array_equal(
            np.round(part.images[..., 0] / 255 * 16), bunch.images[indices]
        )
        np.testing.assert_array_equal(part.labels, bunch.target[indices])
    pixels = source.train.images / 255
    np.testing.assert_allclose(
        (source.mean[0], source.std[0]), (pixels.mean(), pixels.std()), atol=1e-4
    )
    assert source.views == augment.Views(pad=1, flip=False)


def test_digits_test_set_is_frozen():
    """A change of the hash would silently change every reported accuracy."""
    keys = datasets.load("digits").test.keys[:4].tolist()
    assert keys == ["digits_0002", "digits_0007", "digits_0010", "digits_0011"]


def test_digits_do_not_import_tfds():
    code = "import sys; from ltkd_jax.data import datasets; datasets.load('digits')"
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}; assert 'tensorflow_datasets' not in sys.modules",
        ],
        check=True,
    )


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
    assert f"python -m ltkd_jax.data.prepare cifar100 --data_dir {tmp_path}" in str(
        error.value
    )


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"


def test_load_another_file_format(small, tmp_path):
    shutil.copytree(small[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(records.DatasetNotPreparedError, match="tfrecord files"):
        datasets.load("cifar10", tmp_path)


def test_load_another_version(small, tmp_path):
    shutil.copytree(small[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(json.dumps(json.loads(info.read_text()) | {"version": "1.0.0"}))
    os.rename(info.parent, info.parent.with_name("1.0.0"))
    with pytest.raises(records.DatasetNotPreparedError, match="not prepared"):
        datasets.load("cifar10", tmp_path)


def test_load_with_ids(small):
    source = datasets.load("cifar10", small[0])
    check_form(source)
    for split, part in (("train", source.train), ("test", source.test)):
        images, labels = small[1]["cifar10"].splits[split]
        assert part.keys.tolist() == [f"{split}_{i:05d}" for i in range(len(images))]
        np.testing.assert_array_equal(whole(part).images, images)
        np.testing.assert_array_equal(part.labels, labels["label"])
    assert source.views == augment.Views(pad=4, flip=True) and source.mean == (
        0.4914,
        0.4822,
        0.4465,
    )


def test_load_without_ids(small):
    source = datasets.load("fashion_mnist", small[0])
    check_form(source)
    images, labels = small[1]["fashion_mnist"].splits["train"]
    expected = {image.tobytes(): label for image, label in zip(images, labels["label"])}
    assert expected == {
        image.tobytes(): label
        for image, label in zip(whole(source.train).images, source.train.labels)
    }
    assert (
        source.views == augment.Views(pad=2, flip=True)
        and source.class_names[9] == "Ankle boot"
    )


def test_content_keys_do_not_depend_on_the_order():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    images[3] = 1
    labels = np.array([2, 1, 0, 0, 1, 2])
    digests = np.array([image.tobytes().hex() for image in images])
    keys = records.content_keys(digests, labels)
    order = np.random.default_rng(0).permutation(6)
    by_key = dict(
        zip(records.content_keys(digests[order], labels[order]), labels[order])
    )
    assert by_key == dict(zip(keys, labels)) and len(by_key) == 6


def test_load_checks_labels(small, monkeypatch):
    monkeypatch.setattr(
        records, "read_index", lambda *_: (np.arange(24) % 12, np.arange(24).astype(str))
    )
    with pytest.raises(ValueError, match=r"=10: 4 labels are outside 0\.\.9"):
        datasets.load("cifar10", small[0])
