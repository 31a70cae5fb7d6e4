"""Sweeps: the queue that a command line means, and that queue done."""

import json

import pytest
from helpers.small_runs import TINY

from experiments import reproduce, sweep
from experiments.config import checks
from experiments.jobs import queue_entry


def references(queue):
    return [run["config"].partition(":")[2] for run in queue["runs"]]


def test_a_sweep_is_every_method_in_every_setting():
    axes = {"imbalance": "10,100", "teacher": None, "student": "resnet8,resnet20"}
    queue = sweep.queue_of("configs/digitslt.py:epochs=5", "ce,ltkd,alpha=2,beta=3,ltkd", axes, 3, "about")
    settings = [f"imbalance={i},student={s},epochs=5" for i in (10, 100) for s in ("resnet8", "resnet20")]
    assert references(queue) == [f"{m},{s}" for s in settings for m in ("ce", "ltkd,alpha=2,beta=3", "ltkd")]
    assert all(run["seeds"] == [0, 1, 2] for run in queue["runs"])
    config = queue_entry.load_config(queue["runs"][-2]["config"])
    assert (config.method.alpha, config.data.imbalance, config.student.model) == (2.0, 100.0, "resnet20")


def test_one_teacher_for_all_methods_of_a_setting(tmp_path):
    for path in ("configs/digitslt.py", "configs/cifar100lt.py", "configs/imagenetlt.py"):
        queue = sweep.queue_of(path, "ce,kd,ltkd,bikd,bikd,terms=ltkd", {"imbalance": "10,100"}, 1, "")
        configs = [queue_entry.load_config(run["config"]) for run in queue["runs"]]
        for imbalance in (10, 100):
            same = [config for config in configs if config.data.imbalance == imbalance]
            assert len({checks.teacher_hash(config) for config in same}) == 1 and len(same) == 5
            assert len({json.dumps(checks.plain(config)["train"]) for config in same}) == 1
    chosen = sweep.queue_of("configs/cifar100lt.py", "kd,bikd,recipe=bikd", {}, 1, "")
    assert references(chosen) == ["kd", "bikd,recipe=bikd"]
    # What differs by what is asked for stays as it is asked for.
    for methods in ("kd,kd,train.lr=0.1", "kd,bikd,train.lr=0.3"):
        assert not any("recipe" in r for r in references(sweep.queue_of("configs/cifar100lt.py", methods, {}, 1, "")))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods="], "give at least one"),
        (["--methods=alpha=2,kd"], "'alpha=2' follows no method"),
        (["--methods=kd,ce,kd"], "configs/digitslt.py:kd is the same run as configs/digitslt.py:kd"),
        (["--methods=ltkd,alpha=1,ltkd,alpha=1.0"], "is the same run as"),
        (["--methods=ce", "--imbalance=10,10.0"], "is the same run as"),
        (["--methods=bikd,bikd,terms=kd"], "is the same run as"),
        (["--methods=kd,smoke"], "smoke is for all runs"),
        (["--methods=kd,seed=5"], "seeds are given by --seeds"),
        (["--methods=ce", "--config=configs/digitslt.py:seed=4"], "seeds are given by --seeds"),
        (["--methods=ce", "--config=configs/digitslt.py:imbalance=10", "--imbalance=20"], "gives 'imbalance' twice"),
        (["--methods=kd,student=resnet14", "--student=resnet8"], "gives 'student' twice"),
        (["--methods=ce", "--config=README.md"], "README.md is no config"),
        (["--methods=ce", "--name=../up"], "must be the name of one folder"),
        (["--methods=kd,lkd"], "unknown method 'lkd'; did you mean 'ltkd'"),
        (["--methods=kd,alhpa=2"], "unknown key 'alhpa'"),
        (["--methods=ce", "--imbalance=10,,20"], "imbalance='' must be of type float"),
        (["--methods=ce", "--imbalance=ten"], "imbalance"),
        (["--methods=ce", "--imbalance=0.5"], "config.data.imbalance=0.5 must be at least 1"),
        (["--methods=ce", "--student=resnet9"], "unknown model 'resnet9'"),
        (["--methods=ce", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["--methods=ce", "--config=configs/nowhere.py"], "no config file 'configs/nowhere.py'"),
    ],
)
def test_what_cannot_be_swept(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_FOLDER", tmp_path)
    monkeypatch.setattr(reproduce, "main", lambda argv: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=message) as caught:
        sweep.main(arguments)
    assert str(caught.value).startswith("error: ")


@pytest.mark.slow
def test_a_sweep_is_done_extended_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_FOLDER", tmp_path)
    shared = {**TINY, "teacher.cache": str(tmp_path / "teachers"), "train.epochs": 1.0, "teacher.train.epochs": 1.0}
    shared.pop("data.imbalance")
    config = "configs/digitslt.py:" + ",".join(f"{key}={value}" for key, value in shared.items())

    def do(*arguments):
        with pytest.raises(SystemExit) as caught:
            sweep.main([f"--config={config}", "--imbalance=2,4", "--name=mine", "--at_once=1", *arguments])
        assert caught.value.code == 0
        folder = tmp_path / "mine"
        return capsys.readouterr().out, {p: p.stat().st_mtime_ns for p in (folder / "results").glob("*.json")}

    said, first = do("--methods=ce,kd", "--seeds=1")
    assert len(first) == 4 and "4 runs, 2 teachers" in said
    assert "imbalance 2, resnet8 → resnet8" in said and "imbalance 4, resnet8 → resnet8" in said
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 2
    said, second = do("--methods=ce,kd,ltkd", "--seeds=1")
    assert len(second) == 6 and first.items() <= second.items()
    said, third = do("--methods=ltkd", "--seeds=1")
    assert third == second
    page = (tmp_path / "mine" / "report.html").read_text()
    assert "ltkd" in page and ">kd<" not in page  # of what was asked for, though there is more
