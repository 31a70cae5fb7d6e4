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
from experiments.reporting import report_page
from experiments.reporting.load import load as load_run
from experiments.trainer import dataset, input_pipeline
from experiments.trainer.trainer import get_trainer
from ltkd_jax.data import sampling
from ltkd_jax.data.prepare import recipes

# The most that a step can read: two lookahead batches, each with the neighbours for
# Mixup, and a batch of the outer set.
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
def finished(data_dir, tmp_path_factory):
    """A finished run: its folder and its results."""
    folder = tmp_path_factory.mktemp("streamed")
    return folder, run(streamed(data_dir, folder), folder / "run")


def load(config):
    return dataset.load(resolve(config).data)


def trainer_of(config):
    return get_trainer(resolve(config).student_training("network"))


# Complete runs.


def test_two_classes(tmp_path):
    """By default they are head and tail; each is its own group."""
    files = pictures.by_class({"ant": 20, "bee": 40}, size=(12, 10))
    pictures.write_folder(tmp_path / "images", files)
    recipe = recipes.custom_recipe("pair", test_per_class=5)
    recipes.prepare(recipe, tmp_path / "tfds", tmp_path / "images")
    for argument in ("ce", "ltkd"):
        config = streamed(tmp_path / "tfds", tmp_path, argument)
        values = {"data.name": "pair", "data.stream": False, "data.subset": "all"}
        results = run(small_runs.changed(config, **values), tmp_path / argument)
        assert results["class_counts"] == [15, 35]
        assert results["group_assignment"] == [1, 0]
        assert list(results["test"]["groups"]) == ["head", "tail"]
    loaded = [load_run(tmp_path / argument) for argument in ("ce", "ltkd")]
    report_page.write_report(loaded, tmp_path / "report.html")
    assert "head" in (tmp_path / "report.html").read_text()


def test_results(finished):
    folder, results = finished
    assert results["train_images"] == sum(results["class_counts"])
    assert results["class_counts"] == [20, 12, 7, 5]
    assert results["teacher_logits"] == "network"
    assert results["config"]["data"]["stream"] is True
    # The test set is balanced, so this shows that each image was counted once.
    per_class = results["test"]["per_class"]
    assert results["test"]["all"] == pytest.approx(np.mean(per_class))
    records = small_runs.records(folder / "run")
    assert [record["epoch"] for record in records] == [1.0, 2.0]


def test_resume_bit_for_bit(finished, data_dir, tmp_path):
    folder, _ = finished
    config = streamed(data_dir, folder)
    _, num_stops = small_runs.run_with_stops(config, tmp_path / "run")
    assert num_stops >= trainer_of(config).total_steps - 1
    assert_same_bits(config, tmp_path / "run", folder / "run")


def test_resume_learned_weights(finished, data_dir, tmp_path):
    folder, _ = finished
    config = streamed(data_dir, folder, "bikd", **LEARNED)
    results = run(config, tmp_path / "run")
    assert results["outer_images"] == 16
    assert set(results["loss_weighting"]["weights"]) == {"ce", "kd"}
    _, num_stops = small_runs.run_with_stops(config, tmp_path / "stopped")
    assert num_stops >= 2
    assert_same_bits(config, tmp_path / "stopped", tmp_path / "run")


def test_several_steps_a_call(finished, data_dir, tmp_path):
    """They change nothing but rounding."""
    folder, _ = finished
    run(streamed(data_dir, folder, steps_per_call=2), tmp_path / "run")
    single = small_runs.records(folder / "run")
    several = small_runs.records(tmp_path / "run")
    assert several[0]["loss"] == pytest.approx(single[0]["loss"], rel=1e-3)


def test_damaged_record(data_dir, tmp_path):
    damaged_dir = shutil.copytree(data_dir, tmp_path / "tfds")
    (file,) = damaged_dir.rglob("insects-train.array_record*")
    content = bytearray(file.read_bytes())
    start = len(content) // 3
    content[start : start + 2000] = bytes(2000)
    file.write_bytes(content)
    for stream in (True, False):
        folder = tmp_path / str(stream)
        config = streamed(damaged_dir, folder, "ce", **{"data.stream": stream})
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
    inputs = input_pipeline.from_disk(
        data.train,
        data.outer if outer else None,
        3,
        step,
        call_sizes,
        shard=shard,
        outer_shard=input_pipeline.BatchShard(np.array(positions), 16),
        lookahead=lookahead,
    )
    return list(inputs)


def assert_left_neighbours(images, neighbours):
    """Checks that `neighbours` are `images`, shifted by one position of the batch."""
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.roll(x, 1, axis=1), y),
        images,
        neighbours,
    )


def test_lookahead_batches(data_dir, tmp_path):
    """Lookahead batches are those of the next steps, also after a resumption."""
    data = load(streamed(data_dir, tmp_path, "bikd", **{"data.outer_per_class": 4}))
    inputs = inputs_from_disk(data, [1] * 6)
    for current, following in zip(inputs, inputs[1:]):
        for x, y in zip(current.train, following.train):
            np.testing.assert_array_equal(x[:, :, 1], y[:, :, 0])
    (resumed,) = inputs_from_disk(data, [2], step=4)
    expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *inputs[4:])
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert inputs[0].outer.images.shape == (1, 16, 8, 8, 3)


@pytest.mark.parametrize("kind", ["memory", "disk", "disk with an outer set"])
def test_shards_of_two_processes(kind, data_dir, tmp_path):
    """Together they are the global batch.

    A neighbour for Mixup may be in the other process's part.
    """
    data = load(streamed(data_dir, tmp_path, "bikd", **{"data.outer_per_class": 4}))

    def epoch_fn(seed, epoch):
        index = jnp.arange(64).reshape(4, 16)
        outer = sampling.BatchIndices(index + 64, index)
        return sampling.BatchIndices(index, -index), outer

    def inputs_of(positions):
        if kind == "memory":
            shard = input_pipeline.BatchShard(np.array(positions), 16, mixup=True)
            calls = input_pipeline.from_memory(
                epoch_fn,
                3,
                0,
                [4],
                steps_per_epoch=4,
                shard=shard,
                outer_shard=input_pipeline.BatchShard(np.array(positions), 16),
            )
        else:
            outer = "outer" in kind
            calls = inputs_from_disk(
                data,
                [4],
                positions=positions,
                mixup=True,
                outer=outer,
                lookahead=2 if outer else 1,
            )
        (inputs,) = calls
        return inputs

    global_inputs = inputs_of(range(16))
    halves = [inputs_of(range(8)), inputs_of(range(8, 16))]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, global_inputs)
    assert_left_neighbours(global_inputs.train, global_inputs.mixup)


def test_random_bits(data_dir, tmp_path):
    """Every position has bits of its own; Mixup also reads its neighbour's."""
    values = {"data.stream": False, "augment.mixup": 0.3}
    config = streamed(data_dir, tmp_path, **values)
    _, inputs = next(trainer_of(config).inputs(0, 0))
    random_bits = inputs.train.random_bits
    assert random_bits.shape == inputs.train.index.shape
    assert len(np.unique(random_bits)) == random_bits.size
    assert_left_neighbours(inputs.train, inputs.mixup)


# The data set.


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.imbalance": 50.0}, "imbalance=50: .*class 2 with 20.*'cat'"),
        ({"data.stream": False, "data.image_size": 0}, "data.image_size"),
        ({"data.name": "wasps"}, "'wasps'.*prepare folder --name wasps"),
        ({"data.name": "cifar1000"}, "'cifar1000'.*'cifar100'"),
        (
            {"data.name": "cifar100"},
            "python -m ltkd_jax.data.prepare cifar100 --data_dir /",
        ),
    ],
)
def test_missing_data(data_dir, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        load(streamed(data_dir, tmp_path, **values))


def test_images_larger_than_memory(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "device_memory", lambda: 10_000)
    values = {"data.stream": False, "data.image_size": 9}
    with pytest.raises(ConfigError, match="data.stream=True"):
        load(streamed(data_dir, tmp_path, **values))


def test_other_images_of_the_same_name(data_dir, tmp_path):
    """They have another teacher and other results."""
    files = pictures.by_class(INSECTS, folder="train/", size=(12, 11))
    files |= pictures.by_class(INSECTS, folder="test/")
    images = tmp_path / "images"
    pictures.write_folder(images, files)
    recipes.prepare(recipes.custom_recipe("insects"), tmp_path / "tfds", images)
    spec = resolve(streamed(data_dir, tmp_path))
    other = resolve(streamed(tmp_path / "tfds", tmp_path))
    assert spec.hash != other.hash and spec.teacher_hash != other.teacher_hash
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    assert resolve(streamed(moved, tmp_path)).hash == spec.hash


def test_subsets(data_dir, tmp_path):
    """Each has other results; a list is identified by its content, not by its path."""

    def spec_of(subset):
        return resolve(streamed(data_dir, tmp_path, **{"data.subset": str(subset)}))

    def spec_of_list(name, lines):
        (tmp_path / name).write_text("\n".join(lines))
        return spec_of(tmp_path / name)

    lines = []
    for label, name in enumerate(sorted(INSECTS)):
        lines += [f"train/{name}/{name}{i}.jpg {label}" for i in range(5 - label)]
    first = spec_of_list("a.txt", lines)
    same = spec_of_list("b.txt", lines)
    shorter = spec_of_list("c.txt", lines[1:])
    assert first.hash == same.hash != shorter.hash
    assert dataset.load(first.data).class_counts.tolist() == [5, 4, 3, 2]
    all_images = spec_of("all")
    class_counts = dataset.load(all_images.data).class_counts.tolist()
    assert class_counts == list(INSECTS.values())
    assert all_images.name.startswith("insects-all-ltkd")
    assert first.name.startswith("insects-a-ltkd")
    with pytest.raises(ConfigError, match="'train/ant/gone.jpg'"):
        dataset.load(spec_of_list("d.txt", ["train/ant/gone.jpg 0"]).data)
    with pytest.raises(ConfigError, match="d.txt"):
        spec_of_list("d.txt", ["train/ant/gone.jpg"])


@pytest.mark.parametrize("number, expected", [(30, [10, 3, 9]), (3, [1, 1, 1])])
def test_part_of_an_uneven_test_set(number, expected, tmp_path):
    """Of a class with too few images for a balanced part, all are taken."""
    size = (12, 10)
    sizes = {"ant": 40, "bee": 3, "cat": 9}
    images = pictures.by_class(sizes, folder="test/", size=size)
    images |= pictures.by_class(sizes, folder="train/", size=size)
    pictures.write_folder(tmp_path / "images", images)
    recipe = recipes.custom_recipe("uneven")
    recipes.prepare(recipe, tmp_path / "tfds", tmp_path / "images")
    values = {"data.dir": str(tmp_path / "tfds"), "data.test_images": number}
    config = small_runs.config_of("folderlt", "ce,name=uneven,image_size=8")
    data = dataset.load(resolve(small_runs.changed(config, **values)).data)
    assert np.bincount(data.test.labels).tolist() == expected
