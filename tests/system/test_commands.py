"""The command `experiments.main`: one-line errors, and interrupted runs that resume."""

import os
import pathlib
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
# Seconds; ample, so that only a process that hangs reaches it.
TIMEOUT = 300
STREAM_CONFIG = (
    "configs/folderlt.py:ce,name=insects,epochs=9000,student=resnet8,image_size=8,"
    "data.stream=True"
)


def start(*arguments, stderr=subprocess.STDOUT, variables=None, **options):
    """Starts `experiments.main`; its errors are part of its output by default."""
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "LTKD_CACHE": cache, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        **options,
    )


def start_run(folder, workdir):
    """Starts a run that shares its teacher with the other runs of the folder."""
    values = {**TINY, **EPOCHS, "teacher.dir": folder / "teachers"}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return start("--config=configs/digitslt.py:ltkd", f"--workdir={workdir}", *flags)


def finish(process):
    """Returns the output of a process that must succeed."""
    output, _ = process.communicate(timeout=2 * TIMEOUT)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the folder of a run that was not interrupted, and of its teacher."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = finish(start_run(folder, folder / "run"))
    assert (folder / "run" / "report.html").exists()
    assert "ltkd" in output
    return folder


def wait_until(condition, process):
    """Waits until the condition holds, or the process has ended.

    It checks every millisecond, so that a signal can be sent in the middle of a save.
    """
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.001)


def interrupt(folder, workdir, signum, condition, while_paused=lambda: None):
    """Starts a run and sends it a signal once a condition holds.

    The run is paused before the signal, and `while_paused` is called then.

    Returns:
      The run's exit code and its output.
    """
    process = start_run(folder, workdir)
    wait_until(condition, process)
    # Paused, the run cannot finish what the condition has noticed before the signal.
    process.send_signal(signal.SIGSTOP)
    while_paused()
    process.send_signal(signum)
    # A stopped process acts on SIGTERM only once it continues.
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def resume(folder, workdir):
    """Finishes a run by the same command, and returns its output.

    Checks that it ends bit for bit as the uninterrupted run did.
    """
    output = finish(start_run(folder, workdir))
    assert_same_bits(tiny(folder, **EPOCHS), workdir, folder / "run")
    return output


def written_since_now(path, age):
    """Returns a condition: the file was written after this call, `age` seconds ago."""
    start_time = time.time()

    def condition():
        if not path.exists():
            return False
        written = path.stat().st_mtime
        return start_time < written < time.time() - age

    return condition


def incomplete_checkpoints(workdir):
    """Returns the folders of checkpoints whose checksum is not written yet."""
    steps = (workdir / "checkpoints").glob("step_*")
    return [
        path
        for path in steps
        if path.is_dir() and not path.with_suffix(".sha256").exists()
    ]


def test_killed_and_stopped(uninterrupted, tmp_path):
    """Sends SIGKILL while a run saves and at random moments, and finally SIGTERM.

    While it lives, no other run can use its work directory.
    """
    workdir = tmp_path / "run"
    code, _ = interrupt(
        uninterrupted, workdir, signal.SIGKILL, lambda: incomplete_checkpoints(workdir)
    )
    assert code == -signal.SIGKILL
    (incomplete,) = incomplete_checkpoints(workdir)

    outputs = []
    for _ in range(3):
        delay = random.uniform(0, 2.5)
        # pytest shows it if the test fails, so that the failure can be reproduced.
        print(f"killed {delay:.2f} s after it wrote its config")
        condition = written_since_now(workdir / "config.json", delay)
        code, output = interrupt(uninterrupted, workdir, signal.SIGKILL, condition)
        assert code == -signal.SIGKILL
        outputs.append(output)

    def start_second_run():
        process = start_run(uninterrupted, workdir)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 1
        assert "in use" in output
        assert "--workdir" in output

    condition = written_since_now(workdir / "metrics.jsonl", 0)
    code, output = interrupt(
        uninterrupted, workdir, signal.SIGTERM, condition, start_second_run
    )
    assert code == runtime.STOPPED == 75
    assert "stopped by SIGTERM at step" in output, output
    outputs += [output, resume(uninterrupted, workdir)]
    # The run that resumes first reports the incomplete checkpoint and removes it.
    message = f"{incomplete} is damaged or incomplete"
    assert sum(message in output for output in outputs) == 1


def test_full_disk(uninterrupted, tmp_path):
    """Limits files to 100 kB, too few for the parameters, and resumes without limit."""
    workdir = tmp_path / "run"
    condition = written_since_now(workdir / "metrics.jsonl", 0)
    code, _ = interrupt(uninterrupted, workdir, signal.SIGTERM, condition)
    assert code == 75
    checkpoints = Checkpoints(workdir / "checkpoints")
    last_step, *_ = checkpoints.steps()

    process = start_run(uninterrupted, workdir)
    # A write beyond the limit fails much as on a full disk. It is set from outside:
    # `preexec_fn` is not safe in a process with threads, and jax has started some.
    limits = (100_000, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    output, _ = process.communicate(timeout=TIMEOUT)
    last_line = output.strip().splitlines()[-1]
    assert process.returncode == 1, output
    assert last_line.startswith("error: checkpoint "), output
    assert "File too large" in last_line, output
    assert f"step {last_step}" in last_line
    assert "Traceback" not in output
    assert checkpoints.steps()[0] == last_step
    assert not incomplete_checkpoints(workdir)
    resume(uninterrupted, workdir)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_process_group(tmp_path, signum):
    """Signals a run with its workers: the run saves, and no worker is left.

    Terminals and schedulers send signals in this way.
    """
    data_dir = prepare_insects(tmp_path)
    # A session of its own, so that the signal does not reach pytest.
    process = start(
        f"--config={STREAM_CONFIG}",
        "--config.data.num_workers=2",
        f"--config.data.dir={data_dir}",
        f"--workdir={tmp_path / 'run'}",
        start_new_session=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text(), process)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, output[-2000:]
    assert "and saved" in output, output[-2000:]
    # Signal 0 only asks whether the group still has a process. The workers may end up
    # to a minute after the run.
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_killed_worker(tmp_path):
    """Kills a run's workers: one line, and the same command would resume the run."""
    process = start(
        f"--config={STREAM_CONFIG}",
        "--config.data.num_workers=2",
        f"--config.data.dir={prepare_insects(tmp_path)}",
        f"--workdir={tmp_path / 'run'}",
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text(), process)
    children = []
    for path in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"):
        children += path.read_text().split()
    for child in children:
        if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, errors[-2000:]
    assert "Traceback" not in errors, errors[-2000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "SIGKILL" in line and "num_workers" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/digitslt.py:ltkx"], "'ltkx'; did you mean 'ltkd'"),
        (["--config=configs/none.py"], "no config file 'configs/none.py'"),
        (["--config.train.lrr=3"], "'train.lrr'; did you mean 'train.lr'?"),
        (
            ["--config.data.workers=3"],
            "'data.workers' is now called 'data.num_workers'",
        ),
        (["--config.data.imbalance=0.5"], "config.data.imbalance=0.5"),
        (["stray"], "'stray'"),
        (["--workdir=~nobody-here/x"], "'~nobody-here/x'"),
        (["--config=~nobody-here/x.py"], "'~nobody-here/x.py'"),
        (["--distributed=auto"], "distributed='auto'"),
    ],
)
def test_error_is_one_line(arguments, message):
    process = start(*arguments, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=TIMEOUT)
    lines = errors.strip().splitlines()
    # With --distributed, the process first says that it waits for the others.
    lines = [line for line in lines if not line.startswith("waiting")]
    assert process.returncode == 1, errors
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_print_config():
    process = start(
        "--config=configs/digitslt.py:ltkd,alpha=2",
        "--config.train.lr=0.3",
        "--print_config",
    )
    lines = finish(process).splitlines()
    assert {"method.alpha=2.0", "train.lr=0.3", "data.name=digits"} <= set(lines)


def test_numbers_do_not_depend_on_the_environment(tmp_path):
    """Variables of jax that change random numbers or precision change no result."""
    variables = {
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "7",
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
    }
    for name, environment in (("default", {}), ("changed", variables)):
        flags = [f"--config.{key}={value}" for key, value in TINY.items()]
        workdir = tmp_path / name / "run"
        flags.append(f"--config.teacher.dir={tmp_path / name / 'teachers'}")
        flags.append(f"--workdir={workdir}")
        finish(
            start("--config=configs/digitslt.py:ltkd", *flags, variables=environment)
        )
    config = tiny(tmp_path / "default")
    assert_same_bits(config, tmp_path / "changed" / "run", tmp_path / "default" / "run")


def test_help():
    process = start("--helpshort")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert "METHOD[,key=value…]" in output
    assert "--workdir" in output
