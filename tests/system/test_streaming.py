"""Streams in processes of their own: a realistic size, and workers that end early."""

import subprocess
import sys
import time

import pytest
from helpers import pictures
from helpers.environments import ROOT, isolated_variables
from helpers.small_runs import prepare_insects

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


STREAM = """
import sys
from ltkd_jax.data import datasets, streaming
train = datasets.load("insects", sys.argv[1], size=8).train
options = dict(seed=0, batch_size=4, first_step=0, num_steps=1000, num_workers=2)
with streaming.batches(train, **options) as batches:
    for batch in batches:
        pass
"""
RUN = """
import sys
from experiments.config import load, spec
from experiments.trainer import run
values = "name=insects,student=resnet8,image_size=8,data.stream=True,data.num_workers=2"
config = load.load_config(f"configs/folderlt.py:ce,smoke,{values}")
config.data.dir = sys.argv[1]
run.run(spec.resolve(config), sys.argv[2], command="")
"""
KILLED = """
import multiprocessing, sys
from ltkd_jax.data import datasets, streaming

def read_until_killed():
    train = datasets.load("insects", sys.argv[1], size=8).train
    options = dict(seed=0, batch_size=4, first_step=0, num_steps=100000, num_workers=2)
    with streaming.batches(train, **options) as batches:
        for step, batch in enumerate(batches):
            if step == 5:
                for process in multiprocessing.active_children():
                    process.kill()

if __name__ == "__main__":
    try:
        read_until_killed()
    except streaming.WorkerError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def insects_dir(tmp_path_factory):
    return prepare_insects(tmp_path_factory.mktemp("insects"))


def run_script(folder, script, *arguments):
    """Runs a script file, and returns its exit code, output, errors and seconds."""
    path = folder / "script.py"
    path.write_text(script)
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, path, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=isolated_variables(PYTHONPATH=str(ROOT)),
        timeout=120,
    )
    seconds = time.monotonic() - start
    return process.returncode, process.stdout, process.stderr, seconds


@pytest.mark.parametrize("script", [STREAM, RUN])
def test_script_without_guard(script, insects_dir, tmp_path):
    arguments = [insects_dir, tmp_path / "run"]
    code, _, errors, seconds = run_script(tmp_path, script, *arguments)
    assert code == 1
    # One traceback, that of the script: the workers end without a word.
    assert errors.count("Traceback") == 1 + errors.count("direct cause"), errors
    assert 'under `if __name__ == "__main__":`' in errors, errors
    assert seconds < 60, errors


def test_killed_worker(insects_dir, tmp_path):
    code, output, errors, _ = run_script(tmp_path, KILLED, insects_dir)
    assert code == 0, errors
    assert "killed by SIGKILL" in output and "num_workers" in output
    assert len(output.splitlines()) == 1
    assert "Traceback" not in errors, errors
