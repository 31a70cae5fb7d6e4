"""How long functions take, interleaved, so that a slow minute slows all of them."""

import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

_PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}


def best(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of a call of each, the least of the repeats; they go round the functions, after a round that warms up.

    A function returns when its work is done.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, fn in functions.items():
            start = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


def waiting(fn, *args) -> Callable[[], object]:
    """The call of a JAX function, until its result is there."""
    return lambda: jax.block_until_ready(fn(*args))


def matmul_rate(precision: str, repeats: int = 5) -> float:
    """FLOPs per second of a large matrix product in a run's precision: what this device gives at best."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=_PRECISIONS[precision]))
    return 2 * size**3 / best({"product": waiting(product, x, x)}, repeats)["product"]


def bandwidth(repeats: int = 5) -> float:
    """Bytes per second of a sum of two large arrays into a third: two are read, one is written."""
    x = jnp.ones((4096, 10_000), jnp.float32)
    total = jax.jit(lambda a, b: a + b)
    return 3 * x.nbytes / best({"sum": waiting(total, x, x)}, repeats)["sum"]
