"""Images per second of a stream, beside a plain loop over the same records."""

import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from experiments import provenance
from experiments.reporting import writers
from ltkd_jax.data import datasets, records, streaming
from ltkd_jax.data.prepare import recipes

_CLASSES, _FIRST = 8, 2  # batches before the clock starts: by then workers are up


def photographs(root: pathlib.Path, number: int) -> pathlib.Path:
    """A folder of JPEGs of ImageNet's usual size (500×375, some 50 kB), smooth with noise on top."""
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.normal(scale=6, size=(375, 500, 3)).astype(np.int16)
        folder = root / ("test" if i < _CLASSES else "train") / f"class{i % _CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return root


def plain_loop(train: records.Records, batch_size: int, first: int, number: int):
    """What a stream gives, by one loop in one thread."""
    order = streaming.Order(0, len(train), batch_size)
    for step in range(first, first + number):
        positions = range(step * batch_size, (step + 1) * batch_size)
        yield np.stack([train.crop(order.index(position), order.rng(position)) for position in positions])


def rate(batches, batch_size: int) -> float:
    """Images per second of an iterator of batches, after the first few."""
    for _ in range(_FIRST):
        next(batches)
    start, number = time.perf_counter(), sum(1 for _ in batches)
    return number * batch_size / (time.perf_counter() - start)


def measure(train: records.Records, batch_size: int, number: int, workers) -> dict[str, float]:
    """Images per second by name; each reads the same batches."""
    number += _FIRST
    rates = {"plain loop": rate(plain_loop(train, batch_size, 0, number), batch_size)}
    for count in workers:
        with streaming.batches(
            train, seed=0, batch_size=batch_size, first_step=0, num_steps=number, workers=count
        ) as batches:
            rates[f"stream, {count} workers" if count else "stream, threads"] = rate(batches, batch_size)
    return rates


def report(*, images: int, size: int, batch_size: int, batches: int, workers, repeats: int) -> str:
    """The whole measurement as text: the best of the repeats, which go round what is measured."""
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        photographs(place / "images", images + _CLASSES)
        recipes.prepare(recipes.own_recipe("photographs"), place / "tfds", place / "images")
        train = datasets.load("photographs", place / "tfds", size=size, margin=True).train
        rounds = [measure(train, batch_size, batches, workers) for _ in range(repeats)]
    best = {name: max(found[name] for found in rounds) for name in rounds[0]}
    rows = [[name, f"{value:,.0f}", f"{value / best['plain loop']:.2f}"] for name, value in best.items()]
    return "\n".join(
        [
            f"{images} JPEGs of 500×375 pixels → {size}×{size}, batch {batch_size}",
            writers.as_text(writers.Table(["reading", "images/s", "/ plain loop"], rows)),
            provenance.short(),
        ]
    )
