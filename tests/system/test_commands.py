"""The command line: help, errors in one line, runs killed and resumed, the smoke run on real data."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers.small_runs import ROOT, TINY, parameters

from experiments import runtime
from experiments.reporting import load
from ltkd_jax.training.checkpoint import Checkpoints


def command(tmp_path, workdir, *extra):
    values = {**TINY, "teacher.cache": str(tmp_path / "teachers"), "train.epochs": 12.0, **dict(extra)}
    return [
        sys.executable, "-m", "experiments.main", "--config=configs/digitslt.py:ltkd", f"--workdir={workdir}",
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


def wait_until(condition, process, seconds=120):
    """Looks every millisecond; a process that has ended is waited for no longer."""
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)


def interrupted(undisturbed, workdir, number, condition, meanwhile=lambda: None):
    """Starts a run, sends it a signal once the condition holds, and returns its exit code and output.

    `meanwhile` is called before that, while the run is held.
    """
    process = start(command(undisturbed, workdir))
    wait_until(condition, process)
    process.send_signal(signal.SIGSTOP)
    meanwhile()
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def finished_as(undisturbed, workdir):
    """The output of the same command again; what it leaves is bit for bit that of a run that nothing befell."""
    process = start(command(undisturbed, workdir))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "run" / "metrics.jsonl").read_text()
    assert parameters(workdir) == parameters(undisturbed / "run")
    return output


def this_long_after(path, seconds):
    """A condition: the file has been written since now, and that was so many seconds ago."""
    now = time.time()
    return lambda: path.exists() and now < path.stat().st_mtime < time.time() - seconds


def halves(workdir):
    """Checkpoints that have begun and are not whole."""
    return [p for p in (workdir / "checkpoints").glob("step_*") if p.is_dir() and not p.with_suffix(".sha256").exists()]


def test_killed_while_it_saves_and_at_a_random_moment_and_stopped_it_ends_the_same(undisturbed, tmp_path):
    """SIGKILL twice and SIGTERM once; then parameters and metrics are bit for bit those of a run that nothing befell.

    While it lives, no other run enters its work directory.
    """
    workdir, outputs, others = tmp_path / "run", [], []
    code, _ = interrupted(undisturbed, workdir, signal.SIGKILL, lambda: halves(workdir))
    assert code == -signal.SIGKILL
    (half,) = halves(workdir)

    wait = random.uniform(0, 2.5)
    print(f"killed {wait:.2f} s after it entered its work directory")
    moment = this_long_after(workdir / "config.json", wait)
    code, output = interrupted(undisturbed, workdir, signal.SIGKILL, moment)
    assert code == -signal.SIGKILL
    outputs.append(output)

    def another():
        others.append(subprocess.run(command(undisturbed, workdir), cwd=ROOT, capture_output=True, text=True))

    moment = this_long_after(workdir / "metrics.jsonl", 0)
    code, output = interrupted(undisturbed, workdir, signal.SIGTERM, moment, another)
    assert code == 75 and "stopped by SIGTERM at step" in output and "goes on from there" in output, output
    assert others[0].returncode == 1 and "is in use by another run: wait for it, or give --workdir" in others[0].stderr
    outputs.append(output)

    outputs.append(finished_as(undisturbed, workdir))
    assert sum(f"{half} is damaged or incomplete" in output for output in outputs) == 1


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(undisturbed, tmp_path):
    """At random moments of a run's life: while it starts, restores, compiles, trains and saves."""
    kills, trial, workdir = 0, 0, tmp_path / "0"
    while kills < 20:
        moment = this_long_after(workdir / "config.json", random.uniform(0, 12))
        code, output = interrupted(undisturbed, workdir, signal.SIGKILL, moment)
        assert code in (-signal.SIGKILL, 0), output
        kills += code == -signal.SIGKILL
        if code == 0 or kills == 20:
            finished_as(undisturbed, workdir)
            trial, workdir = trial + 1, tmp_path / str(trial + 1)
    print(f"{kills} kills, {trial} runs")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_nothing_is_lost(undisturbed, tmp_path):
    """No file may grow beyond 100 kB, in which the parameters have no place."""
    workdir = tmp_path / "run"
    code, _ = interrupted(undisturbed, workdir, signal.SIGTERM, this_long_after(workdir / "metrics.jsonl", 0))
    assert code == 75
    (good, *_) = Checkpoints(workdir / "checkpoints").steps()
    process = start(command(undisturbed, workdir))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=300)
    last = output.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith("error: checkpoint ") and "File too large" in last, output
    assert "Traceback" not in output
    assert f"the last whole one is of step {good}: mend that, such as by room on the disk" in last
    assert Checkpoints(workdir / "checkpoints").steps()[0] == good and not halves(workdir)
    finished_as(undisturbed, workdir)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=configs/digitslt.py:ltkx"], "error: unknown method 'ltkx'; did you mean 'ltkd'"),
        (["--config.train.lrr=3"], "error: the config has no such key: --config.train.lrr=3; did you mean 'lr'?"),
        (["--config.data.name.x=3"], "error: the config has no such key: --config.data.name.x=3; configs/common.py"),
        (["--config=configs/none.py"], "error: [Errno 2] No such file or directory: 'configs/none.py'"),
        (["--config.data.imbalance=0.5"], "error: config.data.imbalance=0.5 must be at least 1"),
        (["stray"], "error: unexpected argument 'stray'"),
        (["--config.platform=gpu"], "error: config.platform='gpu' but jax finds"),
        (["--distributed=auto"], "error: distributed='auto': jax recognises no cluster here"),
    ],
)
def test_errors_of_the_command_line_are_one_line(words, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main", *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("meeting")]
    assert len(lines) == 1, done.stderr


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
    results = load.load(tmp_path / "run")
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
    assert runtime.command_line("m", words) == "python -m m --config=a.py:kd,x=1 --config.seed=3"
