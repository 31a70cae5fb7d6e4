"""The real CIFAR-100 and the real Fashion-MNIST, from their archives to what training loads."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.archives import binary_archive, cifar_recipe

from ltkd_jax.data import datasets
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import recipes

FASHION_MNIST = pathlib.Path(
    "/usr/share/datasets/fashion-mnist"
)  # of Debian's package dataset-fashion-mnist


def check_statistics(source):
    images = source.train.take(np.arange(len(source.train))).images
    for channel, (mean, std) in enumerate(zip(source.mean, source.std)):
        pixels = images[..., channel] / 255
        np.testing.assert_allclose(
            (pixels.mean(), pixels.std()), (mean, std), atol=2e-4
        )


def test_cifar100(cifar100_dir):
    source = datasets.load("cifar100", cifar100_dir)
    assert (np.bincount(source.train.labels) == 500).all() and (
        np.bincount(source.test.labels) == 100
    ).all()
    assert source.class_names[:2] == ("apple", "aquarium_fish")
    check_statistics(source)
    reference = tfds.builder("cifar100", data_dir=cifar100_dir).as_data_source("test")
    test = source.test.take(np.arange(len(source.test)))
    for i in range(0, len(reference), 97):
        row = np.searchsorted(test.keys, reference[i]["id"].decode())
        assert (
            test.keys[row] == reference[i]["id"].decode()
            and test.labels[row] == reference[i]["label"]
        )
        np.testing.assert_array_equal(test.images[row], reference[i]["image"])


def test_cifar100_through_an_archive(cifar100_dir, tmp_path):
    """What is prepared from an archive equals TFDS's own directory, to the order of the records.

    The archive holds the first 5,000 images of each split, which is a third of the time of all.
    """
    builder = tfds.builder("cifar100", data_dir=cifar100_dir)
    ids, data = {}, {}
    for split in ("train", "test"):
        last_id = f"{split}_04999".encode()
        examples = [
            example
            for example in builder.as_data_source(split)
            if example["id"] <= last_id
        ]
        ids[split] = [example["id"] for example in examples]
        examples.sort(key=lambda example: example["id"])
        labels = {
            name: np.array([example[name] for example in examples])
            for name in ("label", "coarse_label")
        }
        data[split] = (
            np.stack(
                [example["image"].transpose(2, 0, 1).ravel() for example in examples]
            ),
            labels,
        )
    layout = binary_archive(tmp_path / "a.tar.gz", "cifar100", data)
    recipes.prepare(
        cifar_recipe("cifar100", layout), tmp_path / "tfds", tmp_path / "a.tar.gz"
    )
    prepared = tfds.builder("cifar100", data_dir=tmp_path / "tfds")
    for split, (planes, labels) in data.items():
        examples = list(prepared.as_data_source(split))
        assert [example["id"] for example in examples] == ids[split]
        for example in examples:
            row = int(example["id"][-5:])
            assert (example["image"].transpose(2, 0, 1).ravel() == planes[row]).all()
            assert all(example[name] == values[row] for name, values in labels.items())


def test_fashion_mnist(tmp_path):
    if not FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    arguments = ["fashion_mnist", f"--data_dir={tmp_path}", f"--source={FASHION_MNIST}"]
    assert command.main(arguments) == 0
    source = datasets.load("fashion_mnist", tmp_path)
    assert (np.bincount(source.train.labels) == 6000).all() and (
        np.bincount(source.test.labels) == 1000
    ).all()
    check_statistics(source)
