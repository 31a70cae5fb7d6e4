"""The real CIFAR-100 and Fashion-MNIST, from their archives to what training loads."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.archives import binary_archive, cifar_recipe

from ltkd_jax.data import datasets
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import recipes

# Where Debian's package dataset-fashion-mnist installs its files.
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


def assert_class_counts(source, *, train, test):
    """Checks that every class has so many training and test images."""
    assert (np.bincount(source.train.labels) == train).all()
    assert (np.bincount(source.test.labels) == test).all()


def assert_statistics(source):
    """Checks a data set's means and standard deviations against its pixels."""
    images = source.train.take(np.arange(len(source.train))).images
    for channel, (mean, std) in enumerate(zip(source.mean, source.std)):
        pixels = images[..., channel] / 255
        actual = pixels.mean(), pixels.std()
        np.testing.assert_allclose(actual, (mean, std), atol=2e-4)


def test_cifar100(cifar100_dir):
    source = datasets.load("cifar100", cifar100_dir)
    assert_class_counts(source, train=500, test=100)
    assert source.class_names[:2] == ("apple", "aquarium_fish")
    assert_statistics(source)
    expected = tfds.builder("cifar100", data_dir=cifar100_dir).as_data_source("test")
    test = source.test.take(np.arange(len(source.test)))
    # The library sorts the examples by their keys, TFDS does not.
    for i in range(0, len(expected), 97):
        key = expected[i]["id"].decode()
        index = np.searchsorted(test.keys, key)
        assert test.keys[index] == key
        assert test.labels[index] == expected[i]["label"]
        np.testing.assert_array_equal(test.images[index], expected[i]["image"])


def planes(example):
    """Returns an image as the archive stores it: plane by plane, as one row."""
    return example["image"].transpose(2, 0, 1).ravel()


def test_cifar100_from_archive(cifar100_dir, tmp_path):
    """Prepares an archive, and compares the records and their order with TFDS's own.

    The archive holds only the first 5,000 images of each split, which saves two thirds
    of the time.
    """
    builder = tfds.builder("cifar100", data_dir=cifar100_dir)
    ids = {}
    data = {}
    for split in ("train", "test"):
        last_id = f"{split}_04999".encode()
        examples = [x for x in builder.as_data_source(split) if x["id"] <= last_id]
        ids[split] = [example["id"] for example in examples]
        examples.sort(key=lambda example: example["id"])
        labels = {}
        for name in ("label", "coarse_label"):
            labels[name] = np.array([example[name] for example in examples])
        data[split] = np.stack([planes(example) for example in examples]), labels
    archive = tmp_path / "a.tar.gz"
    recipe = cifar_recipe("cifar100", binary_archive(archive, "cifar100", data))
    recipes.prepare(recipe, tmp_path / "tfds", archive)
    prepared = tfds.builder("cifar100", data_dir=tmp_path / "tfds")
    for split, (images, labels) in data.items():
        examples = list(prepared.as_data_source(split))
        assert [example["id"] for example in examples] == ids[split]
        for example in examples:
            # An id ends with the image's position in its split.
            index = int(example["id"][-5:])
            assert (planes(example) == images[index]).all()
            for name, values in labels.items():
                assert example[name] == values[index]


def test_fashion_mnist(tmp_path):
    if not FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    arguments = ["fashion_mnist", f"--data_dir={tmp_path}", f"--source={FASHION_MNIST}"]
    assert command.main(arguments) == 0
    source = datasets.load("fashion_mnist", tmp_path)
    assert_class_counts(source, train=6000, test=1000)
    assert_statistics(source)
