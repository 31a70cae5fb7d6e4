"""Small runs in every mode of execution agree but for rounding."""

import time

import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, prepare_insects, run, streamed, tiny

from experiments.config.spec import resolve
from experiments.trainer.interrupts import StoppedError, StopRequest

AUGMENTED = {"augment.cutout": 3, "augment.mixup": 0.2}
LEARNED = {"data.outer_per_class": 4, "loss_weighting.update_every": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_insects(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Returns the folder of a run with learned weights, on one device."""
    folder = tmp_path_factory.mktemp("learned")
    run(tiny(folder, "bikd,outer_loss=mix", devices=1), folder / "run")
    return folder


def first_record(workdir):
    return small_runs.records(workdir)[0]


@pytest.mark.parametrize(
    "argument, values, teacher_logits",
    [
        (
            "ltkd",
            {**AUGMENTED, "augment.policy": "autoaugment", "data.stream": False},
            "network",
        ),
        (
            "bikd,terms=ltkd",
            {
                **AUGMENTED,
                **LEARNED,
                # One image for each device, half of a training batch.
                "data.outer_per_class": 2,
                "data.stream": True,
                "loss_weighting.lookahead": 2,
            },
            "network",
        ),
        ("bikd,terms=reviewkd", {**LEARNED, "data.stream": False}, "features"),
    ],
)
def test_one_device_and_pmap(data_dir, tmp_path, argument, values, teacher_logits):
    values = {**values, "train.epochs": 1.0}
    for name, execution in (("one", {"devices": 1}), ("pmap", {"parallel": "pmap"})):
        config = streamed(data_dir, tmp_path, argument, **values, **execution)
        results = run(config, tmp_path / name)
        assert results["teacher_logits"] == teacher_logits
    one = first_record(tmp_path / "one")
    pmap = first_record(tmp_path / "pmap")
    assert one["loss"] == pytest.approx(pmap["loss"], rel=1e-3)
    if "outer_loss" in one:
        assert one["outer_loss"] == pytest.approx(pmap["outer_loss"], rel=5e-3)
    for term, value in one["terms"].items():
        assert value == pytest.approx(pmap["terms"][term], rel=5e-3)


@pytest.mark.parametrize(
    "values, tolerance",
    [({"teacher.table": "always"}, 1e-3), ({"precision": "bfloat16"}, 0.2)],
)
def test_learned_weights(learned, tmp_path, values, tolerance):
    """Uses tables of the training and the outer images, and bfloat16."""
    with_table = "teacher.table" in values
    config = tiny(learned, "bikd,outer_loss=mix", devices=1, **values)
    results = run(config, tmp_path / "run")
    assert results["teacher_logits"] == ("table" if with_table else "network")
    expected = first_record(learned / "run")
    actual = first_record(tmp_path / "run")
    for key in ("loss", "outer_loss"):
        assert actual[key] == pytest.approx(expected[key], rel=tolerance)
    for term in ("ce", "kd"):
        weight = expected["weights"][term]
        assert actual["weights"][term] == pytest.approx(weight, rel=tolerance)
    if with_table:
        # One table of the training images, one of the outer images.
        assert len(list((learned / "teachers").glob("*/table-*.npy"))) == 2


def test_workers_change_nothing(data_dir, tmp_path):
    """Uses workers in an entire run, and in one that resumes a run without workers."""
    config = streamed(data_dir, tmp_path, "ce")
    with_workers = streamed(data_dir, tmp_path, "ce", **{"data.num_workers": 2})
    assert resolve(with_workers).hash == resolve(config).hash
    run(config, tmp_path / "without")
    run(with_workers, tmp_path / "entire")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "resumed", stop=StopRequest(time.monotonic()))
    run(with_workers, tmp_path / "resumed")
    for name in ("entire", "resumed"):
        assert_same_bits(config, tmp_path / name, tmp_path / "without")
