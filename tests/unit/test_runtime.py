"""What every command does first."""

import os
import subprocess
import sys

from helpers.small_runs import ROOT

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SCRIPT = """
import os, jax, jax.numpy as jnp
from experiments import setup
setup.once()
print(os.environ.get("XLA_FLAGS", ""), float(jax.jit(jnp.sin)(0.0)))
"""


def flags(given, known=True):
    script = SCRIPT if known else SCRIPT.replace("setup.once()", 'setup._KNOWING = ("none",); setup.once()')
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compilers_flags_are_completed_and_never_replaced():
    """XLA takes the flag, too: it would end the process at one that it does not know."""
    assert flags("--xla_backend_optimization_level=0").startswith("--xla_backend_optimization_level=0 " + FLAG)
    assert flags(f"{FLAG}=").split()[0] == f"{FLAG}="
    assert FLAG not in flags("", known=False)
