"""Audits of trained networks of every kind of run agree with their evaluations."""

import shutil

import numpy as np
import pytest
from helpers.small_runs import prepare_insects, run, streamed, tiny

from experiments.audit import inputs
from experiments.audit import run as audit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a run's results, its work directory and its teacher's folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(folder, **{"train.epochs": 2.0, "teacher.train.epochs": 1.0})
    results = run(config, folder / "run")
    # The folder holds the teacher's lock file, too.
    (teacher,) = (path for path in (folder / "teachers").iterdir() if path.is_dir())
    return results, folder / "run", teacher


def assert_audited_as_evaluated(model, results):
    """Checks a model's metrics in an audit against the results of its evaluation."""
    metrics = model["groups"]["all"]
    test = results["test"]
    assert metrics["accuracy"] == pytest.approx(test["all"])
    assert metrics["ece"] == pytest.approx(test["ece"], rel=1e-3)
    assert model["classes"]["recall"] == pytest.approx(test["per_class"])
    np.testing.assert_allclose(model["between"], test["confusion"], rtol=1e-6)


def first_model_without_name(input_set):
    return {**input_set["models"][0], "name": ""}


def test_audit_of_run_and_teacher(trained, tmp_path):
    results, workdir, teacher = trained
    logits = str(tmp_path / "teacher.npz")
    record = audit.run(
        teacher, compare=str(workdir), save=logits, output=tmp_path / "a.html"
    )
    assert record["name"] == "teacher resnet8 → ltkd resnet8"
    assert record["class_counts"] == results["class_counts"]
    balanced, training = record["inputs"]
    assert training["share"] == pytest.approx(record["training"])
    assert_audited_as_evaluated(balanced["models"][0], results["teacher"])
    assert_audited_as_evaluated(balanced["models"][1], results)
    mass = results["teacher"]["group_mass"]["balanced"]
    assert balanced["models"][0]["mass"]["1"] == pytest.approx(mass, rel=1e-4)
    # The saved logits have the same audit, without the network.
    from_logits = audit.run(logits, output=tmp_path / "b.html")
    for key in ("class_counts", "class_names", "groups", "training"):
        assert from_logits[key] == record[key]
    for expected, actual in zip(record["inputs"], from_logits["inputs"]):
        assert first_model_without_name(actual) == first_model_without_name(expected)


def damage_config(workdir):
    (workdir / "config.json").write_text("{")


def remove_results(workdir):
    (workdir / "results.json").unlink()


def remove_weights(workdir):
    (workdir / "model.msgpack").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (damage_config, "config.json is damaged"),
        (remove_results, "has no results.json"),
        (remove_weights, "model.msgpack is missing or damaged"),
    ],
)
def test_unfinished_or_damaged_run(trained, tmp_path, spoil, message):
    _, workdir, _ = trained
    shutil.copytree(workdir, tmp_path / "folder")
    spoil(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        inputs.read(tmp_path / "folder")


def accuracy(examples):
    return 100 * (examples.values.argmax(axis=1) == examples.labels).mean()


@pytest.mark.parametrize("argument", ["reviewkd", "bikd"])
def test_networks_of_other_methods(argument, tmp_path):
    values = {"train.epochs": 1.0, "teacher.train.epochs": 1.0}
    if argument == "bikd":
        values["data.outer_per_class"] = 8
    results = run(tiny(tmp_path, argument, **values), tmp_path / "run")
    model = inputs.read(tmp_path / "run")
    assert accuracy(model.test) == pytest.approx(results["test"]["all"])


def test_network_of_a_stream(tmp_path):
    data_dir = prepare_insects(tmp_path)
    config = streamed(data_dir, tmp_path, "kd", **{"train.epochs": 1.0})
    results = run(config, tmp_path / "run")
    model = inputs.read(tmp_path / "run", data_dir=str(data_dir))
    assert accuracy(model.test) == pytest.approx(results["test"]["all"])
    assert list(model.class_names) == ["ant", "bee", "cat", "dog"]
    # An audit of a network evaluates it on its data set, which is not in this folder.
    with pytest.raises(ValueError, match="cannot be audited: .*insects"):
        inputs.read(tmp_path / "run", data_dir=str(tmp_path))
