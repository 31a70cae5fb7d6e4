"""Long runs: memory does not grow, and the last steps are as fast as the first."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.small_runs import ROOT

STEPS = 2000
# The program itself, which notes when each step ended and how much memory it then had.
SAMPLED = """
import os, sys, time
from absl import app
from experiments import main, train

samples, tick = [], train.Clock.tick

def sampled(clock, steps):
    tick(clock, steps)
    with open("/proc/self/statm") as file:
        samples.append((time.monotonic(), os.sysconf("SC_PAGE_SIZE") * int(file.read().split()[1])))

train.Clock.tick = sampled
path = sys.argv.pop()
try:
    app.run(main.main, flags_parser=main.parse_flags)
finally:
    with open(path, "w") as file:
        file.writelines(f"{moment} {memory}\\n" for moment, memory in samples)
"""


@pytest.mark.slow
def test_two_thousand_steps_of_the_demo(tmp_path):
    """Evaluations, logs and checkpoints included."""
    values = {
        "teacher.cache": tmp_path / "teachers", "teacher.train.max_steps": 20, "teacher.table": "never",
        "train.epochs": float(STEPS), "train.max_steps": STEPS,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    words = ["--config=configs/digitslt.py:ltkd", f"--workdir={tmp_path / 'run'}", *flags, str(tmp_path / "samples")]
    environment = {**os.environ, "LTKD_CACHE": os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))}
    subprocess.run([sys.executable, "-c", SAMPLED, *words], cwd=ROOT, env=environment, check=True)
    moments, memory = np.loadtxt(tmp_path / "samples").T
    assert len(moments) == 20 + STEPS
    moments, memory, tenth = moments[20:], memory[20:] / 2**20, STEPS // 10
    # By a tenth's fast steps, since a machine has other things to do now and then.
    first, last = (1 / np.percentile(np.diff(part), 10) for part in (moments[:tenth], moments[-tenth:]))
    # What is allocated once is, by the end of the first tenth; the allocator's own fragments settle.
    grown = memory[-tenth:].mean() - memory[tenth : 2 * tenth].mean()
    print(f"{first:.1f} steps/s, then {last:.1f}; {memory[tenth]:.0f} MiB, {grown:+.1f} MiB by the end")
    assert last > 0.9 * first
    assert grown < 0.02 * memory[tenth]
