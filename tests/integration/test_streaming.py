"""Tests that streams give the same bytes from any start and by any processes."""

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
    files = pictures.by_class(COUNTS, folder="train/")
    files |= pictures.by_class(dict.fromkeys(COUNTS, 2), folder="test/")
    pictures.write_folder(folder / "images", files)
    recipes.prepare(
        recipes.custom_recipe("insects"), folder / "tfds", folder / "images"
    )
    return folder / "tfds"


@pytest.fixture(scope="module")
def train(data_dir):
    return datasets.load("insects", data_dir, size=SIZE, margin=True).train


def read(train, first_step, num_steps, **options):
    """Returns copies of the batches of a stream."""
    with streaming.batches(
        train,
        seed=5,
        batch_size=BATCH,
        first_step=first_step,
        num_steps=num_steps,
        **options,
    ) as batches:
        return [jax.tree.map(np.array, batch) for batch in batches]


@pytest.fixture(scope="module")
def reference(train):
    """Returns the first 14 batches."""
    return read(train, 0, 14)


def assert_equal(batches, expected):
    assert len(batches) == len(expected) > 0
    for x, y in zip(jax.tree.leaves(batches), jax.tree.leaves(expected)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_batches_full_with_every_image(train):
    num_steps = -(-len(train) // BATCH)
    num_positions = num_steps * BATCH
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    indices = np.array([order.index(i) for i in range(3 * num_positions)])
    epochs = indices.reshape(3, num_positions).tolist()
    for epoch, next_epoch in itertools.pairwise(epochs):
        assert sorted(epoch[: len(train)]) == list(range(len(train)))
        assert epoch[len(train) :] == next_epoch[: num_positions - len(train)]
    assert epochs[0] != epochs[1]
    labels = [batch.labels for batch in read(train, 0, 3 * num_steps)]
    np.testing.assert_array_equal(np.concatenate(labels), train.labels[indices])


def original_image(key):
    """Returns the label of a key such as "ant/ant7.jpg", and its original image."""
    name, file_name = key.split("/")
    label = sorted(COUNTS).index(name)
    number = int(file_name.removeprefix(name).removesuffix(".jpg"))
    file = io.BytesIO(pictures.picture(label, number, size=(40, 30)))
    return label, Image.open(file)


def test_views_are_random_crops(train):
    """Crops the originals with the generator of each position."""
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    for step, batch in enumerate(read(train, 0, 8)):
        assert batch.images.shape == (BATCH, SIZE, SIZE, 3)
        assert batch.images.dtype == np.uint8
        for i in range(BATCH):
            position = step * BATCH + i
            rng = order.rng(position)
            label, image = original_image(train.keys[order.index(position)])
            expected = resize.random_crop(image, SIZE, rng)
            np.testing.assert_array_equal(batch.images[i], expected)
            assert batch.labels[i] == label
            assert batch.random_bits[i] == rng.integers(2**32, dtype=np.uint32)
    random_bits = [batch.random_bits for batch in read(train, 0, 20)]
    random_bits = np.concatenate(random_bits).tolist()
    assert len(set(random_bits)) == len(random_bits)


def test_any_start_step(train, reference):
    for first_step in (1, 5, 6, 13):
        batches = read(train, first_step, 14 - first_step)
        assert_equal(batches, reference[first_step:])


def test_worker_processes(train, reference):
    """A signal does not end the workers, and the end of the stream does."""
    with streaming.batches(
        train, seed=5, batch_size=BATCH, first_step=3, num_steps=1000, num_workers=2
    ) as batches:
        first_batch = next(batches)
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        copies = [jax.tree.map(np.array, first_batch)]
        for batch in itertools.islice(batches, 10):
            copies.append(jax.tree.map(np.array, batch))
    assert len(workers) >= 2
    assert_equal(copies, reference[3:])
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_positions_by_process(train, reference):
    first_halves = read(train, 2, 6, positions=[0, 1])
    second_halves = read(train, 2, 6, positions=[2, 3])
    batches = jax.tree.map(
        lambda *halves: np.concatenate(halves), first_halves, second_halves
    )
    assert_equal(batches, reference[2:8])
    with pytest.raises(ValueError, match="a batch of 4 has those from 0 to 3"):
        read(train, 0, 1, positions=[3, 4])


def test_seed(train, reference):
    with streaming.batches(
        train, seed=6, batch_size=BATCH, first_step=0, num_steps=6
    ) as batches:
        images = [np.array(batch.images) for batch in batches]
    expected = [batch.images for batch in reference[:6]]
    assert (np.stack(images) != np.stack(expected)).any()


def test_evaluation_batches(train):
    indices = np.arange(23).reshape(23, 1)
    images, labels = zip(*streaming.evaluation_batches(train, indices))
    assert [len(batch_labels) for batch_labels in labels] == [1] * 23
    np.testing.assert_array_equal(np.concatenate(labels), train.labels)
    expected = train.take(np.arange(len(train))).images
    np.testing.assert_array_equal(np.concatenate(images), expected)
    assert train.resize_mode == "margin"


def test_damaged_record(train, monkeypatch):
    def fail(file):
        raise FileNotFoundError("no image")

    monkeypatch.setattr("PIL.Image.open", fail)
    message = "image '.*jpg' in .* does not decode .*prepare it again"
    with pytest.raises(ValueError, match=message):
        read(train, 0, 1)
    with pytest.raises(ValueError, match="does not decode"):
        train.image(0)


def test_records_order_and_pickling(train):
    assert (train.keys[1:] > train.keys[:-1]).all()
    train.image(0)  # opens the files
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy.image(3), train.image(3))
    subset = train.subset(np.array([4, 2]))
    np.testing.assert_array_equal(subset.image(1), train.image(2))


# Resizing.


def test_center_crop():
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, :, None], (40, 80, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    without_margin = resize.center_crop(image, 40, margin=False)
    np.testing.assert_array_equal(without_margin, ramp[:, 20:60])
    with_margin = resize.center_crop(image, 40, margin=True)
    # 35 of 40 pixels, from 22.5 on.
    expected = 22.5 + (np.arange(40) + 0.5) * 35 / 40 - 0.5
    np.testing.assert_allclose(with_margin[0, :, 0], expected, atol=1.0)
    assert resize.center_crop(image.convert("L"), 8, margin=False).shape == (8, 8, 1)


def test_random_crop_areas_and_ratios():
    """The colours of the image are its coordinates, so they show where a crop is."""
    y, x = np.mgrid[:30, :40]
    image = Image.fromarray(np.stack([6 * x, 8 * y, 0 * x], axis=-1).astype(np.uint8))
    crops = []
    for seed in range(2000):
        crops.append(resize.random_crop(image, 8, np.random.default_rng(seed)))
    crops = np.stack(crops).astype(float)
    # 5 of 8 pixels apart; the width is negative if the crop is mirrored.
    width = (crops[:, 4, 6, 0] - crops[:, 4, 1, 0]) / 6 * 8 / 5
    height = (crops[:, 6, 4, 1] - crops[:, 1, 4, 1]) / 8 * 8 / 5
    area = abs(width) * height / (30 * 40)
    ratio = abs(width) / height
    assert 0.06 < area.min() < 0.1 and 0.95 < area.max() < 1.05
    assert 0.65 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.55
    assert 0.45 < np.mean(width < 0) < 0.55
    assert len({crop.tobytes() for crop in crops}) > 1000


@pytest.mark.parametrize("size", [(500, 20), (20, 500), (1, 1), (3, 200)])
def test_random_crop_of_extreme_shapes(size):
    image = Image.new("RGB", size, (10, 20, 30))
    for i in range(200):
        crop = resize.random_crop(image, 8, np.random.default_rng(i))
        assert crop.shape == (8, 8, 3) and (crop == [10, 20, 30]).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1", "LA"])
def test_image_modes(mode):
    image = Image.new(mode, (6, 5))
    assert np.asarray(resize.convert_mode(image, 3)).shape == (5, 6, 3)
