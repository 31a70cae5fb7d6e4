"""Streams: the same bytes wherever they start, with any number of workers and processes."""

import io
import multiprocessing
import pickle
import time

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
    place = tmp_path_factory.mktemp("stream")
    files = pictures.by_class(COUNTS, folder="train/") | pictures.by_class({n: 2 for n in COUNTS}, folder="test/")
    pictures.write_folder(place / "images", files)
    recipes.prepare(recipes.own_recipe("insects"), place / "tfds", place / "images")
    return place / "tfds"


@pytest.fixture(scope="module")
def train(data_dir):
    return datasets.load("insects", data_dir, size=SIZE, margin=True).train


def read(train, first, number, **options):
    with streaming.batches(train, seed=5, batch_size=BATCH, first_step=first, num_steps=number, **options) as batches:
        return [streaming.Streamed(*(np.array(x) for x in batch)) for batch in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        for x, y in zip(a, b):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_batches_are_full_and_every_image_is_seen(train):
    per_epoch = -(-len(train) // BATCH)
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    epochs = [[order.index(e * per_epoch * BATCH + i) for i in range(per_epoch * BATCH)] for e in range(3)]
    for epoch, following in zip(epochs, epochs[1:]):
        assert sorted(epoch[: len(train)]) == list(range(len(train)))
        assert epoch[len(train) :] == following[: len(epoch) - len(train)]
    assert epochs[0] != epochs[1]
    labels = [batch.labels for batch in read(train, 0, 3 * per_epoch)]
    np.testing.assert_array_equal(np.concatenate(labels), train.labels[np.concatenate(epochs)])


def test_views_are_random_crops_of_the_records(train, data_dir):
    """By the crop's own function and the position's own generator."""
    order = streaming.Order(seed=5, num_examples=len(train), batch_size=BATCH)
    for step, batch in enumerate(read(train, 0, 8)):
        assert batch.images.shape == (BATCH, SIZE, SIZE, 3) and batch.images.dtype == np.uint8
        for place in range(BATCH):
            position = step * BATCH + place
            rng, index = order.rng(position), order.index(position)
            name, number = train.keys[index].split("/")[0], train.keys[index].split("/")[1][3:-4]
            label = sorted(COUNTS).index(name)
            original = Image.open(io.BytesIO(pictures.picture(label, int(number), size=(40, 30))))
            np.testing.assert_array_equal(batch.images[place], resize.random_crop(original, SIZE, rng))
            assert batch.labels[place] == label and batch.bits[place] == rng.integers(2**32, dtype=np.uint32)
    bits = np.concatenate([batch.bits for batch in read(train, 0, 20)])
    assert len(set(bits.tolist())) == bits.size


def test_it_goes_on_anywhere_bit_for_bit(train):
    whole = read(train, 0, 14)
    for first in (1, 5, 6, 13):
        assert_same(read(train, first, 14 - first), whole[first:])


@pytest.mark.slow
def test_workers_change_nothing(train):
    """Two processes read it, from the middle of an epoch on; none is left behind."""
    whole = read(train, 0, 14)
    assert_same(read(train, 3, 11, workers=2), whole[3:])
    with streaming.batches(train, seed=5, batch_size=BATCH, first_step=0, num_steps=1000, workers=2) as batches:
        assert_same([next(batches)], whole[:1])
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_each_process_reads_its_share(train):
    whole = read(train, 2, 6)
    shares = [read(train, 2, 6, places=places) for places in ([0, 1], [2, 3])]
    together = [streaming.Streamed(*(np.concatenate(parts) for parts in zip(*batch))) for batch in zip(*shares)]
    assert_same(together, whole)
    with pytest.raises(ValueError, match="a batch of 4 has those from 0 to 3"):
        read(train, 0, 1, places=[3, 4])


def test_another_seed_is_another_stream(train):
    with streaming.batches(train, seed=6, batch_size=BATCH, first_step=0, num_steps=6) as batches:
        other = [np.array(batch.images) for batch in batches]
    assert any((a != b.images).any() for a, b in zip(other, read(train, 0, 6)))


def test_evaluation_sees_every_image_once_in_order(train):
    found = list(streaming.in_order(train, np.arange(23).reshape(23, 1)))
    assert [len(labels) for _, labels in found] == [1] * 23
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in found]), train.labels)
    images = np.concatenate([images for images, _ in found])
    np.testing.assert_array_equal(images, train.take(np.arange(len(train))).images)
    assert train.fit == "margin"


def test_a_damaged_record_is_named(train, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda file: open("no image"))
    with pytest.raises(ValueError, match="image '.*jpg' in .* does not decode .*prepare it again"):
        read(train, 0, 1)
    with pytest.raises(ValueError, match="does not decode"):
        train.image(0)


def test_records_may_be_pickled_and_are_sorted(train):
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
    whole, margin = (resize.center(image, 40, margin=flag) for flag in (False, True))
    np.testing.assert_array_equal(whole, ramp[:, 20:60])
    # 35 of 40 pixels, from 22.5 on.
    np.testing.assert_allclose(margin[0, :, 0], 22.5 + (np.arange(40) + 0.5) * 35 / 40 - 0.5, atol=1.0)
    assert resize.center(image.convert("L"), 8, margin=False).shape == (8, 8, 1)


@pytest.mark.parametrize("size", [(40, 30), (500, 20), (20, 500), (1, 1), (3, 200)])
def test_random_parts_lie_inside_and_have_the_drawn_areas(size):
    boxes = np.array([resize._draw_box(*size, np.random.default_rng(i)) for i in range(2000)], float)
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= size[0]).all() and (bottom <= size[1]).all()
    width, height = right - left, bottom - top
    assert (width >= 1).all() and (height >= 1).all()
    if size == (40, 30):
        area = width * height / (size[0] * size[1])
        assert area.min() > 0.06 and area.max() == 1.0
        assert 0.7 < (width / height).min() and (width / height).max() < 1.45
        assert len({tuple(box) for box in boxes}) > 1000


def test_half_of_the_parts_are_mirrored():
    ramp = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (30, 40, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    crops = [resize.random_crop(image, 8, np.random.default_rng(i))[4, :, 0].astype(int) for i in range(400)]
    mirrored = np.mean([crop[0] > crop[-1] for crop in crops])
    assert 0.42 < mirrored < 0.58


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1", "LA"])
def test_every_mode_becomes_colour(mode):
    image = Image.new(mode, (6, 5))
    assert np.asarray(resize.in_mode(image, 3)).shape == (5, 6, 3)


@pytest.mark.slow
def test_memory_does_not_grow_over_three_epochs(tmp_path):
    """Of a stream of a real size, in a process of its own."""
    import subprocess
    import sys

    files = pictures.by_class({f"class{i:02d}": 60 for i in range(20)}, folder="train/", size=(320, 240))
    files |= pictures.by_class({f"class{i:02d}": 1 for i in range(20)}, folder="test/")
    pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(recipes.own_recipe("many"), tmp_path / "tfds", tmp_path / "images")
    code = f"""
import resource
from ltkd_jax.data import sources, stream
train = sources.load("many", {str(tmp_path / "tfds")!r}, size=224, margin=True).train
peaks = []
with stream.batches(train, seed=0, batch_size=64, first_step=0, num_steps=57) as batches:
    for step, batch in enumerate(batches):
        if step % 19 == 18:
            peaks.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20)
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = map(float, done.stdout.split())
    assert third < 1.05 * first + 20, done.stdout
