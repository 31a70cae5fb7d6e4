"""Trains every config with `smoke`: on the real CIFAR-100, else on fabricated data."""

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
    recipe = recipes.Recipe(name, (), lambda _: content)
    recipes.prepare(recipe, folder / "tfds", "any")


def prepare_cifar10(folder):
    prepare_noise(folder, "cifar10", (32, 32, 3))


def prepare_fashion_mnist(folder):
    prepare_noise(folder, "fashion_mnist", (28, 28, 1))


def prepare_tiny_imagenet(folder):
    # The classes are not sorted in the official file either.
    classes = [f"n{i:08d}" for i in np.random.default_rng(0).permutation(200)]
    files = pictures.tiny_imagenet(20, 400, classes=classes)
    source = pictures.write_zip(folder / "tiny-imagenet-200.zip", files)
    recipes.prepare(pictures.tiny_recipe(20, 400, 200), folder / "tfds", source)


def prepare_imagenet(folder):
    """Prepares all thousand classes, and writes a list with a long-tailed subset.

    The images differ in size, and some are grey or CMYK, as in the real data set.
    """
    recipe = recipes.official_recipe("imagenet2012")
    modes = ["RGB", "RGB", "RGB", "L", "CMYK"]
    # Few pictures, each of which is many images: encoding takes most of the time.
    images = [
        pictures.picture(i, i, size=(60 + 7 * i, 50 + 3 * i), mode=modes[i % 5])
        for i in range(20)
    ]
    files = {}
    subset = []
    for label, name in enumerate(recipe.read.keywords["class_names"]):
        subset_size = 1 + 1000 // (label + 200)
        for i in range(12):
            path = f"train/{name}/{name}_{i}.JPEG"
            files[path] = images[(label + i) % 20]
            if i < subset_size:
                subset.append(f"{path} {label}")
        files[f"val/{name}/ILSVRC2012_val_{label + 1:08d}.JPEG"] = images[label % 20]
    (folder / "list.txt").write_text("\n".join(subset))
    source = pictures.write_folder(folder / "ILSVRC2012", files)
    recipes.prepare(recipe, folder / "tfds", source)


def prepare_points(folder):
    """Writes three hundred rows of features of each of ten classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 10
    x = rng.normal(size=(3000, 16)) + 2 * np.eye(10, 16)[labels]
    (folder / "tfds").mkdir()
    np.savez(
        folder / "tfds" / "points.npz",
        x=x[:2500],
        y=labels[:2500],
        x_test=x[2500:],
        y_test=labels[2500:],
    )


def prepare_birds(folder):
    class_sizes = enumerate(longtail.counts(80, 5, 12))
    counts = {f"bird{i:02d}": count for i, count in class_sizes}
    files = pictures.by_class(counts, size=(90, 70))
    source = pictures.write_folder(folder / "birds", files)
    recipe = recipes.custom_recipe("birds", test_per_class=5)
    recipes.prepare(recipe, folder / "tfds", source)


# By config. The others need no preparation: scikit-learn has the digits, and the real
# CIFAR-100 is prepared already.
PREPARE = {
    "cifar10lt": prepare_cifar10,
    "fashionmnistlt": prepare_fashion_mnist,
    "tinyimagenetlt": prepare_tiny_imagenet,
    "imagenetlt": prepare_imagenet,
    "folderlt": prepare_birds,
    "featureslt": prepare_points,
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Returns a function: config name → folder with its prepared data."""
    folders = {}

    def prepared(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            if name in PREPARE:
                PREPARE[name](folders[name])
        return folders[name]

    return prepared


def test_no_config_is_left_out():
    configs = {path.stem for path in (ROOT / "configs").glob("*lt.py")}
    assert {name for name, *_ in CASES} == configs


# Config, argument, values and the number of training images, None where it is not
# checked. The values allow for the small number of fabricated images.
CASES = [
    ("digitslt", "bikd", {}, longtail.counts(100, 10, 10).sum()),
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
    ("featureslt", "ltkd_bs,name=points", {}, 2500),
    # Five images of each of the 12 classes are test images.
    ("folderlt", "ltkd,name=birds", {}, longtail.counts(80, 5, 12).sum() - 60),
    (
        "folderlt",
        "bikd,name=birds,subset=exponential,imbalance=2",
        {"data.outer_per_class": 6},
        None,
    ),
]


@pytest.mark.parametrize("name, argument, values, num_images", CASES)
def test_smoke(name, argument, values, num_images, data_folder, request, tmp_path):
    folder = data_folder(name)
    data_dir = folder / "tfds"
    if name == "cifar100lt":
        # Only this case is skipped where the real data set is absent.
        data_dir = request.getfixturevalue("cifar100_dir")
    config = f"configs/{name}.py:{argument.format(folder=folder)},smoke"
    values = {"data.dir": data_dir, "teacher.dir": folder / "teachers", **values}
    command = [sys.executable, "-m", "experiments.main", f"--config={config}"]
    command.append(f"--workdir={tmp_path / 'run'}")
    command += [f"--config.{key}={value}" for key, value in values.items()]
    environments.run(*command)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train_images"] == sum(results["class_counts"])
    if num_images is not None:
        assert results["train_images"] == num_images
    assert min(results["class_counts"]) > 0
    assert np.isfinite(results["test"]["all"])
    assert ("loss_weighting" in results) == argument.startswith("bikd")
    teacher = "mlp_1_128" if name == "featureslt" else "resnet14"
    assert results["teacher"]["model"] == teacher
    teacher_logits = "features" if "reviewkd" in argument else "network"
    assert results["teacher_logits"] == teacher_logits
