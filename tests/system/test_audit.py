"""Networks of every kind of run are restored for an audit as they were evaluated."""

import pytest
from helpers.small_runs import prepare_insects, run, streamed, tiny

from experiments.audit import inputs


def accuracy(examples):
    return 100 * (examples.values.argmax(axis=1) == examples.labels).mean()


@pytest.mark.parametrize("argument", ["reviewkd", "bikd"])
def test_networks_of_other_methods(argument, tmp_path):
    values = {"train.epochs": 1.0, "teacher.train.epochs": 1.0}
    if argument == "bikd":
        values["data.meta_per_class"] = 8
    results = run(tiny(tmp_path, argument, **values), tmp_path / "run")
    assert accuracy(inputs.read(tmp_path / "run").test) == pytest.approx(results["test"]["all"])


def test_network_of_a_stream(tmp_path):
    data_dir = prepare_insects(tmp_path)
    results = run(streamed(data_dir, tmp_path, "kd", **{"train.epochs": 1.0}), tmp_path / "run")
    model = inputs.read(tmp_path / "run", data_dir=str(data_dir))
    assert accuracy(model.test) == pytest.approx(results["test"]["all"])
    assert list(model.class_names) == ["ant", "bee", "cat", "dog"]
    with pytest.raises(ValueError, match="insects"):
        inputs.read(tmp_path / "run", data_dir=str(tmp_path))
