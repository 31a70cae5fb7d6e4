"""Whole small runs with learned weights."""

import json
import time

import numpy as np
import pytest
from helpers.small_runs import parameters, run, tiny

from experiments.trainer import build, loop
from experiments.trainer import run as runs
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A finished run with learned weights over KD's terms, its outer loss with the teacher, its config and folder."""
    folder = tmp_path_factory.mktemp("learned")
    config = tiny(folder, "bikd", devices=1)
    return config, folder, run(config, folder / "run")


def test_learned_weights_are_told(learned):
    config, folder, results = learned
    assert results["config"]["weighting"]["every"] == 1 and results["meta_images"] == 80
    told = results["weighting"]
    groups = {"head", "medium", "tail"}
    assert set(told["weights"]) == {"ce", "kd"} and set(told["features"]) == {"student_ce", "teacher_ce"}
    assert all(set(means) == groups for part in ("weights", "features") for means in told[part].values())
    assert all(0 < weight < 1 for means in told["weights"].values() for weight in means.values())
    assert np.shape(told["map"]["kd"]) == (len(told["axes"][0]), len(told["axes"][1])) == (16, 16)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["outer_loss"]) and set(line["weights"]["ce"]) == groups for line in lines)
    assert lines[-1]["weights"] == told["weights"]
    assert lines[0]["weights"] != lines[-1]["weights"]  # the net has learned


def test_a_run_with_learned_weights_resumes_bit_for_bit(learned, tmp_path):
    _, folder, results = learned
    resumes_bit_for_bit(
        tiny(folder, "bikd", devices=1, checkpoint_every=100), folder / "run", results, tmp_path / "run"
    )


def test_an_outer_loss_that_is_not_finite_stops_the_run(learned, tmp_path):
    config, folder, _ = learned
    program = build.student_program(config, "network")
    state = program.init(0)
    sums = state.sums._replace(learned=state.sums.learned._replace(outer_loss=np.float32("nan")))
    with pytest.raises(loop.Diverged, match="x: the outer loss, that of the meta images, is not finite: lower"):
        loop._check_finite(program, state._replace(sums=sums), Checkpoints(tmp_path), "x")


@pytest.mark.slow
def test_a_run_resumes_between_two_updates_of_the_weight_net(learned, tmp_path):
    _, folder, _ = learned
    results = run(tiny(folder, "bikd", every=2), tmp_path / "whole")
    assert results["weighting"] != learned[2]["weighting"]
    config = tiny(folder, "bikd", every=2, checkpoint_every=100)
    resumes_bit_for_bit(config, tmp_path / "whole", results, tmp_path / "run")


def resumes_bit_for_bit(config, whole, results, workdir):
    """Stopped at every chunk, a run ends as the whole one did."""
    stops = 0
    for _ in range(1000):
        try:
            resumed = runs.run(config, workdir, command="", deadline=time.monotonic() + 0.01)
            break
        except loop.Stopped:
            stops += 1
    assert stops >= build.student_program(config, "network").total_steps - 1
    assert resumed["test"] == results["test"] and resumed["weighting"] == results["weighting"]
    assert (workdir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert parameters(workdir, config) == parameters(whole, config)


slow = pytest.mark.slow  # each compiles the step anew


@slow
@pytest.mark.parametrize("values", [{"teacher.table": "always"}, {"parallel": "pmap"}, {"precision": "bfloat16"}])
def test_learned_weights_hold_in_every_mode(learned, tmp_path, values):
    """pmap, the teacher's tables of training and meta images, bfloat16: the same first epoch, to their precision."""
    config, folder, _ = learned
    results = run(tiny(folder, "bikd", **values), tmp_path / "run")
    assert results["teacher_logits"] == ("table" if "teacher.table" in values else "network")
    a, b = (json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0]) for place in (folder, tmp_path))
    close = 0.2 if "precision" in values else 1e-3
    for key in ("loss", "outer_loss"):
        assert a[key] == pytest.approx(b[key], rel=close)
    for term in ("ce", "kd"):
        assert a["weights"][term] == pytest.approx(b["weights"][term], rel=close)
    if "teacher.table" in values:
        (place,) = (folder / "teachers").glob("*/")
        assert len(list(place.glob("table-*.npy"))) == 2


@slow
def test_two_steps_ahead_over_ltkds_terms(learned, tmp_path):
    config, folder, _ = learned
    results = run(tiny(folder, "bikd,terms=ltkd", **{"weighting.lookahead": 2}), tmp_path / "run")
    assert set(results["weighting"]["weights"]) == {"ce", "inter", "intra"}
