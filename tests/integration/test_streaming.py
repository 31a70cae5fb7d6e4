"""Streams: the same bytes wherever they start, with any number of workers and processes."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import time

import jax
import numpy as np
import pytest
from helpers import pictures
from PIL import Image

from ltkd_jax.data import datasets, resize, streaming
from ltkd_jax.data.prepare import recipes

COUNTS = {"ant": 9, "bee": 7, "cat": 7}
BATCH, SIZE = 4, 16


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    files = pictures.by_class(COUNTS, folder="train/") | pictures.by_class(
        {n: 2 for n in COUNTS}, folder="test/"
    )
    pictures.write_folder(folder / "images", files)
    recipes.prepare(recipes.custom_recipe("insects"), folder / "tfds", folder / "images")
    return folder / "tfds"


@pytest.fixture(scope="module")
def train(data_dir):
    return datasets.load("insects", data_dir, size=SIZE, margin=True).train


def read(train, first, number, **options):
    with streaming.batches(
        train, seed=5, batch_size=BATCH, first_step=first, num_steps=number, **options
    ) as batches:
        return [
            streaming.StreamedBatch(*(np.array(x) for x in batch)) for batch in batches
        ]


@pytest.fixture(scope="module")
def whole(train):
    """The first 14 batches."""
    return read(train, 0, 14)


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for x, y in zip(jax.tree.leaves(batches), jax.tree.leaves(expected)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_batches_are_full_and_every_image_is_seen(train):
    per_epoch = -(-len(train) // BATCH)
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    epochs = [
        [order.index(e * per_epoch * BATCH + i) for i in range(per_epoch * BATCH)]
        for e in range(3)
    ]
    for epoch, following in zip(epochs, epochs[1:]):
        assert sorted(epoch[: len(train)]) == list(range(len(train)))
        assert epoch[len(train) :] == following[: len(epoch) - len(train)]
    assert epochs[0] != epochs[1]
    labels = [batch.labels for batch in read(train, 0, 3 * per_epoch)]
    np.testing.assert_array_equal(
        np.concatenate(labels), train.labels[np.concatenate(epochs)]
    )


def test_views_are_random_crops_of_the_records(train, data_dir):
    """By the crop's own function and the position's own generator."""
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    for step, batch in enumerate(read(train, 0, 8)):
        assert (
            batch.images.shape == (BATCH, SIZE, SIZE, 3)
            and batch.images.dtype == np.uint8
        )
        for i in range(BATCH):
            position = step * BATCH + i
            rng, index = order.rng(position), order.index(position)
            name, number = (
                train.keys[index].split("/")[0],
                train.keys[index].split("/")[1][3:-4],
            )
            label = sorted(COUNTS).index(name)
            original = Image.open(
                io.BytesIO(pictures.picture(label, int(number), size=(40, 30)))
            )
            np.testing.assert_array_equal(
                batch.images[i], resize.random_crop(original, SIZE, rng)
            )
            assert batch.labels[i] == label and batch.random_bits[i] == rng.integers(
                2**32, dtype=np.uint32
            )
    bits = np.concatenate([batch.random_bits for batch in read(train, 0, 20)])
    assert len(set(bits.tolist())) == bits.size


def test_any_start_gives_the_same_bytes(train, whole):
    for first in (1, 5, 6, 13):
        assert_same(read(train, first, 14 - first), whole[first:])


def test_workers_give_the_same_bytes(train, whole):
    """Two processes read from the middle of an epoch on; a signal does not end them, and none is left behind."""
    with streaming.batches(
        train, seed=5, batch_size=BATCH, first_step=3, num_steps=1000, num_workers=2
    ) as batches:
        first = next(batches)
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        copied = [
            jax.tree.map(np.array, batch)
            for batch in (first, *itertools.islice(batches, 10))
        ]
    assert len(workers) >= 2
    assert_same(copied, whole[3:])
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_each_process_reads_its_positions(train, whole):
    parts = [read(train, 2, 6, positions=positions) for positions in ([0, 1], [2, 3])]
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole[2:8])
    with pytest.raises(ValueError, match="a batch of 4 has those from 0 to 3"):
        read(train, 0, 1, positions=[3, 4])


def test_another_seed_is_another_stream(train, whole):
    with streaming.batches(
        train, seed=6, batch_size=BATCH, first_step=0, num_steps=6
    ) as batches:
        others = [np.array(batch.images) for batch in batches]
    assert any((other != batch.images).any() for other, batch in zip(others, whole))


def test_evaluation_in_order(train):
    images, labels = zip(*streaming.evaluation_batches(train, np.arange(23).reshape(23, 1)))
    assert [len(part) for part in labels] == [1] * 23
    np.testing.assert_array_equal(np.concatenate(labels), train.labels)
    np.testing.assert_array_equal(
        np.concatenate(images), train.take(np.arange(len(train))).images
    )
    assert train.resize_mode == "margin"


def test_damaged_record(train, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda file: open("no image"))
    with pytest.raises(
        ValueError, match="image '.*jpg' in .* does not decode .*prepare it again"
    ):
        read(train, 0, 1)
    with pytest.raises(ValueError, match="does not decode"):
        train.image(0)


def test_records_are_sorted_and_pickle(train):
    assert (train.keys[1:] > train.keys[:-1]).all()
    train.image(0)  # opens the files
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again.image(3), train.image(3))
    part = train.subset(np.array([4, 2]))
    np.testing.assert_array_equal(part.image(1), train.image(2))


# Resizing.


def test_the_middle_of_an_image():
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, :, None], (40, 80, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    whole, margin = (resize.center_crop(image, 40, margin=flag) for flag in (False, True))
    np.testing.assert_array_equal(whole, ramp[:, 20:60])
    # 35 of 40 pixels, from 22.5 on.
    np.testing.assert_allclose(
        margin[0, :, 0], 22.5 + (np.arange(40) + 0.5) * 35 / 40 - 0.5, atol=1.0
    )
    assert resize.center_crop(image.convert("L"), 8, margin=False).shape == (8, 8, 1)


def test_random_crops_have_the_drawn_areas_and_directions():
    """An image whose colours are its coordinates shows where each crop was taken."""
    y, x = np.mgrid[:30, :40]
    image = Image.fromarray(np.stack([6 * x, 8 * y, 0 * x], axis=-1).astype(np.uint8))
    crops = np.stack(
        [resize.random_crop(image, 8, np.random.default_rng(i)) for i in range(2000)]
    ).astype(float)
    width = (
        (crops[:, 4, 6, 0] - crops[:, 4, 1, 0]) / 6 * 8 / 5
    )  # negative where it is mirrored
    height = (crops[:, 6, 4, 1] - crops[:, 1, 4, 1]) / 8 * 8 / 5
    area, ratio = abs(width) * height / (30 * 40), abs(width) / height
    assert 0.06 < area.min() < 0.1 and 0.95 < area.max() < 1.05
    assert 0.65 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.55
    assert 0.45 < np.mean(width < 0) < 0.55
    assert len({crop.tobytes() for crop in crops}) > 1000


@pytest.mark.parametrize("size", [(500, 20), (20, 500), (1, 1), (3, 200)])
def test_random_crops_of_extreme_shapes(size):
    image = Image.new("RGB", size, (10, 20, 30))
    for i in range(200):
        crop = resize.random_crop(image, 8, np.random.default_rng(i))
        assert crop.shape == (8, 8, 3) and (crop == [10, 20, 30]).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1", "LA"])
def test_every_mode_becomes_colour(mode):
    image = Image.new(mode, (6, 5))
    assert np.asarray(resize.convert_mode(image, 3)).shape == (5, 6, 3)
