"""Runs small enough for the fast suite: long-tailed digits, ResNet8, a few steps."""

import importlib
import pathlib

import jax

from experiments import build, runs
from ltkd_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    "data.n_max": 12, "data.imbalance": 4.0, "data.test_images": 50, "data.validation_per_class": 2,
    "teacher.model": "resnet8", "student.model": "resnet8", "train.batch_size": 16, "teacher.train.batch_size": 16,
    "train.epochs": 3.0, "teacher.train.epochs": 2.0, "eval_batch": 64, "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip


def config_of(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def tiny(tmp_path, argument="ltkd", *, every=1, **values):
    config = config_of("digits_lt", argument)
    if every > 1:
        config.weighting.every = every
    config.lock().update_from_flattened_dict({**TINY, "teacher.cache": str(tmp_path / "teachers"), **values})
    return config


def run(config, workdir):
    return runs.run(config, workdir, command="the test")


def parameters(workdir, config=None):
    """Every byte of the newest checkpoint."""
    like = jax.eval_shape(build.student_program(config or tiny(workdir), "none").init, 0)
    _, state, _ = Checkpoints(workdir / "checkpoints").restore(like)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]
