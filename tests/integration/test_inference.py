"""A student by itself: loaded, applied, exported, and run without this library."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers.small_runs import run, tiny
from PIL import Image

from experiments import predict
from experiments.config.spec import resolve
from experiments.trainer import dataset as datasets
from experiments.trainer.trainer import get_trainer
from ltkd_jax import inference, models
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(folder):
    return run(tiny(folder), folder / "ltkd")


@pytest.fixture(scope="module")
def classifier(folder, results):
    return inference.load(folder / "ltkd")


@pytest.fixture(scope="module")
def test_images(folder):
    return datasets.load(resolve(tiny(folder)).data).test


def training_logits(config, workdir, images):
    """Returns the logits of the network in a run's last checkpoint."""
    trainer = get_trainer(resolve(config).student_training("none"))
    template = jax.eval_shape(trainer.init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(template)
    inputs = trainer.data.preprocess(images)
    return trainer.model.apply(state.variables, inputs, train=False)


def test_student_is_that_of_training(folder, results, classifier, test_images):
    expected = training_logits(tiny(folder), folder / "ltkd", test_images.images)
    logits, labels = classifier(test_images.images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    accuracy = 100 * np.mean(labels == test_images.labels)
    assert accuracy == pytest.approx(results["test"]["all"])
    assert classifier.class_names == tuple(results["class_names"])


@pytest.mark.parametrize("number", [0, 1, 5, 50])
def test_any_batch_size(classifier, test_images, number):
    expected, _ = classifier(test_images.images)
    logits, labels = classifier(test_images.images[:number])
    assert labels.shape == (number,)
    np.testing.assert_allclose(logits, expected[:number], rtol=1e-5, atol=1e-5)


def test_image_files(classifier, test_images, tmp_path, folder, capsys):
    pixels = test_images.images[0]
    small = Image.fromarray(pixels[..., 0])
    small.save(tmp_path / "small.png")
    # Colour, and four times as large: converted and resized.
    large = small.convert("RGB").resize((32, 32), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    logits, labels = classifier(paths)
    expected, _ = classifier(pixels[None])
    np.testing.assert_allclose(logits[:1], expected, rtol=1e-5, atol=1e-5)

    predict.main([str(folder / "ltkd"), *map(str, paths), "--top=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{paths[0]}: {classifier.class_names[labels[0]]} ")
    assert len(lines) == 2 and lines[1].count("%") == 2


@pytest.mark.parametrize("size", [8, 20])
def test_jpeg_of_the_images_mode(classifier, tmp_path, size):
    """Pillow decodes such a file only when its pixels are used."""
    path = tmp_path / "grey.jpg"
    Image.linear_gradient("L").resize((size, size)).save(path)
    resized = Image.open(path).resize((8, 8), Image.Resampling.BILINEAR)
    (pixels,) = classifier.read_images([path])
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(resized))


def test_truncated_image(classifier, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read .*cut.jpg.*truncated"):
        classifier([path])


def test_export_runs_without_the_library(
    folder, classifier, test_images, tmp_path, capsys
):
    path = tmp_path / "new" / "student.stablehlo"
    predict.main([str(folder / "ltkd"), f"--export={path}"])
    np.save(tmp_path / "images.npy", test_images.images)
    code = """
import sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open("new/student.stablehlo", "rb").read()))
images = np.load("images.npy")
np.save("all.npy", exported.call(images))
np.save("one.npy", exported.call(images[:1]))
assert not any(name.startswith(("ltkd_jax", "flax")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected, _ = classifier(test_images.images)
    options = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected, **options)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), expected[:1], **options)


def test_export_of_a_model_that_needs_the_batch_size(classifier, monkeypatch):
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(10)(images.reshape(len(images), -1))

    monkeypatch.setitem(models.REGISTRY, "flat", lambda num_classes, **_: Flat())
    flat = dataclasses.replace(classifier, model="flat")
    with pytest.raises(inference.ModelError, match=r"flat .*images.shape\[0\]"):
        flat.export()


def test_teacher(folder, results, test_images):
    (teacher,) = (folder / "teachers").glob("*/model.json")
    _, labels = inference.load(teacher)(test_images.images)
    accuracy = 100 * np.mean(labels == test_images.labels)
    assert accuracy == pytest.approx(results["teacher"]["test"]["all"])


def test_student_with_fusion(folder, test_images):
    config = tiny(folder, "reviewkd")
    run(config, folder / "reviewkd")
    expected = training_logits(config, folder / "reviewkd", test_images.images)
    logits, _ = inference.load(folder / "reviewkd")(test_images.images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda about: about.update(format=2), "format 2.*reads format 1"),
        (lambda about: about.update(sha256="0" * 64), "msgpack.*checksum"),
        (lambda about: about.update(model="resnet14"), "not of resnet14"),
        (lambda about: about.update(model="resnet9"), "resnet9"),
        (lambda about: about.pop("mean"), "damaged.*mean"),
        (lambda about: about.pop("format"), "damaged.*format"),
        (lambda about: about.update(class_names=["a"]), "1 classes"),
    ],
)
def test_files_that_cannot_be_loaded(classifier, tmp_path, change, message):
    classifier.save(tmp_path)
    path = tmp_path / inference.FILE_NAME
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    with pytest.raises(inference.ModelError, match=message):
        inference.load(tmp_path)


def test_damaged_and_missing_files(classifier, tmp_path, capsys):
    with pytest.raises(inference.ModelError, match="no .*model.json"):
        inference.load(tmp_path)
    classifier.save(tmp_path)
    path = tmp_path / inference.FILE_NAME
    path.write_text(path.read_text()[:40])
    with pytest.raises(inference.ModelError, match="model.json is damaged"):
        inference.load(tmp_path)
    with pytest.raises(SystemExit, match="error: .*model.json is damaged"):
        predict.main([str(tmp_path), "a.png"])


def test_bad_images(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"float32 of shape \[2, 8, 8, 1\].*uint8"):
        classifier(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"\[N, 8, 8, 1\]"):
        classifier(np.zeros((2, 9, 8, 1), np.uint8))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot read .*a.png"):
        classifier([tmp_path / "a.png"])
    with pytest.raises(ValueError, match=r"give a list of paths, such as \['a.png'\]"):
        classifier("a.png")
    with pytest.raises(ValueError, match="cannot read .*Image.* as an image"):
        classifier([Image.new("L", (8, 8))])
