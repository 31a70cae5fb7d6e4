"""Runs whose images stay on disk, and runs with more augmentation: whole, interrupted, with any number of workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pictures
from helpers.small_runs import INSECTS, ROOT, config_of, parameters, prepare_insects, run, streamed

from experiments.config import checks
from experiments.trainer import build, dataset, input_pipeline, loop
from experiments.trainer import run as runs
from ltkd_jax.data import sampling
from ltkd_jax.data.prepare import recipes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_insects(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="module")
def done(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    config = streamed(data_dir, folder)
    return config, folder, run(config, folder / "run")


def test_a_streamed_run(done):
    config, folder, results = done
    assert results["train_images"] == sum(results["class_counts"]) and results["class_counts"] == [20, 12, 7, 5]
    assert results["teacher_logits"] == "network" and results["config"]["data"]["stream"] is True
    # The test is balanced: each image was counted once.
    assert results["test"]["all"] == pytest.approx(np.mean(results["test"]["per_class"]))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1.0, 2.0]


def until_it_ends(config, workdir):
    """Stopped after every chunk, until it ends; how many times that was."""
    for stops in range(1000):
        try:
            runs.run(config, workdir, command="", deadline=time.monotonic() + 0.01)
            return stops
        except loop.Stopped:
            pass


def same(config, one, other):
    assert parameters(one, config) == parameters(other, config)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_stopped_at_every_step_it_ends_bit_for_bit_the_same(done, tmp_path):
    config, folder, _ = done
    assert until_it_ends(config, tmp_path / "run") >= build.student_program(config, "network").total_steps - 1
    same(config, tmp_path / "run", folder / "run")


@pytest.mark.slow
def test_two_workers_change_nothing(done, data_dir, tmp_path):
    """In a whole run, and in one that goes on with them where another stopped."""
    config, folder, _ = done
    reading = streamed(data_dir, folder, **{"data.workers": 2})
    assert checks.config_hash(reading) == checks.config_hash(config)
    run(reading, tmp_path / "whole")
    same(config, tmp_path / "whole", folder / "run")
    with pytest.raises(loop.Stopped):
        runs.run(config, tmp_path / "resumed", command="", deadline=time.monotonic() + 0.01)
    run(reading, tmp_path / "resumed")
    same(config, tmp_path / "resumed", folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"parallel": "pmap"}, {"steps_per_call": 2}])
def test_modes_change_nothing_but_rounding(done, data_dir, tmp_path, values):
    _, folder, _ = done
    run(streamed(data_dir, folder, **values), tmp_path / "run")
    a, b = (json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0]) for place in (folder, tmp_path))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [1, 2])
def test_learned_weights_from_a_stream_resume_bit_for_bit(data_dir, tmp_path, lookahead):
    config = streamed(data_dir, tmp_path, "bikd", **{"weighting.lookahead": lookahead, "data.meta_per_class": 4})
    results = run(config, tmp_path / "run")
    assert results["meta_images"] == 16 and set(results["weighting"]["weights"]) == {"ce", "kd"}
    assert until_it_ends(config, tmp_path / "stopped") >= 2
    same(config, tmp_path / "stopped", tmp_path / "run")


def test_a_lookahead_reads_the_next_batches_of_the_stream(data_dir, tmp_path):
    """What a step looks ahead to is what the next steps are trained on, from wherever it starts."""
    data = dataset.load(streamed(data_dir, tmp_path, "bikd", **{"data.meta_per_class": 4}))
    source = input_pipeline.FromDisk(
        data.train, data.meta, places=input_pipeline.Places(np.arange(16), 16), total_steps=6, ahead=2
    )
    rows = list(source.rows(3, 0, [1] * 6))
    for now, following in zip(rows, rows[1:]):
        for x, y in zip(now.train, following.train):
            np.testing.assert_array_equal(x[:, :, 1], y[:, :, 0])
    later = list(source.rows(3, 4, [2]))
    expected = jax.tree.map(lambda *parts: np.concatenate(parts), *rows[4:])
    jax.tree.map(np.testing.assert_array_equal, later[0], expected)
    assert rows[0].meta.images.shape == (1, 16, 8, 8, 3)


@pytest.mark.parametrize("kind", ["memory", "disk", "disk, with a meta set"])
def test_the_shares_of_two_processes_are_the_whole(kind, data_dir, tmp_path):
    """Mixup's partners are the neighbours in the global batch, which may be another process's."""
    data = dataset.load(streamed(data_dir, tmp_path, "bikd", **{"data.meta_per_class": 4}))
    meta = data.meta if "meta" in kind else None

    def rows(own):
        places = input_pipeline.Places(np.array(own), 16, mixes=True)
        if kind == "memory":
            numbers = jnp.arange(64).reshape(4, 16)
            source = input_pipeline.FromMemory(lambda seed, epoch: sampling.Plan(numbers, -numbers), 4, places)
        else:
            source = input_pipeline.FromDisk(data.train, meta, places=places, total_steps=4, ahead=2 if meta else 1)
        (found,) = source.rows(3, 0, [4])
        return found

    whole, halves = rows(range(16)), [rows(range(8)), rows(range(8, 16))]
    together = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *halves)
    jax.tree.map(np.testing.assert_array_equal, together, whole)
    paired = whole.train if meta else whole
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.roll(x, 1, axis=1), y), *paired)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_for_the_program_not_for_its_workers(data_dir, tmp_path, number):
    """As a terminal and as a scheduler send it: the run saves, and no worker is left."""
    words = ["--config=configs/folderlt.py:ce,name=insects,epochs=9000,student=resnet8,image_size=8,data.stream=True"]
    words += ["--config.data.workers=2", f"--config.data.dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    program = subprocess.Popen(
        [sys.executable, "-m", "experiments.main", *words],
        cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(program.pid, number)
    _, error = program.communicate(timeout=100)
    assert program.returncode == 75 and "and saved" in error, error[-2000:]
    with pytest.raises(ProcessLookupError):
        for _ in range(300):
            os.killpg(program.pid, 0)
            time.sleep(0.1)


# More augmentation.


@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_rows_with_more_augmentation(data_dir, tmp_path, mixup):
    """Every position has its own bits, and for Mixup its neighbour's row too."""
    values = {"data.stream": False, "augment.cutout": 4, "augment.mixup": mixup}
    config = streamed(data_dir, tmp_path, **values)
    data = dataset.load(config)
    assert build.teacher_kind(config, data) == "network"
    program = build.student_program(config, "network")
    first, again = (next(program.chunks(0, 0))[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    rows = first.rows if mixup else first
    assert rows.bits.shape == rows.index.shape and len(np.unique(rows.bits)) == rows.bits.size
    if mixup:
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.roll(x, 1, axis=1), y), first.rows, first.partners)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("argument", ["ltkd", "bikd"])
def test_a_run_with_all_of_it(data_dir, tmp_path, argument, stream):
    """AutoAugment, Cutout and Mixup, in memory and streamed; one device's losses are eight devices'."""
    values = {"augment.policy": "autoaugment", "augment.cutout": 3, "augment.mixup": 0.2, "data.stream": stream}
    values |= {"data.meta_per_class": 4} if argument == "bikd" else {}
    losses = []
    for parallel in ("jit", "pmap"):
        config = streamed(data_dir, tmp_path, argument, **values, parallel=parallel)
        results = run(config, tmp_path / parallel)
        assert results["teacher_logits"] == "network" and results["config"]["augment"]["mixup"] == 0.2
        line = json.loads((tmp_path / parallel / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(line["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["reviewkd", "bikd,terms=reviewkd"])
def test_features_are_distilled_in_every_mode(data_dir, tmp_path, argument):
    values = {"data.stream": False} | ({"data.meta_per_class": 4} if "bikd" in argument else {})
    losses = []
    for parallel in ("jit", "pmap"):
        results = run(streamed(data_dir, tmp_path, argument, parallel=parallel, **values), tmp_path / parallel)
        assert results["teacher_logits"] == "features"
        line = json.loads((tmp_path / parallel / "metrics.jsonl").read_text().splitlines()[0])
        assert set(line["terms"]) == {"ce", "review"} and line["terms"]["review"] > 0
        losses.append(line["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "argument, values, message",
    [
        ("ltkd", {"data.image_size": 0}, "config.data.image_size=0 must be set for a stream"),
        ("ltkd", {"data.image_size": 4}, "config.data.image_size=4 must be 0"),
        (
            "ltkd",
            {"data.subset": "none.txt"},
            "config.data.subset='none.txt' must be one of exponential, all, or the path",
        ),
        ("ltkd", {"data.workers": -1}, "config.data.workers=-1 must not be negative"),
        ("ltkd", {"teacher.table": "always"}, "'always'.*the views of an image have no end"),
        (
            "ltkd",
            {"teacher.table": "always", "data.stream": False, "augment.cutout": 3},
            "views of an image have no end",
        ),
        ("reviewkd", {"teacher.table": "always", "data.stream": False}, "needs the teacher's features"),
        (
            "ltkd",
            {"augment.policy": "randaugment"},
            "config.augment: policy='randaugment' must be one of none, autoaug",
        ),
        ("ltkd", {"augment.mixup": -0.2}, "config.augment: .*mixup=-0.2 must not be negative"),
        ("ltkd", {"data.name": "fashion_mnist", "augment.policy": "autoaugment"}, "a policy for photographs"),
        ("ltkd", {"data.name": "digits"}, "data.stream=True must be False for digits"),
        ("ltkd", {"data.name": ""}, "config.data.name='' must be the name of a data set"),
    ],
)
def test_what_does_not_fit_is_told(data_dir, tmp_path, argument, values, message):
    with pytest.raises(checks.ConfigError, match=message):
        checks.validate(streamed(data_dir, tmp_path, argument, **values))


def test_what_the_data_does_not_allow_is_told(data_dir, tmp_path):
    for values, message in (
        ({"data.imbalance": 50.0}, "imbalance=50.0: with n_max=20 class 3 would get 0 images"),
        ({"data.name": "digits", "data.image_size": 8, "data.stream": False}, "digits are 8 pixels wide"),
        ({"data.stream": False, "data.image_size": 0}, "its images differ in size: set data.image_size"),
        ({"data.name": "wasps"}, "'wasps' is unknown.*prepare folder --name wasps"),
    ):
        with pytest.raises(checks.ConfigError, match=message):
            dataset.load(streamed(data_dir, tmp_path, **values))


def test_the_same_name_with_other_images_is_another_data_set(data_dir, tmp_path):
    """Their teacher and their results are not those of the first."""
    files = pictures.by_class(INSECTS, folder="train/", size=(12, 11)) | pictures.by_class(INSECTS, folder="test/")
    pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(recipes.own_recipe("insects"), tmp_path / "tfds", tmp_path / "images")
    one, other = streamed(data_dir, tmp_path), streamed(tmp_path / "tfds", tmp_path)
    assert checks.config_hash(one) != checks.config_hash(other)
    assert checks.teacher_hash(one) != checks.teacher_hash(other)
    shutil.copytree(data_dir, tmp_path / "moved")
    assert checks.config_hash(streamed(tmp_path / "moved", tmp_path)) == checks.config_hash(one)


def test_what_a_student_cannot_be_is_told_before_a_teacher_is_trained(data_dir, tmp_path):
    config = streamed(data_dir, tmp_path, "reviewkd", **{"student.model": "vgg8", "data.stream": False})
    with pytest.raises(checks.ConfigError, match="the student has 4, the teacher 3"):
        run(config, tmp_path / "run")
    config = streamed(data_dir, tmp_path, **{"augment.cutout": 8, "data.stream": False})
    with pytest.raises(checks.ConfigError, match="augment.cutout=8 blackens images"):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "teachers").glob("*/results.json"))


def test_a_damaged_record_stops_a_run_in_one_line(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "tfds")
    (file,) = (tmp_path / "tfds").rglob("insects-train.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    file.write_bytes(data)
    for streams in (True, False):
        with pytest.raises(checks.ConfigError, match="prepare it again"):
            run(
                streamed(tmp_path / "tfds", tmp_path / str(streams), **{"data.stream": streams}),
                tmp_path / f"run{streams}",
            )


def test_imbalance_without_a_draw_is_told():
    with pytest.raises(ValueError, match="imbalance=5 does nothing where subset='all': add subset=exponential"):
        config_of("folderlt", "ltkd,name=birds,imbalance=5")


def test_images_too_large_for_the_memory_are_to_be_streamed(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "device_memory", lambda: 10_000)
    with pytest.raises(checks.ConfigError, match="more than half of the device's memory: set data.stream=True"):
        dataset.load(streamed(data_dir, tmp_path, **{"data.stream": False, "data.image_size": 9}))


def test_a_list_and_a_set_as_it_is(data_dir, tmp_path):
    """Each is another result; a list counts by what it says, not by where it lies."""
    lists = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    lines = [
        f"train/{name}/{name}{i}.jpg {label}" for label, name in enumerate(sorted(INSECTS)) for i in range(5 - label)
    ]
    for path in lists[:2]:
        path.write_text("\n".join(lines))
    lists[2].write_text("\n".join(lines[1:]))
    listed = [streamed(data_dir, tmp_path, **{"data.subset": str(path)}) for path in lists]
    assert dataset.load(listed[0]).class_counts.tolist() == [5, 4, 3, 2]
    hashes = [checks.config_hash(config) for config in listed]
    assert hashes[0] == hashes[1] != hashes[2]
    whole = streamed(data_dir, tmp_path, **{"data.subset": "all"})
    assert dataset.load(whole).class_counts.tolist() == list(INSECTS.values())
    assert runs.default_workdir(whole).startswith("runs/insects-all-ltkd")
    assert runs.default_workdir(listed[0]).startswith("runs/insects-a-ltkd")
    lists[0].write_text("train/ant/gone.jpg 0")
    with pytest.raises(checks.ConfigError, match="'train/ant/gone.jpg' and 0 more of its 1 images are not"):
        dataset._load.cache_clear()
        dataset.load(listed[0])
