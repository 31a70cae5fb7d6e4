"""Two processes of four devices each, over loopback, agree with one of eight."""

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


def start(arguments, num_devices):
    """Starts Python with virtual devices and the compilation cache of the tests."""
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    # The processes import the checkout and the helpers, as pytest's `pythonpath` does.
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "LTKD_CACHE": cache,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start_single(arguments):
    """Starts one process with eight devices."""
    return start(arguments, 8)


def start_pair(arguments_fn):
    """Starts two processes of four devices each.

    Args:
      arguments_fn: the command's arguments as a function of "HOST:PORT,INDEX,2".
    """
    # The system chooses a free port. It is closed again, so that jax can bind it.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        _, port = listener.getsockname()
    return [start(arguments_fn(f"127.0.0.1:{port},{index},2"), 4) for index in range(2)]


def wait(processes):
    """Returns the exit codes and the outputs of processes.

    It takes at most ten minutes each: a pair may wait for each other forever.
    """
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def finish(processes, code=0):
    """Waits for processes that must all exit with `code`; returns their outputs."""
    codes, outputs = wait(processes)
    assert codes == [code] * len(processes), "\n".join(outputs)
    return outputs


def train_in_one_process(case, num_steps):
    """Returns the state that one process with eight devices ends with."""
    with jax.enable_x64(True):
        return Training(parallel=Parallel("jit"), **CASES[case]).run(num_steps)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Returns the folder in which two processes left what they computed."""
    folder = tmp_path_factory.mktemp("pair")
    half = STEPS // 2
    state = train_in_one_process("ltkd", half)
    Checkpoints(folder / "of_one").save(half, state, {})
    small_runs.prepare_insects(folder)
    module = ["-m", "helpers.process_pair"]
    finish(start_pair(lambda address: [*module, address, str(folder)]))
    return folder


@pytest.mark.parametrize("case", ["ltkd", "one virtual step"])
def test_trainings_of_two_processes(case, pair):
    """Compares the states in float64, to 1e-9.

    The training "resumed" continues half-way from a checkpoint of one process.
    """
    expected = train_in_one_process(case, STEPS)
    names = [
        name for name, (trained_case, _) in TRAININGS.items() if trained_case == case
    ]
    if case == "ltkd":
        names.append("resumed")
    for name in names:
        with jax.enable_x64(True):
            shapes = jax.eval_shape(lambda: expected)
            step, state, _ = Checkpoints(pair / name).restore(shapes)
        assert step == state.step == STEPS
        assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)


def test_each_process_reads_its_share(pair):
    notes = [
        json.loads((pair / f"read_{index}.json").read_text()) for index in range(2)
    ]
    order = streaming.Order(seed=3, num_examples=notes[0]["train"], batch_size=BATCH)
    half = BATCH // 2
    for index, note in enumerate(notes):
        # Of each of two batches, a process reads its half.
        positions = []
        for step in range(2):
            first = BATCH * step + half * index
            positions += range(first, first + half)
        assert sorted(note["random_crop"]) == sorted(map(order.index, positions))
        # Each test image is counted once, although the last batch is filled up.
        assert note["counted"] == [5] * len(small_runs.INSECTS)
    # Both read the image that fills up the last batch.
    in_both = set(notes[0]["image"]) & set(notes[1]["image"])
    assert len(in_both) <= 1


def test_collectives_of_one_process():
    assert hosts.is_primary()
    assert hosts.all_gather("x") == ["x"]
    assert hosts.run_on_primary(lambda: 1) == 1
    assert hosts.run_on_all(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        hosts.run_on_all(lambda: 1 // 0)


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1:99", "here,0,2", "10.0.0.1:99,2,2", "10.0.0.1:99,a,2"]
)
def test_bad_address(address):
    with pytest.raises(ValueError, match="HOST:PORT,INDEX,COUNT"):
        hosts.start(address)


# The tests below run the program. Each process has folders of its own, as hosts without
# a shared file system have.


def program(argument, folder, address=None, **values):
    """Returns the arguments of a run's command.

    Args:
      argument: the config file in configs/ with its argument.
      folder: where the process makes its folders.
      address: HOST:PORT,INDEX,COUNT for one of several processes.
      **values: of the config, by dotted keys.
    """
    index = address.split(",")[1] if address else "0"
    values["teacher.dir"] = folder / f"teachers{index}"
    arguments = ["-m", "experiments.main", f"--config=configs/{argument}"]
    arguments.append(f"--workdir={folder / f'run{index}'}")
    arguments += [f"--config.{key}={value}" for key, value in values.items()]
    if address:
        arguments.append(f"--distributed={address}")
    return arguments


def digits(method, folder, address=None, **values):
    """Returns the arguments of a small run on digits; see `program`."""
    values = {**small_runs.TINY, **values}
    return program(f"digitslt.py:{method}", folder, address, **values)


def records(folder):
    """Returns the steps of a run's records, and the loss and its terms in each."""
    lines = (folder / "run0" / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    steps = [record["step"] for record in parsed]
    losses = [[record["loss"], *record["terms"].values()] for record in parsed]
    return steps, losses


def assert_same_run(folder, expected_folder):
    """Compares two runs' records as closely as float32 allows over few steps.

    Two processes add in another order than one does, and so round differently.
    """
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
    """Includes the teacher and its tables; only the first process writes and prints."""
    values |= {"train.epochs": 1.0, "teacher.train.epochs": 1.0}
    one = tmp_path / "one"
    two = tmp_path / "two"
    finish([start_single(digits(method, one, **values))])
    pair = start_pair(lambda address: digits(method, two, address, **values))
    first_output, second_output = finish(pair)
    assert_same_run(two, one)
    assert {path.name for path in two.iterdir()} == {"run0", "teachers0"}
    assert "classifies" in first_output
    assert "classifies" not in second_output


def test_stream_with_mixup(tmp_path):
    """Mixes images with images that may be read by the other process."""
    data_dir = small_runs.prepare_insects(tmp_path)
    values = {**small_runs.STREAMED, "data.dir": data_dir}
    argument = "folderlt.py:ce,name=insects,mixup=0.2"
    one = tmp_path / "one"
    two = tmp_path / "two"
    finish([start_single(program(argument, one, **values))])
    finish(start_pair(lambda address: program(argument, two, address, **values)))
    assert_same_run(two, one)


def last_step(folder):
    """Returns the step of the last complete record, or 0 if there is none."""
    path = folder / "run0" / "metrics.jsonl"
    if not path.exists():
        return 0
    # The text after the last line break is a record that is being written.
    *lines, _ = path.read_text().split("\n")
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_record(folder, processes, after=0):
    """Waits until a run has written a record of a step later than `after`."""
    deadline = time.monotonic() + 300
    while last_step(folder) <= after and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    assert last_step(folder) > after


def test_interrupted_pair(tmp_path):
    """Kills one of two processes, stops a second pair, and finishes in one process."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    values = {"train.epochs": 6.0, "teacher.train.epochs": 1.0}
    finish([start_single(digits("ltkd", one, **values))])

    def start_digits_pair():
        return start_pair(lambda address: digits("ltkd", two, address, **values))

    # Without heartbeats of the killed process, jax ends the other one, too.
    processes = start_digits_pair()
    wait_for_record(two, processes)
    processes[1].kill()
    codes, outputs = wait(processes)
    assert codes[0] not in (0, None), "\n".join(outputs)
    assert codes[1] == -signal.SIGKILL, "\n".join(outputs)

    # A signal to one process makes both save at the same step.
    killed_at = last_step(two)
    processes = start_digits_pair()
    wait_for_record(two, processes, after=killed_at)
    processes[1].send_signal(signal.SIGTERM)
    for output in finish(processes, code=75):
        assert "stopped by SIGTERM at step" in output, output
    finish([start_single(digits("ltkd", two, **values))])
    assert_same_run(two, one)
