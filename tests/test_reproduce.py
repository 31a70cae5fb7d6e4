"""Queues: each run once, the best of a search chosen by validation."""

import json

import pytest
from small import ROOT, TINY

from experiments import checks, entries, reproduce


def queue_file(tmp_path, *runs):
    path = tmp_path / "queue.json"
    shared = {**TINY, "teacher.cache": str(tmp_path / "teachers"), "train.epochs": 1.0, "teacher.train.epochs": 1.0}
    path.write_text(json.dumps({"about": "a test", "set": shared, "runs": runs}))
    return str(path)


def reproduce_all(queue, tmp_path, *options):
    with pytest.raises(SystemExit) as caught:
        reproduce.main([queue, f"--results={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}", *options])
    return caught.value.code


def test_a_queue_is_done_once_and_chooses_by_validation(tmp_path, capsys):
    config = "configs/digits_lt.py:ltkd"
    search = [
        {"config": config, "set": {"method.alpha": alpha, "method.temperature": 2.0}, "group": "search"}
        for alpha in (0.5, 3.0)
    ]
    queue = queue_file(tmp_path, *search, {"config": config, "seeds": [7], "best_of": "search"})
    assert reproduce_all(queue, tmp_path) == 0
    results = {path: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert len(results) == 3
    found = [r for r in results.values() if r["group"] == "search"]
    (final,) = [r for r in results.values() if r["group"] is None]
    best = max(found, key=lambda r: r["validation"]["all"])
    assert final["config"]["method"] == best["config"]["method"] and final["seeds"]["student"] == 7
    assert f"--config.method.alpha={best['config']['method']['alpha']}" in final["command"]
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1
    capsys.readouterr()
    stamps = {path: path.stat().st_mtime_ns for path in results}
    assert reproduce_all(queue, tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")} == stamps
    assert "ltkd" in capsys.readouterr().out and (tmp_path / "runs" / "report.html").exists()


def test_a_changed_default_is_a_run_to_do(tmp_path, capsys):
    entry = {"config": "configs/digits_lt.py:ce"}
    queue = queue_file(tmp_path, entry)
    assert reproduce_all(queue, tmp_path) == 0
    reproduce.main([queue, f"--results={tmp_path / 'results'}", "--list"])
    assert "digits_lt" not in capsys.readouterr().out.splitlines()[-1]
    queue = queue_file(tmp_path, {**entry, "set": {"train.weight_decay": 1e-3}})
    reproduce.main([queue, f"--results={tmp_path / 'results'}", "--list"])
    assert "digits_lt" in capsys.readouterr().out.splitlines()[-1]


def test_the_queues_of_the_project_are_readable():
    for path in sorted((ROOT / "experiments" / "queues").glob("*.json")):
        found = entries.read_queue(path)
        hashes = [checks.config_hash(entries.resolve(e)) for e in found if not e.best_of]
        assert len(set(hashes)) == len(hashes), path
    search = [e for e in entries.read_queue(ROOT / "experiments/queues/gpu.json") if e.group == "search"]
    assert 0 < len(search) <= 12
    assert len({checks.teacher_hash(entries.resolve(e)) for e in search}) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read the queue"),
        ('{"runs": [{"config": "configs/digits_lt.py", "sets": {}}]}', "unknown key 'sets'"),
        ('{"runs": [{"config": "configs/digits_lt.py", "best_of": "x"}]}', "no run's group"),
        ('{"runs": [{"config": "configs/digits_lt.py", "group": "x", "best_of": "x"}]}', "best_of its own group"),
        ('{"runs": [{"config": 3}]}', "must be configs/"),
        ('{"runs": [{"config": "README.md"}]}', "must be configs/"),
        ('{"runs": [{"config": "configs/none.py"}]}', "no config file"),
        ('{"runs": [{"config": "configs/digits_lt.py", "set": {"train.lrr": 1}}]}', "train.lrr"),
    ],
)
def test_bad_queues(tmp_path, content, message):
    path = tmp_path / "queue.json"
    path.write_text(content)
    assert message in str(reproduce_all(str(path), tmp_path))
