"""What every command does first."""

import sys

from helpers.environments import run

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SCRIPT = f"""
import importlib.metadata, os, sys, jax, jax.numpy as jnp
from experiments import runtime

def completed(flags):
    os.environ["XLA_FLAGS"] = flags
    runtime.initialize()
    return os.environ["XLA_FLAGS"]

assert completed("{FLAG}=") == "{FLAG}="
assert completed("--xla_a=0").startswith("--xla_a=0 {FLAG}=-")
version, importlib.metadata.version = importlib.metadata.version, lambda name: "9.9"
assert completed("") == ""
importlib.metadata.version = version
assert completed("").startswith("{FLAG}")
print(float(jax.jit(jnp.cos)(0.0)))
"""


def test_compiler_flags_are_completed_and_never_replaced():
    """Neither where the user sets the flag nor for a jaxlib that may not know it; XLA accepts it."""
    assert run(sys.executable, "-c", SCRIPT).strip() == "1.0"
