"""Long runs use no more memory than short ones."""

import json
import os
import subprocess
import sys

import numpy as np
from helpers.small_runs import ROOT, tiny

from experiments.config.spec import resolve

STEPS = 3000
# Runs a config in a process of its own, and notes its memory after every step: the
# trainer asks a `StopRequest` at each.
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


def test_memory_is_bounded(tmp_path):
    """Includes evaluations, records and checkpoints."""
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
    cache = os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
    subprocess.run(
        [sys.executable, "-c", SCRIPT, config, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "LTKD_CACHE": cache},
        check=True,
    )
    samples = json.loads((tmp_path / "samples.json").read_text())
    # The teacher's training, of five steps, is sampled first.
    memory = np.array(samples[5:]) / 2**20
    assert len(memory) == STEPS
    # After the first third, everything that is allocated once has been allocated, and
    # the allocator's fragmentation no longer grows.
    third = STEPS // 3
    tenth = STEPS // 10
    growth = memory[-tenth:].mean() - memory[third : third + tenth].mean()
    print(f"{memory[third]:.0f} MiB, {growth:+.1f} MiB by the end")
    assert growth < 0.02 * memory[third]
