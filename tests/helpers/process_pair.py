"""One of two processes of four devices each: `python -m helpers.process_pair HOST:PORT,INDEX,2 FOLDER`.

It does what both must do together, checks what one can check, and leaves the rest in the folder; see test_hosts.py.
"""

import json
import pathlib
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

STEPS = 6  # a collective of eight virtual devices in two processes takes its time
TRAININGS = {
    "jit": ("ltkd", "jit"),
    "pmap": ("ltkd", "pmap"),
    "learned": ("one virtual step", "jit"),
}


def primitives(index):
    """Checks what is done once, what all must agree on, and whose errors all get."""
    large = hosts.run_on_primary(
        lambda: {"array": np.arange(1000.0) + index, "index": index}
    )
    assert large["index"] == 0 and (large["array"] == np.arange(1000.0)).all()
    calls = []
    hosts.run_on_primary(lambda: calls.append(1))
    assert len(calls) == (index == 0)
    for _ in range(3):
        assert hosts.all_gather(10 + index) == [10, 11]
    assert hosts.run_on_all(lambda: index) == index
    for culprit in range(2):
        with pytest.raises(ZeroDivisionError):
            hosts.run_on_all(lambda: 1 // (index != culprit))
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        hosts.run_on_primary(lambda: open("/nowhere/at/all"))

    class LocalError(Exception):  # pickle does not find a class of a function
        pass

    def fail():
        raise LocalError("it says why")

    with pytest.raises(LocalError if index == 1 else RuntimeError, match="it says why"):
        hosts.run_on_all(fail if index == 1 else lambda: None)


def trainings(folder):
    """Leaves checkpoints of trainings of the small net; one goes on from a checkpoint of one process."""

    def save(name, state):
        hosts.run_on_primary(lambda: Checkpoints(folder / name).save(STEPS, state, {}))

    with jax.enable_x64(True):
        for name, (case, mode) in TRAININGS.items():
            training = Training(parallel=Parallel(mode), **CASES[case])
            state = training.run(STEPS)
            save(name, state)
            if name == "jit":
                step, start, _ = hosts.run_on_primary(
                    lambda: Checkpoints(folder / "of_one").restore(state)
                )
                assert step == start.step == STEPS // 2
                save("resumed", training.run(STEPS, start=start))


def reading(index, folder, spec):
    """Notes which records this process decodes, of two batches of a stream and of an evaluation."""
    student = get_trainer(spec.student_training("none"))
    read = {"crop": [], "image": []}
    for name, numbers in read.items():
        original = getattr(Records, name)

        def noting(self, number, *rest, original=original, numbers=numbers):
            numbers.append(int(number))
            return original(self, number, *rest)

        setattr(Records, name, noting)
    assert len(list(student.inputs(3, 0))) == student.total_steps == 2
    state = student.parallel.replicate(student.init(0))
    counted = (
        student.evaluate(state.variables, student.data.test)
        .confusion.sum(axis=1)
        .tolist()
    )
    notes = {**read, "train": len(student.data.train), "counted": counted}
    (folder / f"read_{index}.json").write_text(json.dumps(notes))


def given_logits(folder):
    """Checks that both get a teacher of logits from the file that the first one reads."""
    path = folder / "teacher.npz"
    config = tiny(folder, "kd")
    source = dataset.load(resolve(config).data).source
    if hosts.is_primary():
        logits = (
            np.random.default_rng(0)
            .normal(size=(len(source.train), 10))
            .astype(np.float32)
        )
        np.savez(path, train_logits=logits, train_labels=source.train.labels)
    hosts.all_gather(None)
    with config.unlocked():
        config.teacher.checkpoint = str(path)
    given = teacher.obtain(resolve(config), StopRequest())
    assert isinstance(given, external_teacher.LogitsTeacher)
    with np.load(path) as file:
        np.testing.assert_array_equal(given.logits[:, 0], file["train_logits"])


def refusals(index, folder, config):
    """Checks that a difference between the processes ends both, before there is a work directory."""
    absent = streamed(folder / "nowhere", folder, "ce")
    for specs in (
        [resolve(tiny(folder, argument)) for argument in ("kd", "ltkd")],
        [resolve(config), resolve(absent)],
    ):
        with pytest.raises(
            ConfigError, match="process 1 of 2 has another config, or other data"
        ):
            run.run(specs[index], folder / f"run{index}", command="the test")
        assert not (folder / f"run{index}").exists()


def main():
    where, folder = sys.argv[1:]
    folder = pathlib.Path(folder)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    hosts.start(where)
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    index = jax.process_index()
    primitives(index)
    trainings(folder)
    config = streamed(folder / "tfds", folder, "ce", **{"train.max_steps": 2})
    refusals(index, folder, config)
    given_logits(folder)
    reading(index, folder, resolve(config))


if __name__ == "__main__":
    main()
