"""Queues and sweeps done by processes: shared by two devices, stopped, continued, extended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.small_runs import ROOT, TINY

from experiments import sweep


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_two_workers_share_stop_and_finish_a_queue(tmp_path):
    shared = {
        **TINY,
        "teacher.dir": str(tmp_path / "teachers"),
        "train.epochs": 8.0,
        "teacher.train.epochs": 1.0,
    }
    runs = [{"config": "configs/digitslt.py:ltkd", "seeds": [0, 1, 2, 3]}]
    (tmp_path / "queue.json").write_text(json.dumps({"set": shared, "runs": runs}))
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "experiments.reproduce",
        str(tmp_path / "queue.json"),
        "--num_workers=2",
    ]
    command += [f"--results={results}", f"--runs={tmp_path / 'runs'}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    options = dict(env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"}, **pipes)

    with subprocess.Popen(command, **options) as parent:
        while not stamps(results) and parent.poll() is None:
            time.sleep(0.01)
        parent.send_signal(signal.SIGTERM)
        _, errors = parent.communicate()
    assert parent.returncode == 75, errors
    before = stamps(results)
    assert 1 <= len(before) < 4

    done = subprocess.run(command, **options)
    assert done.returncode == 0 and "ltkd" in done.stdout, done.stderr
    finished = stamps(results)
    assert len(finished) == 4 and before.items() <= finished.items()
    logs = [path.read_text() for path in (tmp_path / "runs").glob("device-*.log")]
    assert len(logs) == 2 and all("ltkd s" in log for log in logs)
    assert len(list((tmp_path / "teachers").glob("*/results.json"))) == 1

    again = subprocess.run(command, **options)
    assert again.returncode == 0 and stamps(results) == finished


def test_sweep_is_done_extended_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = {**TINY, "train.epochs": 1.0, "teacher.train.epochs": 1.0}
    shared.pop("data.imbalance")
    config = f"{ROOT}/configs/digitslt.py:" + ",".join(
        f"{key}={value}" for key, value in shared.items()
    )
    folder = tmp_path / "runs" / "mine"

    def run_sweep(*words):
        with pytest.raises(SystemExit) as caught:
            sweep.main(
                [
                    f"--config={config}",
                    "--imbalance=2",
                    "--name=mine",
                    "--seeds=1",
                    *words,
                ]
            )
        assert caught.value.code == 0
        return capsys.readouterr().out, stamps(folder / "results")

    output, first = run_sweep("--methods=ce,kd")
    assert len(first) == 2 and "2 runs, 1 teacher" in output
    assert len(list((tmp_path / "runs" / "teachers").glob("*/results.json"))) == 1
    _, extended = run_sweep("--methods=ce,kd,ltkd")
    assert len(extended) == 3 and first.items() <= extended.items()
    _, repeated = run_sweep("--methods=ltkd")
    assert repeated == extended
    page = (folder / "report.html").read_text()
    assert "ltkd" in page and ">kd<" not in page  # only what was asked for
