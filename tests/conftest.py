"""What every test shares: eight CPU devices, strict shapes, a compilation cache, the real data where it is."""

import os
import pathlib
import sys

import jax
import pytest

# Compiling is most of the time of the fast suite, and what is compiled runs a few times at most: not optimised, it is
# ready sooner. Child processes take it over.
if "slow" not in sys.argv:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
# `[B] * [B, 1]` is a mistake that broadcasting hides.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _data_dir():
    """Where a prepared TFDS directory may be: $LTKD_DATA, or `shared/tfds` beside the checkout."""
    for place in (os.environ.get("LTKD_DATA"), ROOT.parent / "shared" / "tfds"):
        if place and (pathlib.Path(place) / "cifar100").is_dir():
            return str(place)
    return None


@pytest.fixture(scope="session")
def cifar100_dir():
    """The real CIFAR-100 as TFDS keeps it; a test that needs it skips where it is absent."""
    place = _data_dir()
    if place is None:
        pytest.skip("the real CIFAR-100 is not here: set LTKD_DATA to a prepared TFDS directory")
    return place
