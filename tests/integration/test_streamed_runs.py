"""Runs whose images stay on disk, and runs with more augmentation."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pictures, small_runs
from helpers.small_runs import INSECTS, assert_same_bits, prepare_insects, run, streamed

from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset, input_pipeline
from experiments.trainer.trainer import get_trainer
from ltkd_jax.data import sampling
from ltkd_jax.data.prepare import recipes

# The most that a step reads: two batches to look ahead to, each with its neighbours for Mixup, and the outer set.
LEARNED = {
    "data.outer_per_class": 4,
    "loss_weighting.lookahead": 2,
    "loss_weighting.update_every": 1,
    "augment.mixup": 0.2,
    "devices": 1,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_insects(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="module")
def done(data_dir, tmp_path_factory):
    """A finished run's folder and its results."""
    folder = tmp_path_factory.mktemp("streamed")
    return folder, run(streamed(data_dir, folder), folder / "run")


def load(config):
    return dataset.load(resolve(config).data)


# Whole runs.


def test_results(done):
    folder, results = done
    assert results["train_images"] == sum(results["class_counts"]) and results[
        "class_counts"
    ] == [20, 12, 7, 5]
    assert (
        results["teacher_logits"] == "network"
        and results["config"]["data"]["stream"] is True
    )
    # The test is balanced: each image was counted once.
    assert results["test"]["all"] == pytest.approx(
        np.mean(results["test"]["per_class"])
    )
    assert [line["epoch"] for line in small_runs.records(folder / "run")] == [1.0, 2.0]


def test_resume_is_bit_for_bit(done, data_dir, tmp_path):
    folder, _ = done
    config = streamed(data_dir, folder)
    _, stops = small_runs.run_with_stops(config, tmp_path / "run")
    assert stops >= get_trainer(resolve(config).student_training("network")).total_steps - 1
    assert_same_bits(config, tmp_path / "run", folder / "run")


def test_learned_weights_resume_bit_for_bit(done, data_dir, tmp_path):
    config = streamed(data_dir, done[0], "bikd", **LEARNED)
    results = run(config, tmp_path / "run")
    assert results["outer_images"] == 16 and set(
        results["loss_weighting"]["weights"]
    ) == {"ce", "kd"}
    _, stops = small_runs.run_with_stops(config, tmp_path / "stopped")
    assert stops >= 2
    assert_same_bits(config, tmp_path / "stopped", tmp_path / "run")


def test_several_steps_a_call(done, data_dir, tmp_path):
    """They change nothing but rounding."""
    folder, _ = done
    run(streamed(data_dir, folder, steps_per_call=2), tmp_path / "run")
    single, several = (
        small_runs.records(path / "run")[0] for path in (folder, tmp_path)
    )
    assert several["loss"] == pytest.approx(single["loss"], rel=1e-3)


def test_damaged_record(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "tfds")
    (file,) = (tmp_path / "tfds").rglob("insects-train.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    file.write_bytes(data)
    for stream in (True, False):
        config = streamed(
            tmp_path / "tfds", tmp_path / str(stream), "ce", **{"data.stream": stream}
        )
        with pytest.raises(ConfigError, match="prepare it again"):
            run(config, tmp_path / f"run{stream}")


# The input pipeline.


def inputs_from_disk(
    data,
    call_sizes,
    *,
    step=0,
    outer=True,
    positions=range(16),
    mixup=False,
    lookahead=2,
):
    """Returns the inputs of each call."""
    shard = input_pipeline.BatchShard(np.array(positions), 16, mixup)
    outer_set = data.outer if outer else None
    return list(
        input_pipeline.from_disk(
            data.train, outer_set, 3, step, call_sizes, shard=shard, lookahead=lookahead
        )
    )


def test_lookahead_reads_the_next_batches(data_dir, tmp_path):
    """What a step looks ahead to is what the next steps are trained on, from wherever it starts."""
    data = load(streamed(data_dir, tmp_path, "bikd", **{"data.outer_per_class": 4}))
    inputs = inputs_from_disk(data, [1] * 6)
    for current, following in zip(inputs, inputs[1:]):
        for x, y in zip(current.train, following.train):
            np.testing.assert_array_equal(x[:, :, 1], y[:, :, 0])
    (resumed,) = inputs_from_disk(data, [2], step=4)
    expected = jax.tree.map(lambda *parts: np.concatenate(parts), *inputs[4:])
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert inputs[0].outer.images.shape == (1, 16, 8, 8, 3)


@pytest.mark.parametrize("kind", ["memory", "disk", "disk with an outer set"])
def test_shards_of_two_processes(kind, data_dir, tmp_path):
    """Together they are the global batch; Mixup's neighbours in it may be another process's."""
    data = load(streamed(data_dir, tmp_path, "bikd", **{"data.outer_per_class": 4}))

    def epoch_fn(seed, epoch):
        index = jnp.arange(64).reshape(4, 16)
        return sampling.BatchIndices(index, -index), sampling.BatchIndices(
            index + 64, index
        )

    def inputs(positions):
        if kind == "memory":
            shard = input_pipeline.BatchShard(np.array(positions), 16, mixup=True)
            (whole,) = input_pipeline.from_memory(
                epoch_fn, 3, 0, [4], steps_per_epoch=4, shard=shard
            )
        else:
            outer = "outer" in kind
            options = dict(
                positions=positions,
                mixup=True,
                outer=outer,
                lookahead=2 if outer else 1,
            )
            (whole,) = inputs_from_disk(data, [4], **options)
        return whole

    whole = inputs(range(16))
    halves = [inputs(range(8)), inputs(range(8, 16))]
    together = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *halves)
    jax.tree.map(np.testing.assert_array_equal, together, whole)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.roll(x, 1, axis=1), y),
        whole.train,
        whole.mixup,
    )


def test_random_bits(data_dir, tmp_path):
    """Every position has its own; for Mixup its neighbour's inputs are there too."""
    config = streamed(
        data_dir, tmp_path, **{"data.stream": False, "augment.mixup": 0.3}
    )
    _, inputs = next(get_trainer(resolve(config).student_training("network")).inputs(0, 0))
    bits = inputs.train.random_bits
    assert bits.shape == inputs.train.index.shape and len(np.unique(bits)) == bits.size
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.roll(x, 1, axis=1), y),
        inputs.train,
        inputs.mixup,
    )


# The data set.


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.imbalance": 50.0}, "imbalance=50.0.*n_max=20 class 3"),
        ({"data.stream": False, "data.image_size": 0}, "data.image_size"),
        ({"data.name": "wasps"}, "'wasps'.*prepare folder --name wasps"),
        ({"data.name": "cifar1000"}, "'cifar1000'.*'cifar100'"),
        (
            {"data.name": "cifar100"},
            "python -m ltkd_jax.data.prepare cifar100 --data_dir /",
        ),
    ],
)
def test_data_that_is_not_there(data_dir, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        load(streamed(data_dir, tmp_path, **values))


def test_images_larger_than_memory(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "device_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match="data.stream=True"):
        load(
            streamed(data_dir, tmp_path, **{"data.stream": False, "data.image_size": 9})
        )


def test_other_images_of_the_same_name(data_dir, tmp_path):
    """Their teacher and their results are not those of the first."""
    files = pictures.by_class(
        INSECTS, folder="train/", size=(12, 11)
    ) | pictures.by_class(INSECTS, folder="test/")
    pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(
        recipes.own_recipe("insects"), tmp_path / "tfds", tmp_path / "images"
    )
    spec = resolve(streamed(data_dir, tmp_path))
    other = resolve(streamed(tmp_path / "tfds", tmp_path))
    assert spec.hash != other.hash and spec.teacher_hash != other.teacher_hash
    shutil.copytree(data_dir, tmp_path / "moved")
    assert resolve(streamed(tmp_path / "moved", tmp_path)).hash == spec.hash


def test_subsets(data_dir, tmp_path):
    """Each is another result; a list is known by its content, not by where it lies."""

    def listed(name, lines):
        (tmp_path / name).write_text("\n".join(lines))
        return resolve(
            streamed(data_dir, tmp_path, **{"data.subset": str(tmp_path / name)})
        )

    lines = []
    for label, name in enumerate(sorted(INSECTS)):
        lines += [f"train/{name}/{name}{i}.jpg {label}" for i in range(5 - label)]
    first, same, other = (
        listed("a.txt", lines),
        listed("b.txt", lines),
        listed("c.txt", lines[1:]),
    )
    assert first.hash == same.hash != other.hash
    assert dataset.load(first.data).class_counts.tolist() == [5, 4, 3, 2]
    whole = resolve(streamed(data_dir, tmp_path, **{"data.subset": "all"}))
    assert dataset.load(whole.data).class_counts.tolist() == list(INSECTS.values())
    assert whole.name.startswith("insects-all-ltkd") and first.name.startswith(
        "insects-a-ltkd"
    )
    with pytest.raises(ConfigError, match="'train/ant/gone.jpg'"):
        dataset.load(listed("d.txt", ["train/ant/gone.jpg 0"]).data)
    with pytest.raises(ConfigError, match="d.txt"):
        listed("d.txt", ["train/ant/gone.jpg"])
