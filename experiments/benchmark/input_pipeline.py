"""Images per second of a stream, beside a plain loop over the same records."""

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
_WARMUP = 2  # batches before the clock starts: by then worker processes are up


def photographs(root: pathlib.Path, number: int) -> pathlib.Path:
    """Writes a folder of JPEGs of ImageNet's usual size (500×375, some 50 kB), smooth with noise on top."""
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(
            rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        ).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.normal(
            scale=6, size=(375, 500, 3)
        ).astype(np.int16)
        folder = root / ("test" if i < _CLASSES else "train") / f"class{i % _CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            folder / f"{i}.jpg", quality=90
        )
    return root


def plain_loop(train: records.Records, batch_size: int, number: int):
    """Yields the batches of a stream, read by one loop in one thread."""
    order = streaming.Order(0, len(train), batch_size)
    for step in range(number):
        positions = range(step * batch_size, (step + 1) * batch_size)
        yield np.stack(
            [
                train.random_crop(order.index(position), order.rng(position))
                for position in positions
            ]
        )


def _seconds_per_image(batches, batch_size):
    for _ in range(_WARMUP):
        next(batches)
    start = time.perf_counter()
    number = sum(1 for _ in batches)
    return (time.perf_counter() - start) / (number * batch_size)


def measure(
    train: records.Records, batch_size: int, number: int, num_workers, repeats: int
) -> dict[str, float]:
    """Returns the images per second by name; each reads the same batches."""
    number += _WARMUP

    def of_stream(workers):
        options = dict(
            seed=0,
            batch_size=batch_size,
            first_step=0,
            num_steps=number,
            num_workers=workers,
        )
        with streaming.batches(train, **options) as batches:
            return _seconds_per_image(batches, batch_size)

    measures = {
        "plain loop": lambda: _seconds_per_image(
            plain_loop(train, batch_size, number), batch_size
        )
    }
    for workers in num_workers:
        name = f"stream, {workers} workers" if workers else "stream, threads"
        measures[name] = lambda workers=workers: of_stream(workers)
    return {
        name: 1 / seconds
        for name, seconds in timing.best_of_rounds(measures, repeats).items()
    }


def report(
    *, images: int, size: int, batch_size: int, batches: int, num_workers, repeats: int
) -> str:
    """Returns the whole measurement as text."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        photographs(folder / "images", images + _CLASSES)
        recipes.prepare(
            recipes.custom_recipe("photographs"), folder / "tfds", folder / "images"
        )
        train = datasets.load(
            "photographs", folder / "tfds", size=size, margin=True
        ).train
        rates = measure(train, batch_size, batches, num_workers, repeats)
    rows = [
        [name, f"{rate:,.0f}", f"{rate / rates['plain loop']:.2f}"]
        for name, rate in rates.items()
    ]
    lines = [f"{images} JPEGs of 500×375 pixels → {size}×{size}, batch {batch_size}"]
    lines.append(
        writers.as_text(writers.Table(["reading", "images/s", "/ plain loop"], rows))
    )
    return "\n".join([*lines, provenance.short()])
