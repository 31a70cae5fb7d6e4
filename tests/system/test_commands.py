"""The command `experiments.main`: errors in one line; runs killed, stopped and out of disk, and resumed."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers.small_runs import ROOT, TINY, assert_same_bits, prepare_insects, tiny

from experiments import runtime
from ltkd_jax.training.checkpoint import Checkpoints

EPOCHS = {"train.epochs": 12.0}


def start(*words, **options):
    environment = {
        **os.environ,
        "LTKD_CACHE": os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache")),
    }
    command = [sys.executable, "-m", "experiments.main", *words]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        **options,
    }
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def start_run(folder, workdir):
    values = {**TINY, **EPOCHS, "teacher.dir": folder / "teachers"}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return start("--config=configs/digitslt.py:ltkd", f"--workdir={workdir}", *flags)


def finish(process):
    """Returns the output of a process that must succeed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output = finish(start_run(folder, folder / "run"))
    assert (folder / "run" / "report.html").exists() and "ltkd" in output
    return folder


def wait_until(condition, process, seconds=300):
    """Looks every millisecond, as long as the process lives."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def interrupt(undisturbed, workdir, number, condition, meanwhile=lambda: None):
    """Starts a run, sends it a signal once the condition holds, and returns its exit code and output.

    `meanwhile` is called before that, while the run is held.
    """
    process = start_run(undisturbed, workdir)
    wait_until(condition, process)
    process.send_signal(signal.SIGSTOP)
    meanwhile()
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def assert_finishes_the_same(undisturbed, workdir):
    """Runs the same command again and returns its output; what it leaves is bit for bit the undisturbed run's."""
    output = finish(start_run(undisturbed, workdir))
    assert_same_bits(tiny(undisturbed, **EPOCHS), workdir, undisturbed / "run")
    return output


def written_before(path, seconds):
    """Returns a condition: the file has been written since now, and that was so many seconds ago."""
    now = time.time()
    return lambda: path.exists() and now < path.stat().st_mtime < time.time() - seconds


def unfinished(workdir):
    """Returns checkpoints that have begun and are not whole."""
    steps = (workdir / "checkpoints").glob("step_*")
    return [
        path
        for path in steps
        if path.is_dir() and not path.with_suffix(".sha256").exists()
    ]


def test_killed_and_stopped(undisturbed, tmp_path):
    """SIGKILL while it saves and at random moments, then SIGTERM; the run ends bit for bit the same.

    While it lives, no other run enters its work directory.
    """
    workdir = tmp_path / "run"
    code, _ = interrupt(
        undisturbed, workdir, signal.SIGKILL, lambda: unfinished(workdir)
    )
    assert code == -signal.SIGKILL
    (half,) = unfinished(workdir)

    outputs = []
    for _ in range(3):
        wait = random.uniform(0, 2.5)
        print(f"killed {wait:.2f} s after it entered its work directory")
        moment = written_before(workdir / "config.json", wait)
        code, output = interrupt(undisturbed, workdir, signal.SIGKILL, moment)
        assert code == -signal.SIGKILL
        outputs.append(output)

    def start_another():
        process = start_run(undisturbed, workdir)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and "in use" in output and "--workdir" in output

    moment = written_before(workdir / "metrics.jsonl", 0)
    code, output = interrupt(
        undisturbed, workdir, signal.SIGTERM, moment, start_another
    )
    assert code == runtime.STOPPED == 75 and "stopped by SIGTERM at step" in output, (
        output
    )
    outputs += [output, assert_finishes_the_same(undisturbed, workdir)]
    assert sum(f"{half} is damaged or incomplete" in output for output in outputs) == 1


def test_full_disk(undisturbed, tmp_path):
    """No file may grow beyond 100 kB, in which the parameters have no place; with room the run continues."""
    workdir = tmp_path / "run"
    code, _ = interrupt(
        undisturbed,
        workdir,
        signal.SIGTERM,
        written_before(workdir / "metrics.jsonl", 0),
    )
    assert code == 75
    good, *_ = Checkpoints(workdir / "checkpoints").steps()
    process = start_run(undisturbed, workdir)
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)
    )
    output, _ = process.communicate(timeout=300)
    last = output.strip().splitlines()[-1]
    assert (
        process.returncode == 1
        and last.startswith("error: checkpoint ")
        and "File too large" in last
    ), output
    assert f"step {good}" in last and "Traceback" not in output
    assert Checkpoints(workdir / "checkpoints").steps()[0] == good and not unfinished(
        workdir
    )
    assert_finishes_the_same(undisturbed, workdir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group(tmp_path, number):
    """As a terminal and as a scheduler send it: the run saves, and none of its workers is left."""
    data_dir = prepare_insects(tmp_path)
    process = start(
        "--config=configs/folderlt.py:ce,name=insects,epochs=9000,student=resnet8,image_size=8,data.stream=True",
        "--config.data.num_workers=2",
        f"--config.data.dir={data_dir}",
        f"--workdir={tmp_path / 'run'}",
        start_new_session=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text(), process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "and saved" in output, output[-2000:]
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=configs/digitslt.py:ltkx"], "'ltkx'; did you mean 'ltkd'"),
        (["--config=configs/none.py"], "no config file 'configs/none.py'"),
        (["--config.train.lrr=3"], "--config.train.lrr=3; did you mean 'lr'?"),
        (
            ["--config.data.workers=3"],
            "'data.workers' is now called 'data.num_workers'",
        ),
        (["--config.data.imbalance=0.5"], "config.data.imbalance=0.5"),
        (["stray"], "'stray'"),
        (["--distributed=auto"], "distributed='auto'"),
    ],
)
def test_error_is_one_line(words, message):
    process = start(*words, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=300)
    lines = [
        line for line in errors.strip().splitlines() if not line.startswith("waiting")
    ]
    assert process.returncode == 1 and len(lines) == 1, errors
    assert lines[0].startswith("error: ") and message in lines[0]


def test_help():
    process = start("--helpshort")
    output, _ = process.communicate(timeout=300)
    assert "METHOD[,key=value…]" in output and "--workdir" in output
