"""Every config, trained by `smoke` through the commands of its docstring: on the real data where it is at hand, on a
fabricated archive in the true layout where it is not. Slow."""

import functools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import pictures
from helpers.content import random_content
from helpers.small_runs import ROOT

from experiments.reporting import load
from ltkd_jax.data import longtail
from ltkd_jax.data.prepare import recipes

pytestmark = pytest.mark.slow
DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


def prepared(data_dir, *words):
    done = subprocess.run(
        [sys.executable, "-m", "ltkd_jax.data.prepare", *words, f"--data_dir={data_dir}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def fashion_mnist(place):
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    prepared(place / "tfds", "fashion_mnist", f"--source={DEBIAN_FASHION_MNIST}")


def cifar10(place):
    """Noise of CIFAR-10's size, as its official builder keeps it."""
    content = random_content((32, 32, 3), 10, train=50_000, test=10_000)
    recipes.prepare(recipes.Recipe("cifar10", (), lambda _: content), place / "tfds", "any")


def tiny_imagenet(place):
    """All 110,000 images, of which those of a class are equal."""
    classes = [f"n{i:08d}" for i in np.random.default_rng(0).permutation(200)]
    files, root, lines = {"tiny-imagenet-200/wnids.txt": "\n".join(classes).encode()}, "tiny-imagenet-200", []
    image = [pictures.picture(label % 20, label) for label in range(200)]
    for label, name in enumerate(sorted(classes)):
        for i in range(500):
            files[f"{root}/train/{name}/images/{name}_{i}.JPEG"] = image[label]
        for i in range(50):
            files[f"{root}/val/images/val_{50 * label + i}.JPEG"] = image[label]
            lines.append(f"val_{50 * label + i}.JPEG\t{name}\t0\t0\t63\t63")
    files[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    prepared(place / "tfds", "tiny_imagenet", f"--source={pictures.write_zip(place / 'tiny-imagenet-200.zip', files)}")


def imagenet(place):
    """All thousand classes, of images of differing sizes, grey and CMYK ones among them; and a list."""
    classes = recipes.recipe("imagenet2012").read.keywords["class_names"]
    modes = ["RGB"] * 8 + ["L", "CMYK"]
    files, lines = {}, []
    for label, name in enumerate(classes):
        for i in range(12):
            size = (60 + 7 * (label % 5), 50 + 3 * i)
            data = pictures.picture(label % 20, label, size=size, mode=modes[(label + i) % 10])
            files[f"train/{name}/{name}_{i}.JPEG"] = data
            if i < 1 + 1000 // (label + 200):
                lines.append(f"train/{name}/{name}_{i}.JPEG {label}")
        files[f"val/{name}/ILSVRC2012_val_{label + 1:08d}.JPEG"] = data
    (place / "ImageNet_LT_train.txt").write_text("\n".join(lines))
    prepared(place / "tfds", "imagenet2012", f"--source={pictures.write_folder(place / 'ILSVRC2012', files)}")


def birds(place):
    counts = {f"bird{i:02d}": n for i, n in enumerate(longtail.counts(80, 5, 12))}
    files = pictures.by_class(counts, size=(90, 70))
    source = pictures.write_folder(place / "birds", files)
    prepared(place / "tfds", "folder", "--name=birds", f"--source={source}", "--test_per_class=5")


@functools.cache
def made(name, place):
    {"fashionmnistlt": fashion_mnist, "cifar10lt": cifar10, "tinyimagenetlt": tiny_imagenet, "imagenetlt": imagenet,
     "folderlt": birds}.get(name, lambda place: None)(place)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("every")


# Of ImageNet's fabricated classes there are 12 images, too few for the config's 10 a class beside the tail's.
FEW = ["--config.data.meta_per_class=2"]
CASES = {
    "digitslt": {"ltkd": [], "bikd": []},
    "fashionmnistlt": {"ltkd": [], "bikd": []},
    "cifar10lt": {"ltkd": [], "bikd": []},
    "tinyimagenetlt": {"ltkd": [], "bikd": [], "reviewkd": []},
    "imagenetlt": {"ltkd": [], "bikd": FEW, "ltkd,subset={place}/ImageNet_LT_train.txt": []},
    "folderlt": {"ltkd,name=birds": [], "bikd,name=birds": [], "ltkd,name=birds,subset=exponential,imbalance=8": []},
}
IMAGES = {
    ("cifar10lt", "ltkd"): longtail.counts(4900, 50, 10).sum(),
    ("cifar10lt", "bikd"): longtail.counts(4900, 50, 10).sum(),
    ("fashionmnistlt", "ltkd"): longtail.counts(6000, 100, 10).sum(),
    ("tinyimagenetlt", "ltkd"): 21_549,
    ("tinyimagenetlt", "bikd"): longtail.counts(490, 100, 200).sum(),
    ("imagenetlt", "ltkd"): longtail.counts(12, 10, 1000).sum(),
    ("imagenetlt", "bikd"): longtail.counts(10, 10, 1000).sum(),
    ("folderlt", "ltkd,name=birds"): longtail.counts(80, 5, 12).sum() - 60,
}


@pytest.mark.parametrize("name, argument", [(name, argument) for name, cases in CASES.items() for argument in cases])
def test_smoke(name, argument, place):
    made(name, place)
    workdir = place / f"{name}-{len(list(place.glob('*-run')))}-run"
    words = [f"--config=configs/{name}.py:{argument.format(place=place)},smoke", *CASES[name][argument]]
    words += [f"--config.data.dir={place / 'tfds'}", f"--workdir={workdir}", f"--config.teacher.cache={place / name}"]
    done = subprocess.run([sys.executable, "-m", "experiments.main", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = load.load(workdir)
    assert results["train_images"] == IMAGES.get((name, argument), results["train_images"])
    assert results["train_images"] == sum(results["class_counts"]) and min(results["class_counts"]) > 0
    assert ("weighting" in results) == argument.startswith("bikd")
    assert results["teacher_logits"] == ("features" if argument == "reviewkd" else "network")
    assert (workdir / "report.html").exists()
