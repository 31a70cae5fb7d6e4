"""Whole small runs in the modes of execution: none changes more than rounding."""

import time

import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, prepare_insects, run, streamed, tiny

from experiments.config.spec import resolve
from experiments.trainer.interrupts import StoppedError, StopRequest

AUGMENTED = {"augment.cutout": 3, "augment.mixup": 0.2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_insects(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a run with learned weights, on one device."""
    folder = tmp_path_factory.mktemp("learned")
    run(tiny(folder, "bikd", devices=1), folder / "run")
    return folder


def first_records(*workdirs):
    return [small_runs.records(workdir)[0] for workdir in workdirs]


@pytest.mark.parametrize(
    "argument, values, source",
    [
        (
            "ltkd",
            {**AUGMENTED, "augment.policy": "autoaugment", "data.stream": False},
            "network",
        ),
        (
            "bikd,terms=ltkd",
            {**AUGMENTED, "data.stream": True, "loss_weighting.lookahead": 2},
            "network",
        ),
        ("bikd,terms=reviewkd", {"data.stream": False}, "features"),
    ],
)
def test_one_device_and_pmap_agree(data_dir, tmp_path, argument, values, source):
    learned = (
        {"data.outer_per_class": 4, "loss_weighting.update_every": 1}
        if "bikd" in argument
        else {}
    )
    for name, execution in (("one", {"devices": 1}), ("pmap", {"parallel": "pmap"})):
        config = streamed(
            data_dir,
            tmp_path,
            argument,
            **values,
            **learned,
            **execution,
            **{"train.epochs": 1.0},
        )
        assert run(config, tmp_path / name)["teacher_logits"] == source
    one, pmap = first_records(tmp_path / "one", tmp_path / "pmap")
    assert one["loss"] == pytest.approx(pmap["loss"], rel=1e-3)
    for term, value in one["terms"].items():
        assert value == pytest.approx(pmap["terms"][term], rel=5e-3)


@pytest.mark.parametrize(
    "values, tolerance",
    [({"teacher.table": "always"}, 1e-3), ({"precision": "bfloat16"}, 0.2)],
)
def test_learned_weights_agree(learned, tmp_path, values, tolerance):
    """With tables of the training and the outer images, and in bfloat16."""
    results = run(tiny(learned, "bikd", devices=1, **values), tmp_path / "run")
    assert results["teacher_logits"] == (
        "table" if "teacher.table" in values else "network"
    )
    reference, record = first_records(learned / "run", tmp_path / "run")
    for key in ("loss", "outer_loss"):
        assert record[key] == pytest.approx(reference[key], rel=tolerance)
    for term in ("ce", "kd"):
        assert record["weights"][term] == pytest.approx(
            reference["weights"][term], rel=tolerance
        )
    if "teacher.table" in values:
        assert len(list((learned / "teachers").glob("*/table-*.npy"))) == 2


def test_workers_change_nothing(data_dir, tmp_path):
    """In a whole run, and in one that continues with them where another stopped."""
    config = streamed(data_dir, tmp_path, "ce")
    with_workers = streamed(data_dir, tmp_path, "ce", **{"data.num_workers": 2})
    assert resolve(with_workers).hash == resolve(config).hash
    run(config, tmp_path / "without")
    run(with_workers, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "resumed", stop=StopRequest(time.monotonic()))
    run(with_workers, tmp_path / "resumed")
    for name in ("whole", "resumed"):
        assert_same_bits(config, tmp_path / name, tmp_path / "without")
