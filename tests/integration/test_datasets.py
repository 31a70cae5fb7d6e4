"""Sources against the libraries they come from, and against TFDS's own decoding."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.content import random_content
from PIL import Image

from ltkd_jax.data import augment, datasets, records
from ltkd_jax.data.prepare import recipes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data directory with a small CIFAR-10 and a small Fashion-MNIST, and what is in them."""
    place = tmp_path_factory.mktemp("tfds")
    contents = {"cifar10": random_content((32, 32, 3), 10), "fashion_mnist": random_content((28, 28, 1), 10)}
    for name, content in contents.items():
        recipes.prepare(recipes.Recipe(name, (), lambda _, content=content: content), place, "any")
    return place, contents


def whole(part):
    return part.take(np.arange(len(part)))


def check_form(source):
    for part in (whole(source.train), whole(source.test)):
        assert part.images.dtype == np.uint8 and part.labels.dtype == np.int32 and part.keys.dtype.kind == "U"
        assert part.images.ndim == 4 and len(part) == len(part.images) == len(part.keys) == len(set(part.keys))
        assert (part.keys[1:] > part.keys[:-1]).all()
        assert part.labels.min() == 0 and part.labels.max() == source.num_classes - 1
    assert len(source.class_names) == source.num_classes
    assert len(source.mean) == len(source.std) == source.train.shape[-1]


def test_digits():
    source = datasets.load("digits")
    check_form(source)
    assert source.train.images.shape == (1097, 8, 8, 1) and len(source.test) == 700
    assert np.bincount(source.test.labels).tolist() == [70] * 10
    assert not set(source.train.keys) & set(source.test.keys)
    assert source.train.images.max() == 255
    pixels = source.train.images / 255
    np.testing.assert_allclose((source.mean[0], source.std[0]), (pixels.mean(), pixels.std()), atol=1e-4)
    assert source.views == augment.Views(pad=1, flip=False)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source, bunch = datasets.load("digits"), load_digits()
    for part in (source.train, source.test):
        index = [int(key.removeprefix("digits_")) for key in part.keys]
        np.testing.assert_array_equal(np.round(part.images[..., 0] / 255 * 16), bunch.images[index])
        np.testing.assert_array_equal(part.labels, bunch.target[index])


def test_the_test_set_of_digits_is_frozen():
    """A change of the hash would silently change every reported accuracy."""
    assert datasets.load("digits").test.keys[:4].tolist() == [
        "digits_0002",
        "digits_0007",
        "digits_0010",
        "digits_0011",
    ]


def test_digits_do_not_import_tfds():
    code = """
import sys
from ltkd_jax.data import sources
sources.load("digits")
print("tensorflow_datasets" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "name, message",
    [
        ("cifar_100", "did you mean 'cifar100'"),
        ("svhn", "digits, fashion_mnist, imagenet2012.*prepare folder --name svhn"),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name)


def test_an_unprepared_data_set_says_at_once_what_to_run(tmp_path):
    start = time.perf_counter()
    with pytest.raises(records.DatasetNotPrepared) as error:
        datasets.load("cifar100", tmp_path)
    assert time.perf_counter() - start < 1
    assert f"python -m ltkd_jax.data.prepare cifar100 --data_dir {tmp_path}" in str(error.value)


def test_the_default_directory_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"


def test_another_file_format_is_refused(small, tmp_path):
    shutil.copytree(small[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(records.DatasetNotPrepared, match="tfrecord files"):
        datasets.load("cifar10", tmp_path)


def test_another_version_is_not_the_data_set(small, tmp_path):
    shutil.copytree(small[0] / "cifar10", tmp_path / "cifar10")
    info = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    info.write_text(json.dumps(json.loads(info.read_text()) | {"version": "1.0.0"}))
    os.rename(info.parent, info.parent.with_name("1.0.0"))
    with pytest.raises(records.DatasetNotPrepared, match="not prepared"):
        datasets.load("cifar10", tmp_path)


def test_load_with_ids(small):
    source = datasets.load("cifar10", small[0])
    check_form(source)
    for split, part in (("train", source.train), ("test", source.test)):
        images, labels = small[1]["cifar10"].splits[split]
        assert part.keys.tolist() == [f"{split}_{i:05d}" for i in range(len(images))]
        np.testing.assert_array_equal(whole(part).images, images)
        np.testing.assert_array_equal(part.labels, labels["label"])
    assert source.views == augment.Views(pad=4, flip=True) and source.mean == (0.4914, 0.4822, 0.4465)


def test_load_without_ids(small):
    source = datasets.load("fashion_mnist", small[0])
    check_form(source)
    images, labels = small[1]["fashion_mnist"].splits["train"]
    expected = {image.tobytes(): label for image, label in zip(images, labels["label"])}
    assert expected == {image.tobytes(): label for image, label in zip(whole(source.train).images, source.train.labels)}
    assert source.views == augment.Views(pad=2, flip=True) and source.class_names[9] == "Ankle boot"


def test_keys_of_content_do_not_depend_on_the_order():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    images[3] = 1
    labels = np.array([2, 1, 0, 0, 1, 2])
    digests = np.array([image.tobytes().hex() for image in images])
    keys = records.content_keys(digests, labels)
    order = np.random.default_rng(0).permutation(6)
    again = records.content_keys(digests[order], labels[order])
    by_key = dict(zip(again, labels[order]))
    assert by_key == dict(zip(keys, labels)) and len(by_key) == 6


def test_labels_are_checked(small, monkeypatch):
    monkeypatch.setattr(records, "index", lambda *_: (np.arange(24) % 12, np.arange(24).astype(str)))
    with pytest.raises(ValueError, match=r"=10: 4 labels are outside 0\.\.9"):
        datasets.load("cifar10", small[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_png_is_decoded_as_pillow_does(mode):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format="png")
    for channels, wanted in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(file).convert(wanted))
        np.testing.assert_array_equal(records.decode(file.getvalue(), channels), expected)


def test_the_real_test_split_is_that_of_tfds(cifar100_dir):
    builder = records.open_builder("cifar100", cifar100_dir)
    part = whole(records.read(builder, "test"))
    assert part.images.shape == (10_000, 32, 32, 3) and (np.bincount(part.labels) == 100).all()
    reference = builder.as_data_source("test")
    for i in range(0, 10_000, 97):
        record = reference[i]
        row = np.searchsorted(part.keys, record["id"].decode())
        assert part.keys[row] == record["id"].decode() and part.labels[row] == record["label"]
        np.testing.assert_array_equal(part.images[row], record["image"])


@pytest.mark.slow
def test_the_real_cifar100(cifar100_dir):
    source = datasets.load("cifar100", cifar100_dir)
    check_form(source)
    train = whole(source.train)
    assert train.images.shape == (50_000, 32, 32, 3) and (np.bincount(source.train.labels) == 500).all()
    assert source.class_names[:2] == ("apple", "aquarium_fish")
    pixels = train.images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), source.mean, atol=2e-4)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), source.std, atol=2e-4)
