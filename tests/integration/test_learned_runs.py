"""Small complete runs with learned weights; the net is updated in every second step."""

import numpy as np
import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, run, tiny

from experiments.config.spec import resolve
from experiments.trainer.trainer import get_trainer

WEIGHTED = {"loss_weighting.update_every": 2, "train.epochs": 2.0, "devices": 1}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A finished run over KD's terms, whose outer loss needs the teacher."""
    folder = tmp_path_factory.mktemp("learned")
    return folder, run(tiny(folder, "bikd", **WEIGHTED), folder / "run")


def trainer_of(config):
    return get_trainer(resolve(config).student_training("network"))


def test_learned_weights_in_results(learned):
    folder, results = learned
    assert results["config"]["loss_weighting"]["update_every"] == 2
    assert results["outer_images"] == 80
    summary = results["loss_weighting"]
    groups = {"head", "medium", "tail"}
    assert set(summary["weights"]) == {"ce", "kd"}
    assert set(summary["features"]) == {"student_ce", "teacher_ce"}
    for means in [*summary["weights"].values(), *summary["features"].values()]:
        assert set(means) == groups
    for means in summary["weights"].values():
        assert all(0 < weight < 1 for weight in means.values())
    assert [len(axis) for axis in summary["axes"]] == [16, 16]
    assert np.shape(summary["map"]["kd"]) == (16, 16)
    records = small_runs.records(folder / "run")
    for record in records:
        assert np.isfinite(record["outer_loss"])
        assert set(record["weights"]["ce"]) == groups
    assert records[-1]["weights"] == summary["weights"]
    # The net has learned.
    assert records[0]["weights"] != records[-1]["weights"]


def test_resume_bit_for_bit(learned, tmp_path):
    """It is stopped after every step, so between two updates of the weight net, too."""
    folder, results = learned
    config = tiny(folder, "bikd", **WEIGHTED, checkpoint_every=100)
    resumed, num_stops = small_runs.run_with_stops(config, tmp_path / "run")
    assert num_stops == trainer_of(config).total_steps - 1
    assert resumed["test"] == results["test"]
    assert resumed["loss_weighting"] == results["loss_weighting"]
    assert_same_bits(config, tmp_path / "run", folder / "run")


def test_outer_set_smaller_than_a_batch(learned, tmp_path):
    """Each step takes all of it, in any order; a resumed run does the same."""
    folder, _ = learned
    values = WEIGHTED | {"data.outer_per_class": 1, "train.max_steps": 4}
    config = tiny(folder, "bikd", **values, checkpoint_every=100)
    for num_steps, inputs in trainer_of(config).inputs(0, 0):
        order = np.sort(inputs.outer.index, axis=1)
        np.testing.assert_array_equal(order, [np.arange(10)] * num_steps)
        assert inputs.train.index.shape == (num_steps, 16, 1)
    results = run(config, tmp_path / "run")
    assert results["outer_images"] == 10
    small_runs.run_with_stops(config, tmp_path / "resumed")
    assert_same_bits(config, tmp_path / "resumed", tmp_path / "run")


def spoil_outer_loss(state):
    outer_loss = state.sums.learned.outer_loss * np.float32("nan")
    learned = state.sums.learned._replace(outer_loss=outer_loss)
    return state._replace(sums=state.sums._replace(learned=learned))


def spoil_weight_net(state):
    return state._replace(meta=small_runs.with_infinity(state.meta))


@pytest.mark.parametrize(
    "change, message", [(spoil_outer_loss, "outer loss"), (spoil_weight_net, "meta")]
)
def test_nonfinite_state(learned, tmp_path, monkeypatch, change, message):
    folder, _ = learned
    config = tiny(folder, "bikd", **WEIGHTED)
    workdir = tmp_path / "run"
    small_runs.run_one_call(config, workdir)
    small_runs.spoil(monkeypatch, trainer_of(config), change)
    message = f"{message}.* not finite.* step 1$"
    small_runs.assert_diverges(workdir, message, lambda: run(config, workdir))
