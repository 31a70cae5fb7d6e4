"""Every config trained by `smoke`: on the real CIFAR-100, and on fabricated data in the form of the other data sets."""

import json
import sys

import numpy as np
import pytest
from helpers import environments, pictures
from helpers.content import random_content
from helpers.small_runs import ROOT

from ltkd_jax.data import longtail
from ltkd_jax.data.prepare import recipes


def prepare_noise(folder, name, shape):
    content = random_content(shape, 10, train=3000, test=200)
    recipes.prepare(recipes.Recipe(name, (), lambda _: content), folder / "tfds", "any")


def prepare_tiny_imagenet(folder):
    classes = [f"n{i:08d}" for i in np.random.default_rng(0).permutation(200)]
    files = pictures.tiny_imagenet(20, 400, classes=classes)
    source = pictures.write_zip(folder / "tiny-imagenet-200.zip", files)
    recipes.prepare(pictures.tiny_recipe(20, 400, 200), folder / "tfds", source)


def prepare_imagenet(folder):
    """Prepares all thousand classes, of images of differing sizes, grey and CMYK ones among them; and a list."""
    recipe = recipes.official_recipe("imagenet2012")
    modes = ["RGB", "RGB", "RGB", "L", "CMYK"]
    images = [
        pictures.picture(i, i, size=(60 + 7 * i, 50 + 3 * i), mode=modes[i % 5])
        for i in range(20)
    ]
    files, lines = {}, []
    for label, name in enumerate(recipe.read.keywords["class_names"]):
        for i in range(12):
            files[f"train/{name}/{name}_{i}.JPEG"] = images[(label + i) % 20]
            if i < 1 + 1000 // (label + 200):
                lines.append(f"train/{name}/{name}_{i}.JPEG {label}")
        files[f"val/{name}/ILSVRC2012_val_{label + 1:08d}.JPEG"] = images[label % 20]
    (folder / "list.txt").write_text("\n".join(lines))
    recipes.prepare(
        recipe, folder / "tfds", pictures.write_folder(folder / "ILSVRC2012", files)
    )


def prepare_birds(folder):
    counts = {
        f"bird{i:02d}": count for i, count in enumerate(longtail.counts(80, 5, 12))
    }
    source = pictures.write_folder(
        folder / "birds", pictures.by_class(counts, size=(90, 70))
    )
    recipes.prepare(
        recipes.custom_recipe("birds", test_per_class=5), folder / "tfds", source
    )


PREPARE = {
    "cifar10lt": lambda folder: prepare_noise(folder, "cifar10", (32, 32, 3)),
    "fashionmnistlt": lambda folder: prepare_noise(
        folder, "fashion_mnist", (28, 28, 1)
    ),
    "tinyimagenetlt": prepare_tiny_imagenet,
    "imagenetlt": prepare_imagenet,
    "folderlt": prepare_birds,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns a function from a config's name to a folder with its prepared data."""
    folders = {}

    def prepared(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            if name in PREPARE:
                PREPARE[name](folders[name])
        return folders[name]

    return prepared


def test_no_config_is_left_out():
    assert {name for name, *_ in CASES} == {
        path.stem for path in (ROOT / "configs").glob("*lt.py")
    }


# Values make up for how few images are fabricated; the last column is the number of training images.
CASES = [
    ("digitslt", "bikd", {}, longtail.counts(100, 50, 10).sum()),
    ("cifar100lt", "ltkd", {}, 10_847),
    ("cifar100lt", "bikd,terms=ltkd", {}, 10_626),
    ("cifar10lt", "ltkd", {"data.n_max": 150}, longtail.counts(150, 50, 10).sum()),
    (
        "fashionmnistlt",
        "ltkd",
        {"data.n_max": 200},
        longtail.counts(200, 100, 10).sum(),
    ),
    ("tinyimagenetlt", "reviewkd,imbalance=10", {}, longtail.counts(20, 10, 200).sum()),
    ("imagenetlt", "bikd,subset={folder}/list.txt", {"data.outer_per_class": 2}, 2288),
    ("folderlt", "ltkd,name=birds", {}, longtail.counts(80, 5, 12).sum() - 60),
    (
        "folderlt",
        "bikd,name=birds,subset=exponential,imbalance=2",
        {"data.outer_per_class": 6},
        None,
    ),
]


@pytest.mark.parametrize("name, argument, values, images", CASES)
def test_smoke(name, argument, values, images, folder_of, request, tmp_path):
    folder = folder_of(name)
    data_dir = (
        request.getfixturevalue("cifar100_dir")
        if name == "cifar100lt"
        else folder / "tfds"
    )
    config = f"--config=configs/{name}.py:{argument.format(folder=folder)},smoke"
    values = {"data.dir": data_dir, "teacher.dir": folder / "teachers", **values}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    environments.run(
        sys.executable,
        "-m",
        "experiments.main",
        config,
        f"--workdir={tmp_path / 'run'}",
        *flags,
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        results["train_images"]
        == sum(results["class_counts"])
        == (images or results["train_images"])
    )
    assert min(results["class_counts"]) > 0 and np.isfinite(results["test"]["all"])
    assert ("loss_weighting" in results) == argument.startswith("bikd")
    assert results["teacher"]["model"] == "resnet14"
    assert results["teacher_logits"] == (
        "features" if "reviewkd" in argument else "network"
    )
