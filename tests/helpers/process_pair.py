"""One of two processes with four devices each.

    python -m helpers.process_pair HOST:PORT,INDEX,2 FOLDER

It checks what one process can check, and leaves the rest in the folder for
tests/system/test_hosts.py.
"""

import json
import pathlib
import pickle
import sys

import jax
import numpy as np
import pytest

from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset, external_teacher, run, teacher
from experiments.trainer.interrupts import StopRequest
from experiments.trainer.trainer import get_trainer
from helpers.small_net import CASES, Training
from helpers.small_runs import streamed, tiny
from ltkd_jax.data.records import Records
from ltkd_jax.training import hosts
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.parallel import Parallel

# Few, because a collective of eight virtual devices in two processes is slow.
STEPS = 6
TRAININGS = {
    "jit": ("ltkd", "jit"),
    "pmap": ("ltkd", "pmap"),
    "learned": ("one virtual step", "jit"),
}


def check_hosts(index):
    """Checks the functions of `hosts`, errors included."""
    result = hosts.run_on_primary(
        lambda: {"array": np.arange(1000.0) + index, "index": index}
    )
    assert result["index"] == 0
    assert (result["array"] == np.arange(1000.0)).all()
    calls = []
    hosts.run_on_primary(lambda: calls.append(1))
    assert len(calls) == (index == 0)
    # Several calls, because each deletes what the one before has stored.
    for _ in range(3):
        assert hosts.all_gather(10 + index) == [10, 11]
    assert hosts.run_on_all(lambda: index) == index
    for failing_index in range(2):
        divisor = int(index != failing_index)
        with pytest.raises(ZeroDivisionError):
            hosts.run_on_all(lambda divisor=divisor: 1 // divisor)
    absent = pathlib.Path("/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match=str(absent)):
        hosts.run_on_primary(absent.read_text)

    # A result that cannot be sent: no process waits for it.
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        hosts.run_on_primary(lambda: lambda: None)

    class LocalError(Exception):
        """Cannot be pickled, because its class is local to a function."""

    def fail():
        raise LocalError("the reason")

    fn = fail if index == 1 else lambda: None
    error_class = LocalError if index == 1 else RuntimeError
    with pytest.raises(error_class, match="the reason"):
        hosts.run_on_all(fn)


def run_trainings(folder):
    """Saves the states of trainings of the small net.

    One of them resumes from a checkpoint that a single process has saved.
    """

    def save(name, state):
        hosts.run_on_primary(lambda: Checkpoints(folder / name).save(STEPS, state, {}))

    with jax.enable_x64(True):
        for name, (case, mode) in TRAININGS.items():
            training = Training(parallel=Parallel(mode), **CASES[case])
            state = training.run(STEPS)
            save(name, state)
            if name == "jit":
                restored = hosts.run_on_primary(
                    lambda state=state: Checkpoints(folder / "of_one").restore(state)
                )
                step, start, _ = restored
                assert step == start.step == STEPS // 2
                save("resumed", training.run(STEPS, start=start))


def record_reads(index, folder, spec):
    """Writes which records this process decodes.

    They are those of two batches of a stream, and of an evaluation.
    """
    student = get_trainer(spec.student_training("none"))
    reads = {"random_crop": [], "image": []}
    for name, numbers in reads.items():
        original = getattr(Records, name)

        def recording(self, number, *args, original=original, numbers=numbers):
            numbers.append(int(number))
            return original(self, number, *args)

        setattr(Records, name, recording)
    assert len(list(student.inputs(3, 0))) == student.total_steps == 2
    state = student.parallel.replicate(student.init(0))
    sums = student.evaluate(state.variables, student.data.test)
    report = {
        **reads,
        "train": len(student.data.train),
        "counted": sums.confusion.sum(axis=1).tolist(),
    }
    (folder / f"read_{index}.json").write_text(json.dumps(report))


def check_logits_teacher(folder):
    """Checks that both processes get a teacher of logits that process 0 reads."""
    path = folder / "teacher.npz"
    config = tiny(folder, "kd")
    source = dataset.load(resolve(config).data).source
    if hosts.is_primary():
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(len(source.train), 10)).astype(np.float32)
        np.savez(
            path,
            train_logits=logits,
            train_labels=source.train.labels,
            train_keys=source.train.keys,
        )
    # The other process waits for the file.
    hosts.all_gather(None)
    with config.unlocked():
        config.teacher.checkpoint = str(path)
    logits_teacher = teacher.obtain(resolve(config), StopRequest())
    assert isinstance(logits_teacher, external_teacher.LogitsTeacher)
    with np.load(path) as file:
        np.testing.assert_array_equal(logits_teacher.logits[:, 0], file["train_logits"])


def check_different_configs(index, folder, config):
    """Checks that processes with different configs or data write nothing and end."""
    other_config = streamed(folder / "nowhere", folder, "ce")
    pairs = (
        (tiny(folder, "kd"), tiny(folder, "ltkd")),
        (config, other_config),
    )
    for pair in pairs:
        spec = [resolve(one) for one in pair][index]
        workdir = folder / f"run{index}"
        message = "process 1 of 2 has another config, or other data"
        with pytest.raises(ConfigError, match=message):
            run.run(spec, workdir, command="the test")
        assert not workdir.exists()


def main():
    distributed, folder_name = sys.argv[1:]
    folder = pathlib.Path(folder_name)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    hosts.start(distributed)
    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    index = jax.process_index()
    check_hosts(index)
    run_trainings(folder)
    config = streamed(folder / "tfds", folder, "ce", **{"train.max_steps": 2})
    check_different_configs(index, folder, config)
    check_logits_teacher(folder)
    record_reads(index, folder, resolve(config))


if __name__ == "__main__":
    main()
