"""Checkpoints: round trip, and the fallback from damaged ones."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import models
from ltkd_jax.training import state as states
from ltkd_jax.training.checkpoint import Checkpoints

OPTIMIZER = states.sgd(0.1, momentum=0.9, weight_decay=1e-4)


def create_state(name="resnet8", classes=4, seed=0):
    return states.create(models.create(name, classes), OPTIMIZER, 2, (8, 8, 1), seed)


@pytest.fixture(scope="module")
def state():
    """Returns a state in which no leaf is all zeros."""
    leaves, structure = jax.tree.flatten(jax.jit(create_state)())
    nonzero_leaves = []
    for leaf in leaves:
        if leaf.dtype != bool:
            ramp = jnp.arange(leaf.size).reshape(leaf.shape)
            leaf = leaf + ramp.astype(leaf.dtype)
        nonzero_leaves.append(leaf)
    return jax.tree.unflatten(structure, nonzero_leaves)


@pytest.fixture(scope="module")
def target():
    return jax.eval_shape(create_state)


def large_files(folder, step):
    """Returns the files of a checkpoint that have more than a header."""
    paths = (folder / f"step_{step}").rglob("*")
    return sorted(
        path for path in paths if path.is_file() and path.stat().st_size > 100
    )


def test_round_trip(tmp_path, state, target):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"seconds": 1.5})
    assert checkpoints.steps() == [3, 2]
    step, restored, extra = Checkpoints(tmp_path).restore(target)
    assert (step, extra) == (3, {"seconds": 1.5})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_restore_without_checkpoint(tmp_path, target):
    assert Checkpoints(tmp_path / "new").restore(target) is None


def flip_byte(folder):
    path = large_files(folder, 2)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = large_files(folder, 2)[0]
    path.write_bytes(path.read_bytes()[:50])


def delete_file(folder):
    large_files(folder, 2)[0].unlink()


def kill_before_checksum(folder):
    (folder / "step_2.sha256").unlink()


def garble_checksum(folder):
    (folder / "step_2.sha256").write_bytes(bytes(range(200, 256)))


def replace_checksum_by_folder(folder):
    (folder / "step_2.sha256").unlink()
    (folder / "step_2.sha256").mkdir()


def leave_empty_folder(folder):
    (folder / "step_7").mkdir()
    (folder / "step_2.sha256").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        truncate,
        delete_file,
        kill_before_checksum,
        garble_checksum,
        replace_checksum_by_folder,
        leave_empty_folder,
    ],
)
def test_damaged_checkpoint(tmp_path, state, target, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    damage(pathlib.Path(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path).restore(target)[0] == 1
    assert "damaged or incomplete" in caplog.text
    assert "step_2" in caplog.text
    # The run resumes from step 1, and saves step 2 again.
    checkpoints.discard_after(1)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state, {})
    assert Checkpoints(tmp_path).restore(target)[0] == 2


@pytest.mark.parametrize("name, classes", [("resnet8", 5), ("resnet14", 4)])
def test_checkpoint_of_another_model(tmp_path, state, name, classes):
    Checkpoints(tmp_path).save(1, state, {})
    other_target = jax.eval_shape(lambda: create_state(name, classes))
    with pytest.raises(ValueError, match="another model"):
        Checkpoints(tmp_path).restore(other_target)
    assert Checkpoints(tmp_path).steps() == [1]
