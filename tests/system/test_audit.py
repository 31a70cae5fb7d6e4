"""Trained networks of every kind of run are audited as they were evaluated."""

import shutil

import numpy as np
import pytest
from helpers.small_runs import prepare_insects, run, streamed, tiny

from experiments.audit import inputs
from experiments.audit import run as audit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's results, its work directory, and its teacher's folder."""
    folder = tmp_path_factory.mktemp("trained")
    results = run(
        tiny(folder, **{"train.epochs": 2.0, "teacher.train.epochs": 1.0}),
        folder / "run",
    )
    (teacher,) = (path for path in (folder / "teachers").iterdir() if path.is_dir())
    return results, folder / "run", teacher


def test_run_and_teacher_as_they_were_evaluated(trained, tmp_path):
    results, workdir, teacher = trained
    saved = tmp_path / "teacher.npz"
    record = audit.run(
        teacher, compare=str(workdir), save=str(saved), output=tmp_path / "a.html"
    )
    assert (
        record["name"] == "teacher resnet8 → ltkd resnet8"
        and record["class_counts"] == results["class_counts"]
    )
    balanced, training = record["inputs"]
    assert training["share"] == pytest.approx(record["training"])
    for model, evaluated in zip(balanced["models"], (results["teacher"], results)):
        assert model["groups"]["all"]["accuracy"] == pytest.approx(
            evaluated["test"]["all"]
        )
        assert model["groups"]["all"]["ece"] == pytest.approx(
            evaluated["test"]["ece"], rel=1e-3
        )
        assert model["classes"]["recall"] == pytest.approx(
            evaluated["test"]["per_class"]
        )
        np.testing.assert_allclose(
            model["between"], evaluated["test"]["confusion"], rtol=1e-6
        )
    mass = results["teacher"]["group_mass"]["balanced"]
    assert balanced["models"][0]["mass"]["1"] == pytest.approx(mass, rel=1e-4)
    # The saved logits have the same audit, without the network.
    again = audit.run(str(saved), output=tmp_path / "b.html")
    for key in ("class_counts", "class_names", "groups", "training"):
        assert again[key] == record[key]
    for input_set, saved_set in zip(record["inputs"], again["inputs"]):
        assert {**input_set["models"][0], "name": ""} == {
            **saved_set["models"][0],
            "name": "",
        }


def remove_steps(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json is damaged",
        ),
        (lambda folder: (folder / "results.json").unlink(), "has no results.json"),
        (remove_steps, "training ends at step"),
    ],
)
def test_folder_that_is_no_finished_network(trained, tmp_path, spoil, message):
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
    assert accuracy(inputs.read(tmp_path / "run").test) == pytest.approx(
        results["test"]["all"]
    )


def test_network_of_a_stream(tmp_path):
    data_dir = prepare_insects(tmp_path)
    results = run(
        streamed(data_dir, tmp_path, "kd", **{"train.epochs": 1.0}), tmp_path / "run"
    )
    model = inputs.read(tmp_path / "run", data_dir=str(data_dir))
    assert accuracy(model.test) == pytest.approx(results["test"]["all"])
    assert list(model.class_names) == ["ant", "bee", "cat", "dog"]
    with pytest.raises(ValueError, match="cannot be restored: .*insects"):
        inputs.read(tmp_path / "run", data_dir=str(tmp_path))
