"""A queue from the command line: each run once, the best of a search by validation."""

import json

import pytest
from helpers.small_runs import TINY

from experiments import reproduce


@pytest.fixture
def reproduce_queue(tmp_path, capsys):
    """Does a queue, and returns the times at which its results were written."""
    arguments = [
        str(tmp_path / "queue.json"),
        f"--results={tmp_path / 'results'}",
        f"--runs={tmp_path / 'runs'}",
    ]

    def reproduce_queue():
        with pytest.raises(SystemExit) as error:
            reproduce.main(arguments)
        assert error.value.code == 0
        assert "ltkd" in capsys.readouterr().out
        assert (tmp_path / "runs" / "report.html").exists()
        paths = (tmp_path / "results").glob("*.json")
        return {path: path.stat().st_mtime_ns for path in paths}

    return reproduce_queue


def test_queue_chooses_by_validation(tmp_path, reproduce_queue):
    """Done a second time, it changes nothing."""
    config = "configs/digitslt.py:ltkd"
    runs = [
        {"config": config, "set": {"method.alpha": 0.5}, "group": "search"},
        {"config": config, "set": {"method.alpha": 3.0}, "group": "search"},
        {"config": config, "seeds": [7], "best_of": "search"},
    ]
    shared_values = {
        **TINY,
        "teacher.dir": str(tmp_path / "teachers"),
        "train.epochs": 1.0,
        "teacher.train.epochs": 1.0,
    }
    queue = {"set": shared_values, "runs": runs}
    (tmp_path / "queue.json").write_text(json.dumps(queue))

    write_times = reproduce_queue()
    results = [json.loads(path.read_text()) for path in write_times]
    search = [result for result in results if result["group"] == "search"]
    (final,) = [result for result in results if result["group"] is None]
    assert len(search) == 2
    best = max(search, key=lambda result: result["validation"]["all"])
    assert final["config"]["method"] == best["config"]["method"]
    assert final["seeds"]["student"] == 7
    alpha = best["config"]["method"]["alpha"]
    assert f"--config.method.alpha={alpha}" in final["command"]
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1
    assert reproduce_queue() == write_times
