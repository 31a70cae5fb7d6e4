"""Queue files, the order of a queue's runs, and its workers; no run is trained."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from experiments import reproduce
from experiments.config.validation import ConfigError
from experiments.jobs import queue_runner, workers
from experiments.jobs.queue_entry import QueueEntry, read_queue
from experiments.trainer import run
from experiments.trainer.interrupts import StoppedError, StopRequest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = "configs/digitslt.py"
VALIDATION = {"data.validation_per_class": 1}


def queue_file(tmp_path, *runs):
    path = tmp_path / "queue.json"
    path.write_text(json.dumps({"about": "a test", "set": {}, "runs": runs}))
    return str(path)


def results_in(tmp_path):
    return queue_runner.Results(tmp_path / "r")


def queue_of(tmp_path, *runs):
    entries = read_queue(queue_file(tmp_path, *runs))
    return queue_runner.Queue(entries, results_in(tmp_path), tmp_path)


def exit_status(tmp_path, *arguments):
    folders = [f"--results={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}"]
    with pytest.raises(SystemExit) as error:
        reproduce.main([*arguments, *folders])
    return error.value.code


@pytest.fixture
def fake_run(monkeypatch):
    """Returns a function that replaces training by a function of the specification."""

    def replace_by(result_of):
        monkeypatch.setattr(run, "run", lambda spec, workdir, **_: result_of(spec))
        monkeypatch.setattr(run, "check", lambda spec, **_: None)

    return replace_by


@pytest.mark.parametrize("option", ["--results", "--runs"])
def test_folder_that_cannot_be_made(option, tmp_path, fake_run):
    """It is an error before the first run."""
    path = queue_file(tmp_path, {"config": "configs/digitslt.py:ce"})
    (tmp_path / "file").touch()
    folders = {"--results": tmp_path / "results", "--runs": tmp_path / "runs"}
    folders[option] = tmp_path / "file" / "x"
    flags = [f"{flag}={folder}" for flag, folder in folders.items()]
    with pytest.raises(SystemExit, match=f"cannot be made.*give another {option}"):
        reproduce.main([str(path), *flags])


def test_project_queues(tmp_path):
    for path in sorted((ROOT / "experiments" / "queues").glob("*.json")):
        entries = read_queue(path)
        queue_runner.Queue(entries, results_in(tmp_path), tmp_path)
        specs = {entry: entry.resolve() for entry in entries if not entry.best_of}
        assert len({spec.hash for spec in specs.values()}) == len(specs), path
        for group in {entry.best_of for entry in entries} - {None}:
            search = [spec for entry, spec in specs.items() if entry.group == group]
            assert 0 < len(search) <= 12
            assert len({spec.teacher_hash for spec in search}) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read the queue"),
        (
            '{"runs": [{"config": "configs/digitslt.py", "sets": {}}]}',
            "unknown key 'sets'",
        ),
        (
            '{"runs": [{"config": "configs/digitslt.py", "set": 3}]}',
            "cannot read the queue",
        ),
        ('{"runs": [{"seeds": [0]}]}', "lacks the key 'config'"),
        (
            '{"runs": [{"config": "configs/digitslt.py", "best_of": "x"}]}',
            "no run's group",
        ),
        (
            '{"runs": [{"config": "configs/x.py", "group": "x", "best_of": "x"}]}',
            "group 'x'",
        ),
        ('{"runs": [{"config": 3}]}', "must be configs/"),
        ('{"runs": [{"config": "README.md"}]}', "must be configs/"),
        ('{"runs": [{"config": "configs/none.py"}]}', "no config file"),
        ('{"runs": [{"config": "configs/digits_lt.py"}]}', "configs/digitslt.py"),
        (
            '{"runs": [{"config": "configs/digitslt.py", "set": {"train.lrr": 1}}]}',
            'configs/digitslt.py with {"train.lrr": 1}: the config has no key '
            "'train.lrr'; did you mean 'train.lr'",
        ),
        (
            '{"runs": [{"config": "configs/digitslt.py"}], "set": {"seed_split": 1}}',
            "'seed_split' is now called 'split_seed'",
        ),
        (
            '{"runs": [{"config": "configs/digitslt.py", "set": {"train.lr": "x"}}]}',
            'configs/digitslt.py with {"train.lr": "x"}: ',
        ),
    ],
)
def test_bad_queue(tmp_path, content, message):
    path = tmp_path / "queue.json"
    path.write_text(content)
    assert message in str(exit_status(tmp_path, str(path)))


def test_configs_are_checked_before_the_first_run(tmp_path, monkeypatch):
    """All that cannot run are named, and a run that would wait is checked, too."""
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("a run was started"))
    queue = queue_of(
        tmp_path,
        {"config": f"{DIGITS}:ce", "set": VALIDATION, "group": "g", "seeds": [0, 1]},
        {"config": f"{DIGITS}:ce,imbalance=500", "seeds": [0, 1]},
        {"config": f"{DIGITS}:kd,imbalance=500"},
        {
            "config": f"{DIGITS}:bikd",
            "set": {"data.outer_per_class": 80},
            "best_of": "g",
        },
    )
    with pytest.raises(ConfigError) as error:
        queue.check(devices=True)
    first, *problems = str(error.value).splitlines()
    assert first == "no run was started, since some cannot run:"
    assert [line.split()[0] for line in problems] == [
        f"{DIGITS}:ce,imbalance=500",
        f"{DIGITS}:bikd",
    ]
    assert "(and 1 more): " in problems[0]
    assert "imbalance of at most 100" in problems[0]
    assert "such as outer_per_class=8 and validation_per_class=0" in problems[1]


def test_best_of_overridden_by_entry():
    entry = QueueEntry(f"{DIGITS}:ltkd", {"method.beta": 0.0}, 7, None, "search")
    best_method = {"name": "ltkd", "alpha": 4.0, "beta": 2.0}
    spec = entry.resolve({"config": {"method": best_method}})
    method = spec.config["method"]
    assert (method["alpha"], method["beta"], spec.seed) == (4.0, 0.0, 7)
    words = entry.command(spec).split()
    assert "--config.method.alpha=4.0" in words
    assert "--config.method.beta=0.0" in words
    assert "--config.seed=7" in words


def test_best_of_sets_learned_weights():
    best = {
        "config": {
            "method": {"name": "kd", "temperature": 2.0},
            "loss_weighting": {"name": "bilevel", "lr": 0.01},
        }
    }
    entry = QueueEntry(f"{DIGITS}:bikd,terms=ltkd", {}, seed=1, best_of="search")
    spec = entry.resolve(best)
    assert (spec.config["method"]["temperature"], spec.loss_weighting.lr) == (2.0, 0.01)
    assert "--config.loss_weighting.lr=0.01" in entry.command(spec).split()
    static = QueueEntry(f"{DIGITS}:kd", {}, seed=1, best_of="search").resolve(best)
    assert static.loss_weighting is None
    assert static.config["method"]["temperature"] == 2.0


def test_best_of_needs_validation(tmp_path):
    """Found before the first run, in every run of the group."""
    runs = [
        {"config": DIGITS, "set": VALIDATION, "group": "g"},
        {"config": f"{DIGITS}:kd", "group": "g"},
        {"config": DIGITS, "best_of": "g", "seeds": [1]},
    ]
    message = f"^{DIGITS}:kd of group 'g': data.validation_per_class=0.*at least 1$"
    with pytest.raises(ConfigError, match=message):
        queue_of(tmp_path, *runs)
    runs[1]["set"] = VALIDATION
    queue = queue_of(tmp_path, *runs)
    *_, waiting = queue.missing()
    assert not queue.run(waiting, StopRequest())


def test_table_runs_are_counted(tmp_path):
    """Only runs that can read the table count: cross-entropy has no teacher."""
    queue = queue_of(
        tmp_path,
        {"config": f"{DIGITS}:kd", "seeds": [0, 1]},
        {"config": f"{DIGITS}:ce"},
    )
    for entry in queue.missing():
        assert queue.spec(entry).config["teacher"]["table_runs"] == 2


def test_changed_value_is_a_new_run(tmp_path, capsys):
    for values in ({}, {"train.weight_decay": 1e-3}):
        queue = queue_of(tmp_path, {"config": f"{DIGITS}:ce", "set": values})
        (entry,) = queue.missing()
        results_in(tmp_path).add(queue.spec(entry), {}, None)
        assert not queue.missing()
    assert len(list((tmp_path / "r").glob("*.json"))) == 2
    path = queue_file(tmp_path, {"config": f"{DIGITS}:ce"})
    assert exit_status(tmp_path, path, "--list") == 0
    assert capsys.readouterr().out.startswith(f"{DIGITS}:ce seed=0")


def test_runs_in_use_are_skipped_and_continued(tmp_path, fake_run):
    """At first, another process has begun all of them.

    It finishes the run of seed 0 and gives up the others.
    """
    queue = queue_of(tmp_path, {"config": f"{DIGITS}:ce", "seeds": [0, 1, 2]})
    results = results_in(tmp_path)
    attempts = []

    def result(spec):
        attempts.append(spec.seed)
        if len(attempts) == 3:
            results.add(queue.spec(queue.missing()[0]), {"by": "another"}, None)
        if attempts.count(spec.seed) == 1:
            raise run.InUseError("in use")
        return {"by": "this"}

    fake_run(result)
    assert queue_runner.run_missing(queue, StopRequest(), poll_seconds=0.0) == 0
    assert attempts == [0, 1, 2, 1, 2]
    assert [result["by"] for result in queue.results()] == ["another", "this", "this"]


@pytest.mark.parametrize("options, status", [([], 75), (["--time_limit=1e-9"], 0)])
def test_exit_status_of_a_stopped_queue(tmp_path, fake_run, options, status):
    def stopped(spec):
        signal.raise_signal(signal.SIGTERM)
        raise StoppedError("stopped by SIGTERM")

    fake_run(stopped)
    path = queue_file(tmp_path, {"config": f"{DIGITS}:ce"})
    assert exit_status(tmp_path, path, *options) == status


def test_signal_in_last_step_stops_the_queue(tmp_path, fake_run):
    def signalled(spec):
        signal.raise_signal(signal.SIGTERM)
        return {"seed": spec.seed}

    fake_run(signalled)
    queue = queue_of(tmp_path, {"config": f"{DIGITS}:ce", "seeds": [0, 1]})
    stop = StopRequest()
    with stop.listening():
        assert queue_runner.run_missing(queue, stop) == 0
    assert stop.signal == signal.SIGTERM
    assert [result["seed"] for result in queue.results()] == [0]


def test_run_that_waits_for_a_failed_group(tmp_path, capsys, fake_run):
    def failed(spec):
        raise ConfigError("no such thing")

    fake_run(failed)
    runs = (
        {"config": DIGITS, "set": VALIDATION, "group": "search"},
        {"config": DIGITS, "best_of": "search"},
    )
    assert exit_status(tmp_path, queue_file(tmp_path, *runs)) == 1
    errors = capsys.readouterr().err
    assert "no such thing" in errors and "'search'" in errors


def test_worker_devices():
    gpus = workers.Machine("gpu", 2)
    assert gpus.environment(1, {"A": "b"}) == {"A": "b", "CUDA_VISIBLE_DEVICES": "1"}
    environment = gpus.environment(1, {"CUDA_VISIBLE_DEVICES": "4,6"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"
    tpus = workers.Machine("tpu", 4)
    environments = [tpus.environment(slot, {}) for slot in range(4)]
    for name in (
        "TPU_VISIBLE_DEVICES",
        "TPU_MESH_CONTROLLER_PORT",
        "TPU_MESH_CONTROLLER_ADDRESS",
    ):
        assert len({environment[name] for environment in environments}) == 4


@pytest.mark.parametrize(
    "action, failed", [("time.sleep(60)", 0), ("sys.exit(75)", 0), ("sys.exit(3)", 2)]
)
def test_workers_end(tmp_path, action, failed):
    """A signal is passed on to the workers; one that it ends counts as no failure."""
    code = f"import sys, time; print('up', flush=True); {action}"
    handler = signal.getsignal(signal.SIGTERM)

    def stop_when_up():
        logs = [tmp_path / f"device-{slot}.log" for slot in range(2)]
        while not all(log.exists() and "up" in log.read_text() for log in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if "sleep" in action:
        threading.Thread(target=stop_when_up, daemon=True).start()
    command = [sys.executable, "-c", code]
    machine = workers.Machine("cpu", 2)
    num_failed = workers.run(command, machine, 2, tmp_path, lambda: 1, StopRequest())
    assert num_failed == failed
    assert signal.getsignal(signal.SIGTERM) is handler


def test_too_many_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "count_devices", lambda: workers.Machine("cpu", 2))
    message = exit_status(tmp_path, queue_file(tmp_path), "--num_workers=3")
    assert "--num_workers=3" in message and message.endswith("2")
