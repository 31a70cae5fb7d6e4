"""Two processes with four devices each, over loopback, are one process with eight."""

import functools
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
from helpers.process_pair import STEPS
from helpers.small_net import SmallNet, assert_close, double, parameters, teacher_variables, train
from helpers.small_runs import ROOT

from ltkd_jax.data import streaming
from ltkd_jax.training import hosts, steps
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.parallel import Parallel

BATCH = small_runs.STREAMED["train.batch_size"]


def start(words, devices):
    """A process with so many virtual devices."""
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    environment = {**os.environ, "LTKD_CACHE": cache, "JAX_COMPILATION_CACHE_DIR": cache}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def start_both(words):
    """Two processes of four devices each; `words(HOST:PORT,INDEX,2)` of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(words(f"{where},{index},2"), 4) for index in range(2)]


def ended(processes, timeout=240):
    """Exit codes and outputs; the time is bounded."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def alone():
    """What one process with eight devices computes: a function of the number of steps."""
    with jax.enable_x64(True):
        teacher = jax.device_get(double(teacher_variables()))
    teaching = dict(teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher)

    @functools.cache
    def after(num_steps, ahead=0):
        with jax.enable_x64(True):
            return train("ltkd", Parallel("jit"), num_steps, ahead=ahead, **teaching)

    return after


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What two processes leave in a folder."""
    folder = tmp_path_factory.mktemp("together")
    Checkpoints(folder / "of_one").save(STEPS // 2, alone(STEPS // 2), {})
    values = {**small_runs.STREAMED, "data.dir": str(small_runs.prepare_insects(folder)), "train.max_steps": 2}
    (folder / "values.json").write_text(json.dumps(values))
    codes, outputs = ended(start_both(lambda where: ["-m", "helpers.process_pair", where, str(folder), "jit", "pmap"]))
    assert codes == [0, 0], "\n".join(outputs)
    return folder


def assert_same(folder, expected):
    """What two processes left in a checkpoint, read here, in one, to 1e-9 in float64."""
    with jax.enable_x64(True):
        step, state, _ = Checkpoints(folder).restore(jax.eval_shape(lambda: expected))
    assert step == state.step == STEPS
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["jit", "pmap", "went_on"])
def test_two_processes_are_one(alone, together, name):
    """By LTKD's terms; "went_on" is of a checkpoint that one process left after half of the steps."""
    assert_same(together / name, alone(STEPS))


@pytest.mark.slow
def test_two_processes_learn_weights_as_one(alone, tmp_path):
    codes, outputs = ended(start_both(lambda where: ["-m", "helpers.process_pair", where, str(tmp_path), "bikd"]))
    assert codes == [0, 0], "\n".join(outputs)
    assert_same(tmp_path / "bikd", alone(STEPS, ahead=1))


def test_each_process_reads_its_share_alone(together):
    read = [json.loads((together / f"read_{index}.json").read_text()) for index in range(2)]
    order = streaming.Order(seed=3, num_examples=read[0]["train"], batch_size=BATCH)
    for index, part in enumerate(read):
        places = range(8 * index, 8 * index + 8)
        assert sorted(part["crop"]) == sorted(
            order.index(BATCH * step + place) for step in range(2) for place in places
        )
        assert part["counted"] == [5] * len(small_runs.INSECTS)  # each test image once, the last batch filled up
    assert len(set(read[0]["image"]) & set(read[1]["image"])) <= 1  # which fills the last batch up


def test_one_process_needs_no_meeting():
    assert (
        hosts.is_primary()
        and hosts.all_gather("x") == ["x"]
        and hosts.run_on_primary(lambda: 1) == hosts.run_on_all(lambda: 1) == 1
    )
    with pytest.raises(ZeroDivisionError):
        hosts.run_on_all(lambda: 1 // 0)


@pytest.mark.parametrize("where", ["", "10.0.0.1:99", "here,0,2", "10.0.0.1:99,2,2", "10.0.0.1:99,a,2"])
def test_an_address_that_is_none(where):
    with pytest.raises(ValueError, match="must be auto, or HOST:PORT,INDEX,COUNT"):
        hosts.start(where)


TINY = {**small_runs.TINY, "train.epochs": 6.0}


def program(argument, folder, *extra, distributed=None):
    """A run of the program; each process of several has folders of its own, as hosts without a common disk have."""
    index = distributed.split(",")[1] if distributed else "0"
    words = ["-m", "experiments.main", f"--config={argument}", f"--workdir={folder / f'run{index}'}"]
    words += [f"--config.teacher.cache={folder / f'teachers{index}'}", *extra]
    return words + ([f"--distributed={distributed}"] if distributed else [])


def digits(argument, folder, distributed=None, **values):
    flags = [f"--config.{key}={value}" for key, value in {**TINY, **values}.items()]
    return program(f"configs/digitslt.py:{argument}", folder, *flags, distributed=distributed)


def curves(folder):
    lines = [json.loads(line) for line in (folder / "run0" / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], np.array([[line["loss"], *line["terms"].values()] for line in lines])


def assert_same_run(folder, expected):
    """As far as float32 allows it, over few steps: a sum over two processes is rounded in another order."""
    (step, loss), (expected_step, expected_loss) = curves(folder), curves(expected)
    assert step == expected_step
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-3, atol=2e-3)


def finish(words, devices=8):
    (code,), (output,) = ended([start(words, devices)])
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("argument, values", [("ltkd", {"teacher.table": "always"}), ("bikd", {}), ("reviewkd", {})])
def test_the_program_in_two_processes(argument, values, tmp_path):
    """By the command line, teacher and its table included; only the first process writes."""
    values = {"train.epochs": 2.0, **values}
    finish(digits(argument, tmp_path / "one", **values))
    codes, outputs = ended(start_both(lambda where: digits(argument, tmp_path / "two", where, **values)))
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["run0", "teachers0"]
    assert "classifies" in outputs[0] and "classifies" not in outputs[1]


@pytest.mark.slow
def test_a_stream_with_mixup_in_two_processes(tmp_path):
    """Mixup's partners may be another process's images."""
    values = {**small_runs.STREAMED, "data.dir": small_runs.prepare_insects(tmp_path)}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    argument = "configs/folderlt.py:ce,name=insects,mixup=0.2"
    finish(program(argument, tmp_path / "one", *flags))
    codes, outputs = ended(start_both(lambda where: program(argument, tmp_path / "two", *flags, distributed=where)))
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def wait_for(path, processes):
    until = time.monotonic() + 120
    while not path.exists() and all(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_goes_on(tmp_path):
    """Both save at the same step; what two have begun, one process with eight devices ends."""
    finish(digits("ltkd", tmp_path / "one"))
    processes = start_both(lambda where: digits("ltkd", tmp_path / "two", where))
    wait_for(tmp_path / "two" / "run0" / "metrics.jsonl", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = ended(processes)
    assert codes == [75, 75] and all("stopped by SIGTERM at step" in output for output in outputs), "\n".join(outputs)
    finish(digits("ltkd", tmp_path / "two"))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_nothing_is_lost(tmp_path):
    finish(digits("ltkd", tmp_path / "one"))
    processes = start_both(lambda where: digits("ltkd", tmp_path / "two", where))
    wait_for(tmp_path / "two" / "run0" / "metrics.jsonl", processes)
    processes[1].kill()
    codes, outputs = ended(processes)  # the first one waits for its heartbeat, then ends
    assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL, "\n".join(outputs)
    codes, outputs = ended(start_both(lambda where: digits("ltkd", tmp_path / "two", where)))
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(tmp_path):
    processes = start_both(lambda where: digits("ltkd" if ",0,2" in where else "kd", tmp_path, where))
    codes, outputs = ended(processes)
    assert codes == [1, 1]
    assert all("error: process 1 of 2 has another config, or other data" in output for output in outputs)
    assert not any((tmp_path / f"run{index}").exists() for index in range(2))


@pytest.mark.slow
def test_an_error_in_the_second_process_is_an_error_of_both(tmp_path):
    """Its data are not there: the first one does not wait for it."""
    data_dir = small_runs.prepare_insects(tmp_path)

    def words(where):
        values = {**small_runs.STREAMED, "data.dir": data_dir if ",0,2" in where else tmp_path / "nowhere"}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return program("configs/folderlt.py:ce,name=insects", tmp_path, *flags, distributed=where)

    codes, outputs = ended(start_both(words))
    assert codes == [1, 1] and all("error:" in output and "Traceback" not in output for output in outputs)
