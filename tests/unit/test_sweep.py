"""Sweeps: the runs that a command line means; tests/system/test_jobs.py does them."""

import json

import pytest

from experiments import sweep


def arguments(specs):
    return [reference.partition(":")[2] for reference in specs]


def test_plan_is_every_method_in_every_setting():
    axes = {"imbalance": "10,100", "teacher": None, "student": "resnet8,resnet20"}
    specs = sweep.plan(
        "configs/digitslt.py:epochs=5", "ce,ltkd,alpha=2,beta=3,ltkd", axes
    )
    settings = [
        f"imbalance={i},student={s},epochs=5"
        for i in (10, 100)
        for s in ("resnet8", "resnet20")
    ]
    assert arguments(specs) == [
        f"{m},{s}" for s in settings for m in ("ce", "ltkd,alpha=2,beta=3", "ltkd")
    ]
    config = list(specs.values())[-2].config
    assert (config["method"]["alpha"], config["data"]["imbalance"]) == (2.0, 100.0)
    assert (config["student"]["model"], config["train"]["epochs"]) == ("resnet20", 5.0)
    assert sweep.summary(specs, 3) == "36 runs, 2 teachers"


@pytest.mark.parametrize(
    "path", ["configs/digitslt.py", "configs/cifar100lt.py", "configs/imagenetlt.py"]
)
def test_plan_has_one_teacher_for_all_methods_of_a_setting(path):
    specs = sweep.plan(path, "ce,kd,ltkd,bikd,bikd,terms=ltkd", {"imbalance": "10,100"})
    for imbalance in (10, 100):
        setting = [
            spec
            for spec in specs.values()
            if spec.config["data"]["imbalance"] == imbalance
        ]
        assert len({spec.teacher_hash for spec in setting}) == 1 and len(setting) == 5
        assert len({json.dumps(spec.config["train"]) for spec in setting}) == 1


@pytest.mark.parametrize(
    "methods", ["kd,bikd,recipe=bikd", "kd,kd,train.lr=0.1", "kd,bikd,train.lr=0.3"]
)
def test_plan_leaves_recipes_that_are_asked_for(methods):
    specs = sweep.plan("configs/cifar100lt.py", methods, {})
    assert ",".join(arguments(specs)) == methods


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
        (["--methods=ce", "--seeds=0"], "--seeds=0"),
    ],
)
def test_bad_sweep_is_refused(words, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        sweep.main(words)
