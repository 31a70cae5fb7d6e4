"""Two processes with four devices each, over loopback, are one process with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import small_runs
from helpers.process_pair import STEPS, TRAININGS
from helpers.small_net import CASES, Training, assert_close, parameters
from helpers.small_runs import ROOT

from ltkd_jax.data import streaming
from ltkd_jax.training import hosts
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.parallel import Parallel

BATCH = small_runs.STREAMED["train.batch_size"]


def start(words, devices):
    """Starts a process with so many virtual devices."""
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    environment = {
        **os.environ,
        "LTKD_CACHE": cache,
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    environment |= {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start_pair(words):
    """Starts two processes of four devices each, by `words(HOST:PORT,INDEX,2)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(words(f"{where},{index},2"), 4) for index in range(2)]


def wait(processes):
    """Returns exit codes and outputs; the time is bounded."""
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def finish(processes, codes=None):
    """Waits for processes that must end with these codes, by default 0; returns their outputs."""
    actual, outputs = wait(processes)
    assert actual == (codes or [0] * len(processes)), "\n".join(outputs)
    return outputs


def trained_alone(case, num_steps):
    """Returns what one process with eight devices computes."""
    with jax.enable_x64(True):
        return Training(parallel=Parallel("jit"), **CASES[case]).run(num_steps)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes leave in a folder."""
    folder = tmp_path_factory.mktemp("pair")
    Checkpoints(folder / "of_one").save(
        STEPS // 2, trained_alone("ltkd", STEPS // 2), {}
    )
    small_runs.prepare_insects(folder)
    finish(start_pair(lambda where: ["-m", "helpers.process_pair", where, str(folder)]))
    return folder


@pytest.mark.parametrize("case", ["ltkd", "one virtual step"])
def test_trainings_of_two_processes(case, pair):
    """To 1e-9 in float64; "resumed" is from a checkpoint that one process left after half of the steps."""
    expected = trained_alone(case, STEPS)
    names = [name for name, (of_case, _) in TRAININGS.items() if of_case == case]
    for name in names + ["resumed"] * (case == "ltkd"):
        with jax.enable_x64(True):
            step, state, _ = Checkpoints(pair / name).restore(
                jax.eval_shape(lambda: expected)
            )
        assert step == state.step == STEPS
        assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)


def test_each_process_reads_its_part(pair):
    notes = [
        json.loads((pair / f"read_{index}.json").read_text()) for index in range(2)
    ]
    order = streaming.Order(seed=3, num_examples=notes[0]["train"], batch_size=BATCH)
    for index, read in enumerate(notes):
        positions = [
            BATCH * step + i
            for step in range(2)
            for i in range(8 * index, 8 * index + 8)
        ]
        assert sorted(read["random_crop"]) == sorted(map(order.index, positions))
        assert read["counted"] == [5] * len(
            small_runs.INSECTS
        )  # each test image once, the last batch filled up
    assert (
        len(set(notes[0]["image"]) & set(notes[1]["image"])) <= 1
    )  # which fills the last batch up


def test_one_process_alone():
    assert hosts.is_primary() and hosts.all_gather("x") == ["x"]
    assert hosts.run_on_primary(lambda: 1) == hosts.run_on_all(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        hosts.run_on_all(lambda: 1 // 0)


@pytest.mark.parametrize(
    "where", ["", "10.0.0.1:99", "here,0,2", "10.0.0.1:99,2,2", "10.0.0.1:99,a,2"]
)
def test_bad_address(where):
    with pytest.raises(ValueError, match="HOST:PORT,INDEX,COUNT"):
        hosts.start(where)


# The program. Each process has folders of its own, as hosts without a common disk have.


def program(argument, folder, distributed=None, **values):
    """Returns the words of a run's command."""
    index = distributed.split(",")[1] if distributed else "0"
    values["teacher.dir"] = folder / f"teachers{index}"
    words = [
        "-m",
        "experiments.main",
        f"--config=configs/{argument}",
        f"--workdir={folder / f'run{index}'}",
    ]
    words += [f"--config.{key}={value}" for key, value in values.items()]
    return words + ([f"--distributed={distributed}"] if distributed else [])


def digits(method, folder, distributed=None, **values):
    return program(
        f"digitslt.py:{method}", folder, distributed, **{**small_runs.TINY, **values}
    )


def records(folder):
    lines = [
        json.loads(line)
        for line in (folder / "run0" / "metrics.jsonl").read_text().splitlines()
    ]
    return [line["step"] for line in lines], [
        [line["loss"], *line["terms"].values()] for line in lines
    ]


def assert_same_run(folder, expected_folder):
    """Checks as far as float32 allows it over few steps: a sum over two processes is rounded in another order."""
    steps, losses = records(folder)
    expected_steps, expected_losses = records(expected_folder)
    assert steps == expected_steps
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "method, values",
    [
        (
            "bikd,terms=ltkd,outer_loss=mix",
            {"teacher.table": "always", "data.outer_per_class": 8},
        ),
        ("reviewkd", {}),
    ],
)
def test_program(method, values, tmp_path):
    """Teacher and its tables included; only the first process writes."""
    values |= {"train.epochs": 1.0, "teacher.train.epochs": 1.0}
    finish([start(digits(method, tmp_path / "one", **values), 8)])
    outputs = finish(
        start_pair(lambda where: digits(method, tmp_path / "two", where, **values))
    )
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "run0",
        "teachers0",
    ]
    assert "classifies" in outputs[0] and "classifies" not in outputs[1]


def test_stream_with_mixup(tmp_path):
    """An image may be mixed with one that another process reads."""
    values = {**small_runs.STREAMED, "data.dir": small_runs.prepare_insects(tmp_path)}
    argument = "folderlt.py:ce,name=insects,mixup=0.2"
    finish([start(program(argument, tmp_path / "one", **values), 8)])
    finish(
        start_pair(lambda where: program(argument, tmp_path / "two", where, **values))
    )
    assert_same_run(tmp_path / "two", tmp_path / "one")


def last_step(folder):
    """Returns the step of the last whole record; 0 if there is none."""
    path = folder / "run0" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_record(folder, processes, after=0):
    """Waits until a run has written a record of a later step."""
    deadline = time.monotonic() + 300
    while last_step(folder) <= after and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    assert last_step(folder) > after


def test_interrupted_pair(tmp_path):
    """One of two is killed, one of the next two gets a signal, and one process with eight devices finishes the run.

    The process that is left ends by its missing heartbeat; the signal makes both save at the same step.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    values = {"train.epochs": 6.0, "teacher.train.epochs": 1.0}
    finish([start(digits("ltkd", one, **values), 8)])

    def start_two():
        return start_pair(lambda where: digits("ltkd", two, where, **values))

    processes = start_two()
    wait_for_record(two, processes)
    processes[1].kill()
    codes, outputs = wait(processes)
    assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL, "\n".join(outputs)

    killed_at = last_step(two)
    processes = start_two()
    wait_for_record(two, processes, after=killed_at)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, codes=[75, 75])
    assert all("stopped by SIGTERM at step" in output for output in outputs), "\n".join(
        outputs
    )
    finish([start(digits("ltkd", two, **values), 8)])
    assert_same_run(two, one)
