"""Sweeps: the runs of a command line, which tests/system/test_jobs.py does."""

import json
import pathlib

import pytest

from experiments import sweep
from experiments.trainer import run as runner

ROOT = pathlib.Path(__file__).resolve().parents[2]


def arguments(specs):
    return [reference.partition(":")[2] for reference in specs]


def test_plan_has_every_method_in_every_setting():
    axes = {"imbalance": "10,100", "teacher": None, "student": "resnet8,resnet20"}
    methods = ("ce", "ltkd,alpha=2,beta=3", "ltkd")
    specs = sweep.plan("configs/digitslt.py:epochs=5", ",".join(methods), axes)
    expected = []
    for imbalance in (10, 100):
        for student in ("resnet8", "resnet20"):
            setting = f"imbalance={imbalance},student={student},epochs=5"
            expected += [f"{method},{setting}" for method in methods]
    assert arguments(specs) == expected
    config = list(specs.values())[-2].config
    assert (config["method"]["alpha"], config["data"]["imbalance"]) == (2.0, 100.0)
    assert (config["student"]["model"], config["train"]["epochs"]) == ("resnet20", 5.0)
    assert sweep.summary(specs, 3) == "36 runs, 2 teachers"


@pytest.mark.parametrize(
    "path", ["configs/digitslt.py", "configs/cifar100lt.py", "configs/imagenetlt.py"]
)
def test_plan_shares_a_teacher_within_a_setting(path):
    specs = sweep.plan(path, "ce,kd,ltkd,bikd,bikd,terms=ltkd", {"imbalance": "10,100"})
    for imbalance in (10, 100):
        runs = [spec for spec in specs.values() if spec.data.imbalance == imbalance]
        assert len(runs) == 5
        assert len({spec.teacher_hash for spec in runs}) == 1
        assert len({json.dumps(spec.config["train"]) for spec in runs}) == 1


@pytest.mark.parametrize(
    "methods", ["kd,bikd,recipe=bikd", "kd,kd,train.lr=0.1", "kd,bikd,train.lr=0.3"]
)
def test_plan_keeps_chosen_recipes(methods):
    specs = sweep.plan("configs/cifar100lt.py", methods, {})
    assert ",".join(arguments(specs)) == methods


def test_config_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words = ["--methods=ce", "--config=configs/digitslt.py:epochs=5", "--seeds=1"]
    with pytest.raises(SystemExit):
        sweep.main([*words, "--config.train.lr=0.2", "--data_dir=/x", "--list"])
    queue = json.loads((tmp_path / "runs/sweep-digitslt/queue.json").read_text())
    (run,) = queue["runs"]
    assert run["config"] == "configs/digitslt.py:ce,epochs=5,train.lr=0.2"
    # The folder of the data sets differs between machines.
    command = ["python -m experiments.sweep", *words, "--config.train.lr=0.2", "--list"]
    assert queue["about"] == " ".join(command)
    with pytest.raises(SystemExit):
        sweep.main([*words, "--confg.train.lr=0.2"])
    assert "unrecognized argument '--confg.train.lr=0.2'" in capsys.readouterr().err


def test_all_runs_are_checked_before_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="imbalance of at most 100"):
        sweep.main(["--methods=ce", "--imbalance=10,500"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods="], "give at least one"),
        (["--methods=alpha=2,kd"], "'alpha=2' follows no method"),
        (
            ["--methods=kd,ce,kd"],
            "configs/digitslt.py:kd is the same run as configs/digitslt.py:kd",
        ),
        (["--methods=ltkd,alpha=1,ltkd,alpha=1.0"], "is the same run as"),
        (["--methods=ce", "--imbalance=10,10.0"], "is the same run as"),
        (["--methods=bikd,bikd,terms=kd"], "is the same run as"),
        (["--methods=kd,smoke"], "smoke is for all runs"),
        (["--methods=kd,smoke,alpha=2"], "smoke is for all runs"),
        (["--methods=kd,seed=5"], "--seeds"),
        (["--methods=ce", "--config=configs/digitslt.py:seed=4"], "--seeds"),
        (
            [
                "--methods=ce",
                "--config=configs/digitslt.py:imbalance=10",
                "--imbalance=20",
            ],
            "'imbalance' twice",
        ),
        (["--methods=kd,student=resnet14", "--student=resnet8"], "'student' twice"),
        (["--methods=ce", "--config=README.md"], "README.md is no config"),
        (
            ["--methods=ce", "--config=configs/nowhere.py"],
            "no config file 'configs/nowhere.py'",
        ),
        (["--methods=ce", "--name=../up"], "must be the name of one folder"),
        (["--methods=kd,lkd"], "unknown method 'lkd'; did you mean 'ltkd'"),
        (["--methods=kd,alhpa=2"], "unknown key 'alhpa'"),
        (["--methods=ce", "--imbalance=10,,20"], "imbalance='' must be of type float"),
        (["--methods=ce", "--imbalance=ten"], "imbalance"),
        (
            ["--methods=ce", "--imbalance=0.5"],
            "config.data.imbalance=0.5 must be at least 1",
        ),
        (["--methods=ce", "--student=resnet9"], "unknown model 'resnet9'"),
    ],
)
def test_bad_sweep(words, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        sweep.main(words)
