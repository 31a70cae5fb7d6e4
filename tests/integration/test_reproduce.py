"""Queues: each run once, the best of a search chosen by validation."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.small_runs import ROOT, TINY

from experiments import reproduce
from experiments.config import checks
from experiments.jobs import queue_entry, workers
from experiments.trainer import loop


def queue_file(tmp_path, *runs):
    path = tmp_path / "queue.json"
    shared = {**TINY, "teacher.cache": str(tmp_path / "teachers"), "train.epochs": 1.0, "teacher.train.epochs": 1.0}
    path.write_text(json.dumps({"about": "a test", "set": shared, "runs": runs}))
    return str(path)


def reproduce_all(queue, tmp_path, *options):
    with pytest.raises(SystemExit) as caught:
        folders = [f"--results={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}"]
        reproduce.main([queue, *folders, "--at_once=1", *options])
    return caught.value.code


def test_a_queue_is_done_once_and_chooses_by_validation(tmp_path, capsys):
    config = "configs/digitslt.py:ltkd"
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
    entry = {"config": "configs/digitslt.py:ce"}
    queue = queue_file(tmp_path, entry)
    assert reproduce_all(queue, tmp_path) == 0
    reproduce.main([queue, f"--results={tmp_path / 'results'}", "--list"])
    assert "digitslt" not in capsys.readouterr().out.splitlines()[-1]
    queue = queue_file(tmp_path, {**entry, "set": {"train.weight_decay": 1e-3}})
    reproduce.main([queue, f"--results={tmp_path / 'results'}", "--list"])
    assert "digitslt" in capsys.readouterr().out.splitlines()[-1]


def test_what_another_process_does_is_left_to_it_and_taken_over(tmp_path, capsys, monkeypatch):
    """The first run is in use at first, and then done by the other process; the second is given up by it."""
    done, tries, carry_out = [], [], reproduce.Reproduction.carry_out

    def run(config, workdir, **_):
        tries.append(config.seed)
        if tries.count(config.seed) == 1:
            raise checks.InUse("in use")
        done.append(config.seed)
        return {"config_hash": checks.config_hash(config), "timing": None}

    def others(self, entry, deadline):
        if entry.seed == 0 and len(tries) > 2:
            self._results.add(self.config(entry), {"by": "another"}, None)
        return carry_out(self, entry, deadline)

    monkeypatch.setattr(reproduce.runs, "run", run)
    monkeypatch.setattr(reproduce.Reproduction, "carry_out", others)
    monkeypatch.setattr(reproduce, "_WAIT", 0.0)
    queue = queue_entry.read_queue(queue_file(tmp_path, {"config": "configs/digitslt.py:ce", "seeds": [0, 1, 2]}))
    results = reproduce.Results(tmp_path / "results")
    assert reproduce.reproduce(reproduce.Reproduction(queue, results, tmp_path / "runs"), None) == 0
    assert tries == [0, 1, 2, 1, 2] and done == [1, 2]
    assert results.find(queue_entry.resolve(queue[0])) == {"by": "another", "group": None}


@pytest.mark.parametrize("options, status", [([], 75), (["--minutes=1e-9"], 0)])
def test_a_queue_that_a_signal_stops_says_so_by_its_exit(tmp_path, monkeypatch, options, status):
    def run(config, workdir, **_):
        raise loop.Stopped("stopped by SIGTERM")

    monkeypatch.setattr(reproduce.runs, "run", run)
    queue = queue_file(tmp_path, {"config": "configs/digitslt.py:ce"})
    assert reproduce_all(queue, tmp_path, *options) == status


def test_what_waits_for_a_group_that_failed_is_told(tmp_path, capsys, monkeypatch):
    def run(config, workdir, **_):
        raise checks.ConfigError("no such thing")

    monkeypatch.setattr(reproduce.runs, "run", run)
    config = "configs/digitslt.py:ltkd"
    queue = queue_file(tmp_path, {"config": config, "group": "search"}, {"config": config, "best_of": "search"})
    assert reproduce_all(queue, tmp_path) == 1
    told = capsys.readouterr().err
    assert "no such thing" in told and "waits for all runs of group 'search'" in told


def test_what_a_run_says_itself_goes_before_what_was_chosen(tmp_path):
    entry = queue_entry.Entry("configs/digitslt.py:ltkd", {"method.beta": 0.0}, 0, None, "search")
    config = queue_entry.resolve(entry, {"config": {"method": {"name": "ltkd", "alpha": 4.0, "beta": 2.0}}})
    assert (config.method.alpha, config.method.beta) == (4.0, 0.0)


def test_how_many_runs_at_a_time():
    measured = workers.Measured
    assert measured("gpu", 1).at_once == 1
    assert measured("gpu", 8, together=1.0, alone=2.0).at_once == 8  # 0.25 s a step of each against 1
    assert measured("gpu", 8, together=1.0, alone=9.0).at_once == 1
    assert measured("gpu", 8, together=None, alone=9.0).at_once == 8


def test_a_process_sees_one_device():
    assert workers.seeing(1, "gpu", {"A": "b"}) == {"A": "b", "CUDA_VISIBLE_DEVICES": "1"}
    assert workers.seeing(1, "gpu", {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    seen = [workers.seeing(slot, "tpu", {}) for slot in range(4)]
    assert len({tuple(sorted(environment.items())) for environment in seen}) == 4
    assert len({environment["TPU_MESH_CONTROLLER_PORT"] for environment in seen}) == 4


def test_a_signal_goes_on_to_the_workers():
    with subprocess.Popen(["sleep", "60"]) as worker, subprocess.Popen(["true"]) as done:
        done.wait()
        with workers._passing_on([worker, done]):
            os.kill(os.getpid(), signal.SIGTERM)
            assert worker.wait(timeout=10) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_two_devices_share_a_queue(tmp_path):
    """By the command line: each run once, by two processes, and the same command again does nothing."""
    queue = queue_file(tmp_path, {"config": "configs/digitslt.py:ltkd", "seeds": [0, 1, 2, 3]})
    command = [sys.executable, "-m", "experiments.reproduce", queue, f"--results={tmp_path / 'results'}"]
    command += [f"--runs={tmp_path / 'runs'}", "--at_once=2"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    assert "ltkd" in first.stdout
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}
    assert len(found) == 4
    logs = [path.read_text() for path in sorted((tmp_path / "runs").glob("device-*.log"))]
    assert len(logs) == 2 and all("ltkd s" in log for log in logs)
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1
    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")} == found
    asked = [sys.executable, "-m", "experiments.jobs.workers", queue]
    measured = subprocess.run(asked, env=environment, capture_output=True, text=True, cwd=ROOT)
    found = workers.Measured(**json.loads(measured.stdout))
    assert found.slots == 2 and found.together > 0 and found.alone > 0 and "2 devices take" in str(found)
    too_many = subprocess.run(
        [*command[:3], queue, "--at_once=3"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert "--at_once=3: there are 2 devices" in too_many.stderr


def test_the_queues_of_the_project_are_readable():
    for path in sorted((ROOT / "experiments" / "queues").glob("*.json")):
        found = queue_entry.read_queue(path)
        hashes = [checks.config_hash(queue_entry.resolve(e)) for e in found if not e.best_of]
        assert len(set(hashes)) == len(hashes), path
    for group in ("search", "search of the best row"):
        search = [e for e in queue_entry.read_queue(ROOT / "experiments/queues/gpu.json") if e.group == group]
        assert 0 < len(search) <= 12
        assert len({checks.teacher_hash(queue_entry.resolve(e)) for e in search}) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read the queue"),
        ('{"runs": [{"config": "configs/digitslt.py", "sets": {}}]}', "unknown key 'sets'"),
        ('{"runs": [{"config": "configs/digitslt.py", "best_of": "x"}]}', "no run's group"),
        ('{"runs": [{"config": "configs/digitslt.py", "group": "x", "best_of": "x"}]}', "best_of its own group"),
        ('{"runs": [{"config": 3}]}', "must be configs/"),
        ('{"runs": [{"config": "README.md"}]}', "must be configs/"),
        ('{"runs": [{"config": "configs/none.py"}]}', "no config file"),
        ('{"runs": [{"config": "configs/digitslt.py", "set": {"train.lrr": 1}}]}', "train.lrr"),
    ],
)
def test_bad_queues(tmp_path, content, message):
    path = tmp_path / "queue.json"
    path.write_text(content)
    assert message in str(reproduce_all(str(path), tmp_path))
