"""Streams of a real size, in processes of their own."""

import subprocess
import sys

from helpers import pictures

from ltkd_jax.data.prepare import recipes

CODE = """
import pathlib, sys
from ltkd_jax.data import datasets, streaming
train = datasets.load("many", sys.argv[1], size=224, margin=True).train
with streaming.batches(train, seed=0, batch_size=64, first_step=0, num_steps=30) as batches:
    for step, batch in enumerate(batches):
        if step % 10 == 9:
            print(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
"""


def test_memory_over_three_epochs(tmp_path):
    files = pictures.by_class(
        {f"class{i:02d}": 32 for i in range(20)}, folder="train/", size=(320, 240)
    )
    files |= pictures.by_class({f"class{i:02d}": 1 for i in range(20)}, folder="test/")
    pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(
        recipes.custom_recipe("many"), tmp_path / "tfds", tmp_path / "images"
    )
    process = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "tfds"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    first, _, third = map(float, process.stdout.split())
    assert third < 1.05 * first + 20, process.stdout
