"""Queues and sweeps over two devices: interrupted, resumed and extended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.small_runs import ROOT, TINY

from experiments import sweep


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_queue_of_two_workers(tmp_path):
    """Shares a queue and a teacher between two workers; stops and resumes them."""
    shared_values = {
        **TINY,
        "teacher.dir": str(tmp_path / "teachers"),
        "train.epochs": 8.0,
        "teacher.train.epochs": 1.0,
    }
    runs = [{"config": "configs/digitslt.py:ltkd", "seeds": [0, 1, 2, 3]}]
    queue = tmp_path / "queue.json"
    queue.write_text(json.dumps({"set": shared_values, "runs": runs}))
    results = tmp_path / "results"
    command = [sys.executable, "-m", "experiments.reproduce", str(queue)]
    command += [f"--results={results}", f"--runs={tmp_path / 'runs'}"]
    command += ["--num_workers=2"]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        # Each worker takes a device of its own.
        "env": {**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
    }

    with subprocess.Popen(command, **options) as process:
        while not modification_times(results) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    interrupted = modification_times(results)
    assert 1 <= len(interrupted) < 4

    resumed = subprocess.run(command, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert "ltkd" in resumed.stdout, resumed.stderr
    finished = modification_times(results)
    assert len(finished) == 4
    # Results of finished runs are not written again.
    assert interrupted.items() <= finished.items()
    logs = [path.read_text() for path in (tmp_path / "runs").glob("device-*.log")]
    assert len(logs) == 2
    assert all("ltkd s" in log for log in logs)
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1

    repeated = subprocess.run(command, **options)
    assert repeated.returncode == 0
    assert modification_times(results) == finished


def test_sweep_is_extended(tmp_path, monkeypatch, capsys):
    """Adds a method to a sweep, which then makes only the new runs."""
    monkeypatch.chdir(tmp_path)
    values = {**TINY, "train.epochs": 1.0, "teacher.train.epochs": 1.0}
    # The sweep sets it by --imbalance.
    values.pop("data.imbalance")
    argument = ",".join(f"{key}={value}" for key, value in values.items())
    common = (
        f"--config={ROOT}/configs/digitslt.py:{argument}",
        "--imbalance=2",
        "--name=small",
        "--seeds=1",
    )
    folder = tmp_path / "runs" / "small"

    def run_sweep(methods):
        with pytest.raises(SystemExit) as exit_info:
            sweep.main([*common, f"--methods={methods}"])
        assert exit_info.value.code == 0
        return capsys.readouterr().out, modification_times(folder / "results")

    output, first = run_sweep("ce,kd")
    assert len(first) == 2
    assert "2 runs, 1 teacher" in output
    assert len(list((tmp_path / "runs" / "teachers").glob("*/results.json"))) == 1
    _, extended = run_sweep("ce,kd,ltkd")
    assert len(extended) == 3
    assert first.items() <= extended.items()
    _, repeated = run_sweep("ltkd")
    assert repeated == extended
    # The page has the methods of the last command only.
    page = (folder / "report.html").read_text()
    assert "ltkd" in page
    assert ">kd<" not in page
