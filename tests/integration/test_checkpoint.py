"""Checkpoints: what was saved comes back; what is damaged is passed over."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import models
from ltkd_jax.training import state as states
from ltkd_jax.training.checkpoint import Checkpoints

TX = states.sgd(0.1, momentum=0.9, weight_decay=1e-4)


def fresh(name="resnet8", classes=4, seed=0):
    return states.create(models.create(name, classes), TX, 2, (8, 8, 1), seed)


@pytest.fixture(scope="module")
def state():
    """A state whose every leaf is something else than zero."""
    leaves, structure = jax.tree.flatten(jax.jit(fresh)())
    ramp = [
        jnp.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype) for leaf in leaves
    ]
    return jax.tree.unflatten(
        structure, [a if a.dtype == bool else a + b for a, b in zip(leaves, ramp)]
    )


@pytest.fixture(scope="module")
def like():
    return jax.eval_shape(fresh)


def files_of(folder, step):
    return sorted(
        p
        for p in (folder / f"step_{step}").rglob("*")
        if p.is_file() and p.stat().st_size > 100
    )


def test_round_trip_is_exact_and_the_newest_are_kept(tmp_path, state, like):
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        saved.save(step, state, {"seconds": 1.5})
    assert saved.steps() == [3, 2]
    step, restored, extra = Checkpoints(tmp_path).restore(like)
    assert (step, extra) == (3, {"seconds": 1.5})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_nothing_saved_is_none(tmp_path, like):
    assert Checkpoints(tmp_path / "new").restore(like) is None


def flip_a_byte(folder):
    path = files_of(folder, 2)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = files_of(folder, 2)[0]
    path.write_bytes(path.read_bytes()[:50])


def lose_a_file(folder):
    files_of(folder, 2)[0].unlink()


def kill_before_the_checksum(folder):
    (folder / "step_2.sha256").unlink()


def garble_the_checksum(folder):
    (folder / "step_2.sha256").write_bytes(bytes(range(200, 256)))


def put_a_folder_for_the_checksum(folder):
    (folder / "step_2.sha256").unlink()
    (folder / "step_2.sha256").mkdir()


def leave_an_empty_folder(folder):
    (folder / "step_7").mkdir()
    (folder / "step_2.sha256").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte, truncate, lose_a_file, kill_before_the_checksum, garble_the_checksum,
        put_a_folder_for_the_checksum, leave_an_empty_folder,
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path, state, like, damage, caplog
):
    saved = Checkpoints(tmp_path)
    saved.save(1, state, {})
    saved.save(2, state, {})
    damage(pathlib.Path(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path).restore(like)[0] == 1
    assert "damaged or incomplete" in caplog.text and "step_2" in caplog.text
    saved.discard_after(1)  # the run goes on from there, and saves that step again
    assert saved.steps() == [1]
    saved.save(2, state, {})
    assert Checkpoints(tmp_path).restore(like)[0] == 2


@pytest.mark.parametrize("other", [("resnet8", 5), ("resnet14", 4)])
def test_a_checkpoint_of_another_model_is_an_error(tmp_path, state, other):
    Checkpoints(tmp_path).save(1, state, {})
    with pytest.raises(ValueError, match="another model"):
        Checkpoints(tmp_path).restore(jax.eval_shape(lambda: fresh(*other)))
    assert Checkpoints(tmp_path).steps() == [1]
