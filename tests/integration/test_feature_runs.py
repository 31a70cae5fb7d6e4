"""Runs on features: the teacher, static and learned weights, and the student alone."""

import json

import jax
import numpy as np
import pytest
from helpers.small_runs import TINY, changed, config_of, run

from experiments import predict
from experiments.audit import inputs
from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer.trainer import get_trainer
from ltkd_jax import inference
from ltkd_jax.training.checkpoint import Checkpoints


def write_points(folder, shift=0.0):
    """Writes four classes of points in six dimensions, of very different scales."""
    rng = np.random.default_rng(0)
    scales = 10.0 ** np.arange(-3, 3)
    labels = np.arange(240) % 4
    x = (rng.normal(size=(240, 6)) + 3 * np.eye(4, 6)[labels]) * scales + shift
    np.savez(
        folder / "points.npz",
        x=x[:160],
        y=labels[:160],
        x_test=x[160:],
        y_test=labels[160:],
        class_names=["n", "e", "s", "w"],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_points(folder)
    return folder


def config_in(folder, argument, **values):
    """Returns the config of a short run; runs of a folder share their teacher."""
    config = config_of("featureslt", f"{argument},name=points,subset=exponential")
    values = {
        **TINY,
        "data.dir": str(folder),
        "teacher.dir": str(folder / "teachers"),
        "teacher.model": "mlp_1_128",
        "student.model": "mlp_1_32",
        "data.n_max": 24,
        "train.epochs": 6.0,
        "teacher.train.epochs": 6.0,
        **values,
    }
    return changed(config, **values)


@pytest.fixture(scope="module")
def ltkd(folder):
    """Returns a finished run, and its results."""
    return folder / "ltkd", run(config_in(folder, "ltkd"), folder / "ltkd")


def final_logits(config, workdir, rows):
    """Returns the logits of a run's last checkpoint, as an evaluation has them."""
    trainer = get_trainer(resolve(config).student_training("none"))
    template = jax.eval_shape(trainer.init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(template)
    inputs = trainer.data.preprocess(rows)
    return trainer.model.apply(state.variables, inputs, train=False)


def test_static_weights(folder, ltkd):
    _, results = ltkd
    assert results["class_counts"] == [24, 15, 9, 6]
    assert results["teacher_logits"] == "table"
    assert results["test"]["all"] > 60 and results["teacher"]["test"]["all"] > 60
    # The columns count alike, whatever their scale: the test set's means after the
    # normalisation are close to 0.
    data = datasets.load(resolve(config_in(folder, "ltkd")).data)
    normalized = np.asarray(data.preprocess(data.test.images))
    assert np.abs(normalized.mean(axis=0)).max() < 0.5
    np.testing.assert_allclose(normalized.std(axis=0), 1, atol=0.5)


@pytest.mark.parametrize(
    "argument, values",
    [("bikd", {"data.outer_per_class": 4}), ("ce,mixup=0.4", {"steps_per_call": 2})],
)
def test_other_runs(folder, argument, values):
    workdir = folder / argument.partition(",")[0]
    config = config_in(folder, argument, **values)
    results = run(config, workdir)
    assert results["test"]["all"] > 60
    rows = datasets.load(resolve(config).data).test.images
    logits, _ = inference.load(workdir)(rows)
    np.testing.assert_allclose(logits, final_logits(config, workdir, rows), atol=1e-4)


def test_pmap_is_jit(folder, ltkd):
    config = config_in(folder, "ltkd", parallel="pmap")
    results = run(config, folder / "pmap")
    assert results["config_hash"] == ltkd[1]["config_hash"]
    rows = datasets.load(resolve(config).data).test.images
    logits, _ = inference.load(folder / "pmap")(rows)
    expected, _ = inference.load(ltkd[0])(rows)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_student_alone(folder, ltkd):
    """It takes raw rows, in any number and type, as the run's own evaluation does."""
    workdir, results = ltkd
    data = datasets.load(
        resolve(config_in(folder, "ltkd", **{"data.test_images": 0})).data
    )
    rows = data.test.images
    classifier = inference.load(workdir)
    expected = final_logits(config_in(folder, "ltkd"), workdir, rows)
    logits, labels = classifier(rows)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert classifier.class_names == ("n", "e", "s", "w")
    assert (labels == data.test.labels).mean() > 0.6
    np.testing.assert_allclose(classifier(rows[:1]).logits, logits[:1], atol=1e-5)
    np.testing.assert_array_equal(classifier(rows.astype(np.float64)).logits, logits)
    np.testing.assert_array_equal(classifier(rows.tolist()).logits, logits)
    assert classifier(rows[:0]).labels.shape == (0,)

    exported = jax.export.deserialize(bytearray(classifier.export()))
    np.testing.assert_allclose(exported.call(rows), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(exported.call(rows[:1]), logits[:1], atol=1e-5)

    for wrong, message in (
        (rows[0], r"float32\[6\]; give numbers \[N, 6\]"),
        (rows[:, :5], r"\[80, 5\]; give the 6 columns"),
        (np.where(np.arange(6) == 3, np.nan, rows), r"features\[0, 3\]=nan"),
        (["a.png"], r"<U5\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier(wrong)


def test_predict(folder, ltkd, tmp_path, capsys):
    workdir, _ = ltkd
    rows = np.load(folder / "points.npz")["x_test"][:3]
    np.savez(tmp_path / "new.npz", x=rows, keys=["a", "b", "c"])
    predict.main([str(workdir), str(tmp_path / "new.npz"), "--top=2"])
    lines = capsys.readouterr().out.splitlines()
    classifier = inference.load(workdir)
    names = [classifier.class_names[label] for label in classifier(rows).labels]
    assert [line.split(": ")[0].split()[1] for line in lines] == ["a", "b", "c"]
    assert [line.split(": ")[1].split()[0] for line in lines] == names
    assert all(line.count("%") == 2 for line in lines)
    with pytest.raises(SystemExit, match="error: .*new.png cannot be read as an .npz"):
        predict.main([str(workdir), str(tmp_path / "new.png")])


def test_teacher_of_logits(folder, tmp_path):
    """A teacher without a network, whose rows are found by key in any order."""
    points = np.load(folder / "points.npz")
    logits = 5 * np.eye(4, dtype=np.float32)[points["y"]]
    keys = [f"row_{row:08d}" for row in range(len(logits))]
    order = np.random.default_rng(0).permutation(len(logits))
    np.savez(
        tmp_path / "teacher.npz",
        train_logits=logits[order],
        train_labels=points["y"][order],
        train_keys=np.array(keys)[order],
    )
    values = {"teacher.checkpoint": str(tmp_path / "teacher.npz")}
    results = run(config_in(folder, "kd", **values), tmp_path / "run")
    assert results["teacher_logits"] == "table"
    assert results["test"]["all"] > 60


def test_audit(folder, ltkd):
    workdir, results = ltkd
    model = inputs.read(workdir, data_dir=str(folder))
    accuracy = 100 * np.mean(model.test.values.argmax(axis=1) == model.test.labels)
    assert accuracy == pytest.approx(results["test"]["all"])


def test_identity_is_the_content(folder, tmp_path):
    same = resolve(config_in(folder, "ltkd"))
    write_points(tmp_path)
    moved = config_in(tmp_path, "ltkd")
    assert resolve(moved).hash == same.hash
    write_points(tmp_path, shift=1.0)
    assert resolve(moved).hash != same.hash
    assert resolve(moved).teacher_hash != same.teacher_hash
    assert str(tmp_path) not in json.dumps(resolve(moved).config["data"])


@pytest.mark.parametrize(
    "argument, values, message",
    [
        ("ce,cutout=2", {}, "augment.cutout=2: features have no pixels"),
        ("ce,policy=autoaugment", {}, "augment.policy='autoaugment'.*no pixels"),
        ("ce", {"student.model": "resnet8"}, r"CifarResNet takes .*\[1, 6\].*mlp"),
        ("ce,image_size=8", {}, "points.npz .*data.image_size=8 to 0"),
        ("ce", {"data.stream": True, "data.image_size": 8}, "data.stream to False"),
        ("ce", {"data.n_max": 50}, "n_max=50: class 0 needs 50"),
        ("bikd", {"data.outer_per_class": 1}, "data.outer_per_class"),
    ],
)
def test_mismatched_parts(folder, argument, values, message):
    spec = resolve(config_in(folder, argument, **values))
    with pytest.raises(ConfigError, match=message):
        get_trainer(spec.student_training("none"))


def test_memory(folder, monkeypatch):
    monkeypatch.setattr(datasets, "device_memory", lambda: 2 * 4 * 6 * 100)
    datasets.load.cache_clear()
    with pytest.raises(ConfigError, match="of features, keep fewer rows"):
        datasets.load(resolve(config_in(folder, "ltkd", **{"data.n_max": 25})).data)
