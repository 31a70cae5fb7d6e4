"""A run from Python, without a command line."""

import json

import numpy as np
import pytest
from helpers.small_runs import tiny

from experiments import training
from experiments.config.validation import ConfigError


def test_train(tmp_path):
    config = tiny(tmp_path, "ltkd")
    records = []
    finished = training.train(
        config,
        tmp_path / "run",
        values={"train.epochs": 1.0, "seed": 3},
        on_record=records.append,
    )
    assert finished.results["config"]["train"]["epochs"] == 1.0
    assert finished.results["seeds"]["student"] == 3
    assert config.train.epochs == 3.0  # the caller's config is unchanged
    assert records[-1]["test"]["all"] == finished.results["test"]["all"]
    assert finished.report.stat().st_size > 5_000
    written = json.loads((finished.workdir / "results.json").read_text())
    assert written == json.loads(json.dumps(finished.results))
    _, labels = finished.classifier()(np.zeros((2, 8, 8, 1), np.uint8))
    assert labels.shape == (2,)


@pytest.mark.parametrize(
    "config, values, message",
    [
        ("configs/absent.py", {}, "no config file"),
        ("configs/digitslt.py:ltkx", {}, "unknown method 'ltkx'"),
        ("configs/digitslt.py", {"train.lrr": 0.1}, "'train.lrr'; .* 'train.lr'"),
        ("configs/digitslt.py", {"lr": 0.1}, "'lr'; did you mean 'train.lr'"),
        ("configs/digitslt.py", {"seed_split": 1}, "now called 'split_seed'"),
        ("configs/digitslt.py", {"train.lr": "x"}, "train.lr"),
        ("configs/digitslt.py", {"train.lr": -1.0}, "train.lr=-1.0"),
    ],
)
def test_bad_config(tmp_path, config, values, message):
    with pytest.raises(ConfigError, match=message):
        training.train(config, tmp_path / "run", values=values)
