"""A queue from the command line: each run once, the best of a search chosen by validation."""

import json

import pytest
from helpers.small_runs import TINY

from experiments import reproduce


def test_queue_is_done_once_and_chooses_by_validation(tmp_path, capsys):
    config = "configs/digitslt.py:ltkd"
    search = [
        {"config": config, "set": {"method.alpha": alpha}, "group": "search"}
        for alpha in (0.5, 3.0)
    ]
    runs = [*search, {"config": config, "seeds": [7], "best_of": "search"}]
    shared = {
        **TINY,
        "teacher.dir": str(tmp_path / "teachers"),
        "train.epochs": 1.0,
        "teacher.train.epochs": 1.0,
    }
    queue = tmp_path / "queue.json"
    queue.write_text(json.dumps({"set": shared, "runs": runs}))

    def reproduce_queue():
        with pytest.raises(SystemExit) as caught:
            reproduce.main(
                [
                    str(queue),
                    f"--results={tmp_path / 'results'}",
                    f"--runs={tmp_path / 'runs'}",
                ]
            )
        assert caught.value.code == 0
        assert (
            "ltkd" in capsys.readouterr().out
            and (tmp_path / "runs" / "report.html").exists()
        )
        return {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "results").glob("*.json")
        }

    written = reproduce_queue()
    results = [json.loads(path.read_text()) for path in written]
    searched = [result for result in results if result["group"] == "search"]
    (final,) = [result for result in results if result["group"] is None]
    assert len(searched) == 2
    best = max(searched, key=lambda result: result["validation"]["all"])
    assert (
        final["config"]["method"] == best["config"]["method"]
        and final["seeds"]["student"] == 7
    )
    assert (
        f"--config.method.alpha={best['config']['method']['alpha']}" in final["command"]
    )
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1
    assert reproduce_queue() == written
