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


class Running:
    """A program in the middle of its training, after a first call.

    Args:
      program: a `build.Program`.
      teacher: what its `TeacherFn` reads.
    """

    def __init__(self, program, teacher=None):
        self.program = program
        self._data = program.train_data(teacher)
        self._state = program.parallel.replicate(program.init(0))
        self._chunks, self._step = iter(()), 0
        self.advance()

    def advance(self) -> int:
        """One call of the compiled chunk, until it is done; returns its steps. After the last step comes the first."""
        found = next(self._chunks, None)
        if found is None:
            self._chunks, self._step = self.program.chunks(0, 0), 0
            found = next(self._chunks)
        count, self._rows = found
        self._state = self.program.chunk(self._step, self._state, self._data, self._rows)
        jax.block_until_ready(self._state.step)
        self._step += count
        return count

    @property
    def period(self) -> int:
        """Steps after which their costs repeat: where the weight net changes in one of k calls, k."""
        learns = self.program.weighting is not None and self.program.steps_per_call == 1
        return self.program.weighting.every if learns else 1

    def seconds(self, steps: int) -> float:
        """Seconds a step, over at least so many, in whole periods."""
        start, done = time.perf_counter(), 0
        while done < steps or done % self.period:
            done += self.advance()
        return (time.perf_counter() - start) / done

    def best(self, *, steps: int, repeats: int) -> float:
        """The least of the repeats of `seconds`, after one that warms up."""
        return min([self.seconds(steps) for _ in range(repeats + 1)][1:])

    def flops(self) -> float:
        """FLOPs a step: a loop's body is counted once."""
        return sum(self._lower(step).cost_analysis()["flops"] for step in range(self.period)) / self.period

    def memory(self) -> int:
        """Bytes of a compiled call: arguments, temporaries and result."""
        found = self._lower(0).compile().memory_analysis()
        arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return arguments + found.temp_size_in_bytes

    def hlo(self) -> str:
        """The compiled call's instructions."""
        return self._lower(0).compile().as_text()

    def _lower(self, step):
        return self.program.lower(step, self._state, self._data, self._rows)


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
