"""Runs small enough for tests: digits or a hundred streamed images, a few steps."""

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
    "data.imbalance": 4.0,
    "teacher.model": "resnet8",
    "student.model": "resnet8",
    "train.batch_size": 16,
    "teacher.train.batch_size": 16,
    "eval_every": 1,
    "checkpoint_every": 1,
}
TINY = _SMALL | {
    "data.n_max": 12,
    "data.test_images": 50,
    "data.validation_per_class": 2,
    "train.epochs": 3.0,
    "teacher.train.epochs": 2.0,
    "eval_batch_size": 64,
}
STREAMED = _SMALL | {
    "data.stream": True,
    "data.image_size": 8,
    "data.num_workers": 0,
    "data.subset": "exponential",
    "train.epochs": 2.0,
    "teacher.train.epochs": 1.0,
    "eval_batch_size": 16,
}
# Training images of each class; it also has 5 test images.
INSECTS = {"ant": 30, "bee": 24, "cat": 20, "dog": 20}


def config_of(name, argument=""):
    """Returns the config of a file in configs/."""
    return importlib.import_module(f"configs.{name}").get_config(argument).lock()


def changed(config, **values):
    """Returns the config after setting values by their dotted paths."""
    config.update_from_flattened_dict(values)
    return config


def tiny(folder, argument="ltkd", **values):
    """Returns the config of a run on digits; runs of a folder share their teacher."""
    folders = {"teacher.dir": str(folder / "teachers")}
    return changed(config_of("digitslt", argument), **{**TINY, **folders, **values})


def prepare_insects(folder):
    """Prepares a data set to stream from; returns its TFDS directory."""
    size = (12, 10)
    test_images = dict.fromkeys(INSECTS, 5)
    files = pictures.by_class(INSECTS, folder="train/", size=size)
    files |= pictures.by_class(test_images, folder="test/", size=size)
    pictures.write_folder(folder / "images", files)
    recipes.prepare(
        recipes.custom_recipe("insects"), folder / "tfds", folder / "images"
    )
    return folder / "tfds"


def streamed(data_dir, folder, argument="ltkd", **values):
    """Returns the config of a run on streamed insects, see `tiny`."""
    folders = {"data.dir": str(data_dir), "teacher.dir": str(folder / "teachers")}
    config = config_of("folderlt", f"{argument},name=insects")
    return changed(config, **{**STREAMED, **folders, **values})


def run(config, workdir, **options):
    """Runs a config, see `trainer.run.run`."""
    return runs.run(resolve(config), workdir, command="the test", **options)


def run_one_call(config, workdir):
    """Starts a run that is stopped after the first call of the compiled steps."""
    with pytest.raises(StoppedError):
        run(config, workdir, stop=StopRequest(time.monotonic()))


def run_with_stops(config, workdir):
    """Runs a config, stopped after each call; returns results and number of stops."""
    for num_stops in range(1000):
        stop = StopRequest(time.monotonic() + 0.01)
        try:
            return run(config, workdir, stop=stop), num_stops
        except StoppedError:
            pass
    raise AssertionError("the run makes no progress")


def records(workdir):
    """Returns the records in `metrics.jsonl`."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parameters(workdir, config=None):
    """Returns the bytes of all arrays in the newest checkpoint."""
    spec = resolve(config or tiny(workdir))
    template = jax.eval_shape(get_trainer(spec.student_training("none")).init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(template)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_bits(config, workdir, other):
    """Checks that two runs ended with the same state and the same records."""
    assert parameters(workdir, config) == parameters(other, config)
    metrics = (workdir / "metrics.jsonl").read_text()
    assert metrics == (other / "metrics.jsonl").read_text()


def with_infinity(tree):
    """Returns the tree with an infinity in its largest leaf."""
    leaves, structure = jax.tree.flatten(tree)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[(0,) * leaves[largest].ndim].set(jnp.inf)
    return jax.tree.unflatten(structure, leaves)


def spoil(monkeypatch, trainer, change, *, at_step=None):
    """Applies `change` to the state after a step, the first epoch's last by default."""
    if at_step is None:
        at_step = trainer.steps_per_epoch - 1
    train_steps = trainer.train_steps

    def spoiled(step, *arguments):
        state = train_steps(step, *arguments)
        return change(state) if step == at_step else state

    monkeypatch.setattr(trainer, "train_steps", spoiled)


def assert_diverges(workdir, message, train):
    """Checks that `train` raises DivergedError and leaves all checkpoints in place."""
    before = sorted((workdir / "checkpoints").rglob("*"))
    with pytest.raises(DivergedError, match=message):
        train()
    assert sorted((workdir / "checkpoints").rglob("*")) == before
