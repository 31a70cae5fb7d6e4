"""Whole small runs with learned weights, whose net is updated every second step."""

import numpy as np
import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, run, tiny

from experiments.config.spec import resolve
from experiments.trainer.trainer import get_trainer

WEIGHTED = {"loss_weighting.update_every": 2, "train.epochs": 2.0, "devices": 1}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A finished run over KD's terms, whose outer loss needs the teacher: its folder and its results."""
    folder = tmp_path_factory.mktemp("learned")
    return folder, run(tiny(folder, "bikd", **WEIGHTED), folder / "run")


def test_learned_weights_in_results(learned):
    folder, results = learned
    assert (
        results["config"]["loss_weighting"]["update_every"] == 2
        and results["outer_images"] == 80
    )
    summary = results["loss_weighting"]
    groups = {"head", "medium", "tail"}
    assert set(summary["weights"]) == {"ce", "kd"} and set(summary["features"]) == {
        "student_ce",
        "teacher_ce",
    }
    assert all(
        set(means) == groups
        for part in ("weights", "features")
        for means in summary[part].values()
    )
    assert all(
        0 < weight < 1
        for means in summary["weights"].values()
        for weight in means.values()
    )
    assert (
        np.shape(summary["map"]["kd"])
        == (len(summary["axes"][0]), len(summary["axes"][1]))
        == (16, 16)
    )
    lines = small_runs.records(folder / "run")
    assert all(
        np.isfinite(line["outer_loss"]) and set(line["weights"]["ce"]) == groups
        for line in lines
    )
    assert lines[-1]["weights"] == summary["weights"]
    assert lines[0]["weights"] != lines[-1]["weights"]  # the net has learned


def test_resume_is_bit_for_bit(learned, tmp_path):
    """Stopped after every step, so between two updates of the weight net too."""
    folder, results = learned
    config = tiny(folder, "bikd", **WEIGHTED, checkpoint_every=100)
    resumed, stops = small_runs.run_with_stops(config, tmp_path / "run")
    assert stops == get_trainer(resolve(config).student_training("network")).total_steps - 1
    assert (
        resumed["test"] == results["test"]
        and resumed["loss_weighting"] == results["loss_weighting"]
    )
    assert_same_bits(config, tmp_path / "run", folder / "run")


def spoil_outer_loss(state):
    learned = state.sums.learned._replace(
        outer_loss=state.sums.learned.outer_loss * np.float32("nan")
    )
    return state._replace(sums=state.sums._replace(learned=learned))


def spoil_weight_net(state):
    return state._replace(meta=small_runs.with_infinity(state.meta))


@pytest.mark.parametrize(
    "change, message", [(spoil_outer_loss, "outer loss"), (spoil_weight_net, "meta")]
)
def test_state_that_is_not_finite(learned, tmp_path, monkeypatch, change, message):
    config = tiny(learned[0], "bikd", **WEIGHTED)
    workdir = tmp_path / "run"
    small_runs.run_one_call(config, workdir)
    small_runs.spoil(
        monkeypatch, get_trainer(resolve(config).student_training("network")), change
    )
    message = f"{message}.* not finite.* step 1$"
    small_runs.assert_diverges(workdir, message, lambda: run(config, workdir))
