"""The set-up that every command needs."""

import sys

from helpers.environments import run

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SCRIPT = f"""
import importlib.metadata, os, sys, jax, jax.numpy as jnp
from experiments import runtime

def flags_after(flags):
    os.environ["XLA_FLAGS"] = flags
    runtime.initialize()
    return os.environ["XLA_FLAGS"]

assert flags_after("{FLAG}=") == "{FLAG}="
assert flags_after("--xla_a=0").startswith("--xla_a=0 {FLAG}=-")
version = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9"
assert flags_after("") == ""
importlib.metadata.version = version
assert flags_after("").startswith("{FLAG}")
print(float(jax.jit(jnp.cos)(0.0)))
"""


def test_xla_flags_are_added_but_not_replaced():
    """A user's value is kept, other versions of jaxlib get none; XLA accepts it."""
    assert run(sys.executable, "-c", SCRIPT).strip() == "1.0"
