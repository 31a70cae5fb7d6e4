"""The command line: help, errors in one line, runs killed and resumed, the smoke run on real data."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from small import ROOT, TINY, parameters

from experiments import report, setup


def command(tmp_path, workdir, *extra):
    values = {**TINY, "teacher.cache": str(tmp_path / "teachers"), "train.epochs": 12.0, **dict(extra)}
    return [
        sys.executable, "-m", "experiments.main", "--config=configs/digits_lt.py:ltkd", f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]  # fmt: skip


def start(words):
    environment = {**os.environ, "LTKD_CACHE": os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(command(folder, folder / "run"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (folder / "run" / "report.html").exists() and "ltkd" in output
    return folder


def interrupted(undisturbed, workdir, number, wait, deaths=1):
    """Starts a run and sends it a signal once training has begun and `wait` seconds have passed; then finishes it."""
    exits = []
    for _ in range(deaths):
        process = start(command(undisturbed, workdir))
        until = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        exits.append((process.returncode, output))
    last = start(command(undisturbed, workdir))
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "run" / "metrics.jsonl").read_text()
    assert parameters(workdir) == parameters(undisturbed / "run")
    return exits


def test_killed_at_a_random_moment_and_resumed_it_ends_the_same(undisturbed, tmp_path):
    """SIGKILL; parameters and metrics bit for bit those of a run that was not killed."""
    wait = random.uniform(0, 4)
    print(f"killed {wait:.2f} s after the start")
    ((code, _),) = interrupted(undisturbed, tmp_path / "run", signal.SIGKILL, wait)
    assert code in (-signal.SIGKILL, 0)


def test_sigterm_saves_and_exits(undisturbed, tmp_path):
    ((code, output),) = interrupted(undisturbed, tmp_path / "run", signal.SIGTERM, 0.2)
    assert code == 75 and "stopped by SIGTERM at step" in output and "goes on from there" in output, output


@pytest.mark.slow
def test_killed_many_times_it_ends_the_same(undisturbed, tmp_path):
    for trial in range(4):
        interrupted(undisturbed, tmp_path / str(trial), signal.SIGKILL, random.uniform(0, 5), deaths=2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=configs/digits_lt.py:ltkx"], "error: unknown method 'ltkx'; did you mean 'ltkd'"),
        (["--config.data.foo=3"], "error: no key 'foo' in the config"),
        (["--config=configs/none.py"], "error: [Errno 2] No such file or directory: 'configs/none.py'"),
        (["--config.data.imbalance=0.5"], "error: config.data.imbalance=0.5 must be at least 1"),
        (["stray"], "error: unexpected argument 'stray'"),
    ],
)
def test_errors_of_the_command_line_are_one_line(words, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main", *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_says_how():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "METHOD[,key=value…]" in done.stdout and "--workdir" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument, train, meta", [("ltkd", 10_847, None), ("bikd", 10_626, 1000), ("bikd,terms=ltkd", 10_626, 1000)]
)
def test_smoke_on_the_real_cifar100(argument, train, meta, cifar100_dir, tmp_path):
    """The whole path on the real data, in under three minutes on two cores; BiKD's by its own recipe."""
    words = [sys.executable, "-m", "experiments.main", f"--config=configs/cifar100lt.py:{argument},smoke"]
    words += [f"--config.data.dir={cifar100_dir}", f"--workdir={tmp_path / 'run'}"]
    begun = time.monotonic()
    done = subprocess.run([*words, f"--config.teacher.cache={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 180
    results = report.load(tmp_path / "run")
    assert results["train_images"] == train and results["teacher"]["model"] == "resnet14"
    assert results.get("meta_images") == meta and (meta is None) == ("weighting" not in results)


def test_the_recorded_command_repeats_the_run_on_another_machine():
    words = [
        "--config=a.py:kd,x=1",
        "--config.data.dir",
        "/x",
        "-config.data.dir=/y",
        "--config.seed=3",
        "--config.data.dir=/z",
    ]
    assert setup.command_line("m", words) == "python -m m --config=a.py:kd,x=1 --config.seed=3"
