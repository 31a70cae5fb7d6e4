"""Runs small enough for the fast suite: long-tailed digits, ResNet8, a few steps."""

import importlib
import pathlib

import jax

from experiments.trainer import build
from experiments.trainer import run as runs
from helpers import pictures
from ltkd_jax.data.prepare import recipes
from ltkd_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = {
    "data.n_max": 12, "data.imbalance": 4.0, "data.test_images": 50, "data.validation_per_class": 2,
    "teacher.model": "resnet8", "student.model": "resnet8", "train.batch_size": 16, "teacher.train.batch_size": 16,
    "train.epochs": 3.0, "teacher.train.epochs": 2.0, "eval_batch": 64, "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip


INSECTS = {"ant": 30, "bee": 24, "cat": 20, "dog": 20}  # training images; of each there are 5 test images
STREAMED = {
    "data.stream": True, "data.image_size": 8, "data.workers": 0, "data.imbalance": 4.0, "data.subset": "exponential",
    "teacher.model": "resnet8", "student.model": "resnet8", "train.batch_size": 16, "teacher.train.batch_size": 16,
    "train.epochs": 2.0, "teacher.train.epochs": 1.0, "eval_batch": 16, "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip


def config_of(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def tiny(tmp_path, argument="ltkd", *, every=1, **values):
    config = config_of("digitslt", argument)
    if every > 1:
        config.weighting.every = every
    config.lock().update_from_flattened_dict({**TINY, "teacher.cache": str(tmp_path / "teachers"), **values})
    return config


def prepare_insects(folder):
    """A data set on disk, to stream from; returns where."""
    size = dict(size=(12, 10))
    files = pictures.by_class(INSECTS, folder="train/", **size)
    files |= pictures.by_class({name: 5 for name in INSECTS}, folder="test/", **size)
    pictures.write_folder(folder / "images", files)
    recipes.prepare(recipes.own_recipe("insects"), folder / "tfds", folder / "images")
    return folder / "tfds"


def streamed(data_dir, tmp_path, argument="ltkd", **values):
    config = config_of("folderlt", f"{argument},name=insects").lock()
    places = {"data.dir": str(data_dir), "teacher.cache": str(tmp_path / "teachers")}
    config.update_from_flattened_dict({**STREAMED, **places, **values})
    return config


def run(config, workdir):
    return runs.run(config, workdir, command="the test")


def parameters(workdir, config=None):
    """Every byte of the newest checkpoint."""
    like = jax.eval_shape(build.student_program(config or tiny(workdir), "none").init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(like)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]
