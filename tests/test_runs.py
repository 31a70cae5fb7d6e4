"""Whole small runs in this process, spread over the eight devices of the tests."""

import json
import time

import numpy as np
import pytest
from small import parameters, run, tiny

from experiments import build, runs, teachers, train
from ltkd_jax import files
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished LTKD run, its config and its folder."""
    folder = tmp_path_factory.mktemp("done")
    config = tiny(folder)
    return config, folder, run(config, folder / "run")


def test_results_hold_what_they_promise(done):
    config, folder, results = done
    assert json.loads((folder / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["config_hash"] == build.config_hash(config) and results["config"]["method"]["name"] == "ltkd"
    assert results["seeds"] == {"split": 0, "teacher": 0, "student": 0}
    assert results["train_images"] == sum(results["class_counts"]) and results["class_counts"][0] == 12
    assert results["epochs"] == 3.0
    for part in (results["test"], results["validation"], results["teacher"]["test"]):
        assert set(part) == {"all", "per_class", "groups", "shots", "ece", "confusion"}
        assert len(part["per_class"]) == 10 and set(part["groups"]) == {"head", "medium", "tail"}
        # The sets are balanced: each image was counted once, on eight devices with a padded batch.
        assert part["all"] == pytest.approx(np.mean(part["per_class"]))
    mass = results["teacher"]["group_mass"]
    assert all(sum(mass[kind].values()) == pytest.approx(1) for kind in ("long_tailed", "balanced"))
    assert results["teacher"]["hash"] == build.teacher_hash(config)
    assert {"device", "precision", "versions", "commit", "timing", "command"} <= set(results)


def test_metrics_are_logged_per_epoch(done):
    _, folder, results = done
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1.0, 2.0, 3.0]
    assert set(lines[0]["terms"]) == {"ce", "inter", "intra"}
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["terms"].values()), rel=1e-4)
    assert lines[-1]["test"]["all"] == results["test"]["all"]


def test_a_finished_run_is_not_repeated(done):
    config, folder, results = done
    before = (folder / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert run(config, folder / "run") == json.loads(json.dumps(results))
    assert (folder / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_work_directory_of_another_config_is_refused(done):
    config, folder, _ = done
    other = tiny(folder, "kd", seed=5)
    with pytest.raises(build.ConfigError, match="holds a run of another config .*method"):
        run(other, folder / "run")


def test_a_work_directory_in_use_is_refused(done):
    config, folder, _ = done
    with files.lock(folder / "run" / ".lock", wait=False):
        with pytest.raises(build.ConfigError, match="in use by another run"):
            run(config, folder / "run")


def test_table_and_network_teacher_give_the_same_run(done):
    config, folder, results = done
    assert results["teacher_logits"] == "network"
    other = tiny(folder, **{"teacher.table": "always"})
    assert build.config_hash(other) == build.config_hash(config)
    looked_up = run(other, folder / "by_table")
    assert looked_up["teacher_logits"] == "table"
    for name in ("run", "by_table"):
        assert (folder / name / "metrics.jsonl").exists()
    a, b = (json.loads((folder / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("run", "by_table"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_pmap_gives_the_same_run(done):
    _, folder, _ = done
    run(tiny(folder, parallel="pmap"), folder / "pmap")
    a, b = (json.loads((folder / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("run", "pmap"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_teacher_is_shared(done):
    config, folder, results = done
    before = sorted((folder / "teachers").glob("*/results.json"))
    assert [path.parent.name for path in before] == [build.teacher_hash(config)]
    stamp = before[0].stat().st_mtime_ns
    other = run(tiny(folder, "kd", seed=2), folder / "kd")
    assert other["teacher"] == results["teacher"] and before[0].stat().st_mtime_ns == stamp
    assert not list((folder / "teachers").glob("*.unfinished"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"teacher.model": "resnet14"}, "has model='resnet8', the config wants 'resnet14'"),
        ({"teacher.checkpoint": "/nowhere"}, "holds no finished teacher"),
    ],
)
def test_a_teacher_that_does_not_fit(done, values, message):
    config, folder, _ = done
    own = {"teacher.checkpoint": str(folder / "teachers" / build.teacher_hash(config))}
    with pytest.raises(build.ConfigError, match=message):
        teachers.obtain(tiny(folder, "kd", **{**own, **values}), train.StopRequest())


def test_a_teacher_of_another_class_count(done, tmp_path):
    config, folder, _ = done
    other = tmp_path / "other"
    other.mkdir()
    own = folder / "teachers" / build.teacher_hash(config) / "results.json"
    (other / "results.json").write_text(json.dumps({**json.loads(own.read_text()), "num_classes": 100}))
    with pytest.raises(build.ConfigError, match="num_classes=100, the config wants 10"):
        teachers.obtain(tiny(folder, "kd", **{"teacher.checkpoint": str(other)}), train.StopRequest())


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_lost(tmp_path):
    config = tiny(tmp_path, "ce")
    with pytest.raises(train.Stopped):
        runs.run(config, tmp_path / "run", command="", deadline=time.monotonic())
    (good,) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    saved = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    program = build.student_program(tiny(tmp_path, "ce", **{"train.lr": 1e30}), "none")
    with pytest.raises(train.Diverged, match="is not finite.*ce.*last good checkpoint is step") as caught:
        train.fit(program, program.train_data(None), 0, tmp_path / "run", train.StopRequest(), config=config, label="x")
    assert f"last good checkpoint is step {good}" in str(caught.value)
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == saved


def test_a_deadline_stops_and_the_next_call_goes_on(done, tmp_path):
    """Stopped at every chunk and resumed each time: the same bits as in one go."""
    config, folder, results = done
    config = tiny(folder, checkpoint_every=100)
    for _ in range(1000):
        try:
            resumed = runs.run(config, tmp_path / "run", command="", deadline=time.monotonic() + 0.01)
            break
        except train.Stopped:
            pass
    assert resumed["test"] == results["test"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (folder / "run" / "metrics.jsonl").read_text()
    assert parameters(tmp_path / "run") == parameters(folder / "run")
