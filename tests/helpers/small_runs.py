"""Runs small enough for the tests: long-tailed digits or a stream of a hundred pictures, ResNet8, a few steps."""

import importlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import pytest

from experiments.config.spec import resolve
from experiments.trainer import run as runs
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.loop import DivergedError
from experiments.trainer.trainer import get_trainer
from helpers import pictures
from ltkd_jax.data.prepare import recipes
from ltkd_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SMALL = {
    "data.imbalance": 4.0, "teacher.model": "resnet8", "student.model": "resnet8", "train.batch_size": 16,
    "teacher.train.batch_size": 16, "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip
TINY = _SMALL | {
    "data.n_max": 12, "data.test_images": 50, "data.validation_per_class": 2, "train.epochs": 3.0,
    "teacher.train.epochs": 2.0, "eval_batch_size": 64,
}  # fmt: skip
STREAMED = _SMALL | {
    "data.stream": True, "data.image_size": 8, "data.num_workers": 0, "data.subset": "exponential",
    "train.epochs": 2.0, "teacher.train.epochs": 1.0, "eval_batch_size": 16,
}  # fmt: skip
INSECTS = {
    "ant": 30,
    "bee": 24,
    "cat": 20,
    "dog": 20,
}  # training images; of each there are 5 test images


def config_of(name, argument=""):
    """Returns the config of a file in configs/."""
    return importlib.import_module(f"configs.{name}").get_config(argument).lock()


def changed(config, **values):
    """Returns the config with other values by their dotted paths."""
    config.update_from_flattened_dict(values)
    return config


def tiny(folder, argument="ltkd", **values):
    """Returns the config of a run on digits that shares its teacher with the others of the folder."""
    return changed(
        config_of("digitslt", argument),
        **{**TINY, "teacher.dir": str(folder / "teachers"), **values},
    )


def prepare_insects(folder):
    """Prepares a data set to stream from; returns its TFDS directory."""
    size = dict(size=(12, 10))
    files = pictures.by_class(INSECTS, folder="train/", **size)
    files |= pictures.by_class({name: 5 for name in INSECTS}, folder="test/", **size)
    pictures.write_folder(folder / "images", files)
    recipes.prepare(recipes.own_recipe("insects"), folder / "tfds", folder / "images")
    return folder / "tfds"


def streamed(data_dir, folder, argument="ltkd", **values):
    """Returns the config of a run on streamed insects that shares its teacher with the others of the folder."""
    folders = {"data.dir": str(data_dir), "teacher.dir": str(folder / "teachers")}
    return changed(
        config_of("folderlt", f"{argument},name=insects"),
        **{**STREAMED, **folders, **values},
    )


def run(config, workdir, **options):
    """Runs a config, `trainer.run.run`."""
    return runs.run(resolve(config), workdir, command="the test", **options)


def run_one_call(config, workdir):
    """Starts a run that is stopped after the first call of the compiled steps."""
    with pytest.raises(StoppedError):
        run(config, workdir, stop=StopRequest(time.monotonic()))


def run_with_stops(config, workdir):
    """Runs a config, stopped after every call; returns its results and the number of stops."""
    for stops in range(1000):
        try:
            return run(
                config, workdir, stop=StopRequest(time.monotonic() + 0.01)
            ), stops
        except StoppedError:
            pass
    raise AssertionError("the run makes no progress")


def records(workdir):
    """Returns the lines of `metrics.jsonl`."""
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def parameters(workdir, config=None):
    """Returns every byte of the newest checkpoint."""
    spec = resolve(config or tiny(workdir))
    like = jax.eval_shape(get_trainer(spec.student_training("none")).init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(like)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_bits(config, workdir, other):
    """Checks that two runs have ended with the same state and the same records."""
    assert parameters(workdir, config) == parameters(other, config)
    assert (workdir / "metrics.jsonl").read_text() == (
        other / "metrics.jsonl"
    ).read_text()


def with_infinity(tree):
    """Returns the tree with an infinity in its largest leaf."""
    leaves, structure = jax.tree.flatten(tree)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[(0,) * leaves[largest].ndim].set(jnp.inf)
    return jax.tree.unflatten(structure, leaves)


def spoil(monkeypatch, student, change, *, at_step=None):
    """Makes a step of a trainer leave `change(state)`; the last one of the first epoch unless given."""
    at_step = student.steps_per_epoch - 1 if at_step is None else at_step
    train_steps = student.train_steps

    def spoiled(step, *arguments):
        state = train_steps(step, *arguments)
        return change(state) if step == at_step else state

    monkeypatch.setattr(student, "train_steps", spoiled)


def assert_diverges(workdir, message, train):
    """Checks that `train` is stopped by a number that is not finite, and leaves the checkpoints as they were."""
    saved = sorted((workdir / "checkpoints").rglob("*"))
    with pytest.raises(DivergedError, match=message):
        train()
    assert sorted((workdir / "checkpoints").rglob("*")) == saved
