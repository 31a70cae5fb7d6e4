"""Long runs: memory does not grow."""

import json
import os
import subprocess
import sys

import numpy as np
from helpers.small_runs import ROOT, tiny

from experiments.config.spec import resolve

STEPS = 3000
# A run in a process of its own, which notes its memory after every step.
SCRIPT = """
import json, os, sys
from experiments import runtime
from experiments.config.spec import resolve
from experiments.trainer import loop, run
from experiments.trainer.interrupts import StopRequest

samples = []

class Sampling(StopRequest):
    def any_reason(self):
        with open("/proc/self/statm") as file:
            samples.append(os.sysconf("SC_PAGE_SIZE") * int(file.read().split()[1]))
        return super().any_reason()

runtime.initialize()
run.StopRequest = Sampling
config, folder = sys.argv[1:]
run.run(resolve(json.loads(config)), folder + "/run", command="")
with open(folder + "/samples.json", "w") as file:
    json.dump(samples, file)
"""


def test_memory_does_not_grow(tmp_path):
    """Evaluations, records and checkpoints included."""
    values = {
        "data.n_max": 60,
        "teacher.table": "never",
        "teacher.train.max_steps": 5,
        "train.epochs": float(STEPS),
        "train.max_steps": STEPS,
        "eval_every": 4,
        "checkpoint_every": 8,
    }
    config = json.dumps(resolve(tiny(tmp_path, **values)).config)
    environment = {
        **os.environ,
        "LTKD_CACHE": os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache")),
    }
    subprocess.run(
        [sys.executable, "-c", SCRIPT, config, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    memory = np.array(json.loads((tmp_path / "samples.json").read_text())[5:]) / 2**20
    assert len(memory) == STEPS
    # What is allocated once is, and the allocator's fragments have settled, by the end of the first third.
    third = STEPS // 3
    tenth = STEPS // 10
    grown = memory[-tenth:].mean() - memory[third : third + tenth].mean()
    print(f"{memory[third]:.0f} MiB, {grown:+.1f} MiB by the end")
    assert grown < 0.02 * memory[third]
