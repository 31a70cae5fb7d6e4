"""A stream of a realistic size, in a process of its own."""

import subprocess
import sys

from helpers import pictures

from ltkd_jax.data.prepare import recipes

# Prints the resident memory in MiB after each of three epochs of ten steps.
SCRIPT = """
import os, pathlib, sys
from ltkd_jax.data import datasets, streaming

def resident_mib():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

train = datasets.load("many", sys.argv[1], size=224, margin=True).train
stream = streaming.batches(train, seed=0, batch_size=64, first_step=0, num_steps=30)
with stream as batches:
    for step, batch in enumerate(batches):
        if step % 10 == 9:
            print(resident_mib())
"""


def test_memory_over_three_epochs(tmp_path):
    names = [f"class{i:02d}" for i in range(20)]
    files = {
        **pictures.by_class(dict.fromkeys(names, 32), folder="train/", size=(320, 240)),
        **pictures.by_class(dict.fromkeys(names, 1), folder="test/"),
    }
    pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(
        recipes.custom_recipe("many"), tmp_path / "tfds", tmp_path / "images"
    )
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "tfds"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, _, third = map(float, process.stdout.split())
    # 20 MiB are left to the allocator.
    assert third < 1.05 * first + 20, process.stdout
