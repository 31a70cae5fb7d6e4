"""Measures images per second of a stream, and of a plain loop over the same records."""

import functools
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from experiments import provenance
from experiments.benchmark import timing
from experiments.reporting import writers
from ltkd_jax.data import datasets, records, streaming
from ltkd_jax.data.prepare import recipes

_CLASSES = 8
# Batches before the clock starts: by then the worker processes have started.
_WARMUP = 2


def write_photographs(root: pathlib.Path, number: int) -> None:
    """Writes a folder of JPEGs of ImageNet's usual size, 500×375 and about 50 kB.

    They are smooth with noise on top, so that they compress like photographs.
    """
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noise = rng.normal(scale=6, size=(375, 500, 3)).astype(np.int16)
        pixels = np.asarray(smooth, np.int16) + noise
        split = "test" if i < _CLASSES else "train"
        folder = root / split / f"class{i % _CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i}.jpg", quality=90)


def plain_loop(train: records.Records, batch_size: int, num_batches: int):
    """Yields the batches of a stream, read by one loop in one thread."""
    order = streaming.Order(0, len(train), batch_size)
    for step in range(num_batches):
        images = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            # The stream's own order and random crops, so that the work is the same.
            image = train.random_crop(order.index(position), order.rng(position))
            images.append(image)
        yield np.stack(images)


def _seconds_per_image(batches, batch_size):
    for _ in range(_WARMUP):
        next(batches)
    start = time.perf_counter()
    num_batches = sum(1 for _ in batches)
    return (time.perf_counter() - start) / (num_batches * batch_size)


def measure(
    train: records.Records, batch_size: int, num_batches: int, num_workers, repeats: int
) -> dict[str, float]:
    """Returns {name: images per second} of the plain loop and of streams.

    All of them read the same batches.

    Args:
      train: the records.
      batch_size: images in a batch.
      num_batches: that are timed together.
      num_workers: list of numbers of worker processes; 0 reads by threads.
      repeats: rounds, of which the best counts.
    """
    num_batches += _WARMUP

    def loop_seconds():
        batches = plain_loop(train, batch_size, num_batches)
        return _seconds_per_image(batches, batch_size)

    def stream_seconds(workers):
        with streaming.batches(
            train,
            seed=0,
            batch_size=batch_size,
            first_step=0,
            num_steps=num_batches,
            num_workers=workers,
        ) as batches:
            return _seconds_per_image(batches, batch_size)

    measures = {"plain loop": loop_seconds}
    for workers in num_workers:
        name = f"stream, {workers} workers" if workers else "stream, threads"
        measures[name] = functools.partial(stream_seconds, workers)
    seconds = timing.best_of_rounds(measures, repeats)
    return {name: 1 / value for name, value in seconds.items()}


def report(
    *, images: int, size: int, batch_size: int, batches: int, num_workers, repeats: int
) -> str:
    """Returns the measurement as text."""
    with tempfile.TemporaryDirectory() as folder:
        image_folder = pathlib.Path(folder) / "images"
        data_dir = pathlib.Path(folder) / "tfds"
        write_photographs(image_folder, images + _CLASSES)
        recipes.prepare(recipes.custom_recipe("photographs"), data_dir, image_folder)
        data = datasets.load("photographs", data_dir, size=size, margin=True)
        assert isinstance(data.train, records.Records)
        rates = measure(data.train, batch_size, batches, num_workers, repeats)
    rows = []
    for name, rate in rates.items():
        rows.append([name, f"{rate:,.0f}", f"{rate / rates['plain loop']:.2f}"])
    lines = [
        f"{images} JPEGs of 500×375 pixels → {size}×{size}, batch {batch_size}",
        writers.as_text(writers.Table(["reading", "images/s", "/ plain loop"], rows)),
        provenance.short(),
    ]
    return "\n".join(lines)
