"""Settings and fixtures of all tests.

The tests run on eight virtual CPU devices, with strict shapes and a compilation cache.
"""

import os
import pathlib

import jax
import pytest

from experiments import runtime

ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM_TESTS = ROOT / "tests" / "system"

jax.config.update("jax_num_cpu_devices", 8)
# `[B] * [B, 1]` is a mistake that broadcasting hides.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
)
# jax's default of one second would leave most of the tests' functions out of the cache.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _selects_system_tests(path):
    return path in SYSTEM_TESTS.parents or path.is_relative_to(SYSTEM_TESTS)


def pytest_configure(config):
    """Turns XLA's optimization off unless system tests are to run.

    Compiling is most of the time of the unit and integration tests, and what they
    compile runs a few times at most. Child processes inherit the setting.
    """
    # XLA reads its flags when the backend starts, so they are set before any test.
    paths = [
        (config.invocation_params.dir / argument.split("::")[0]).resolve()
        for argument in config.args
    ]
    if any(_selects_system_tests(path) for path in paths):
        runtime.set_xla_flags()  # as the commands do
    else:
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="session")
def cifar100_dir():
    """Returns the TFDS directory that holds the real CIFAR-100.

    It is $LTKD_DATA, or `shared/tfds` beside the checkout.
    """
    for folder in (os.environ.get("LTKD_DATA"), ROOT.parent / "shared" / "tfds"):
        if folder and (pathlib.Path(folder) / "cifar100").is_dir():
            return str(folder)
    pytest.skip(
        "the real CIFAR-100 is absent: set LTKD_DATA to a prepared TFDS directory"
    )
