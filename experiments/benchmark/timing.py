"""Times functions in turns, so that a slow minute slows all of them."""

import time
from collections.abc import Callable, Hashable, Mapping

import jax
import jax.numpy as jnp

_PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}


def best_of_rounds(measures: Mapping[Hashable, Callable[[], float]], repeats: int) -> dict[Hashable, float]:
    """Returns the least value of each measure over `repeats` rounds of all, after a round that warms up."""
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(repeats + 1)]
    return {name: min(values[name] for values in rounds[1:]) for name in measures}


def seconds(call: Callable[[], object], number: int = 1) -> float:
    """Returns the seconds of one call, which returns when its work is done, over a number of them."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def best(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the seconds of a call of each, see `best_of_rounds` and `seconds`."""
    return best_of_rounds({name: lambda call=call: seconds(call) for name, call in calls.items()}, repeats)


def blocking(fn, *args) -> Callable[[], object]:
    """Returns a call of a JAX function that waits for its result."""
    return lambda: jax.block_until_ready(fn(*args))


class Running:
    """A training in progress, after a first call of its compiled step.

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
        """Makes one call of the compiled step and waits; returns its steps. The first step follows the last."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self._chunks, self._step = self.program.chunks(0, 0), 0
            chunk = next(self._chunks)
        count, self._rows = chunk
        self._state = self.program.chunk(self._step, self._state, self._data, self._rows)
        jax.block_until_ready(self._state.step)
        self._step += count
        return count

    @property
    def period(self) -> int:
        """The steps after which costs repeat: k, where the weight net is updated in one of k calls."""
        learns = self.program.weighting is not None and self.program.steps_per_call == 1
        return self.program.weighting.every if learns else 1

    def seconds(self, steps: int) -> float:
        """Returns the seconds of a step, over at least so many, in whole periods."""
        start = time.perf_counter()
        done = 0
        while done < steps or done % self.period:
            done += self.advance()
        return (time.perf_counter() - start) / done

    def flops(self) -> float:
        """Returns the FLOPs of a step; a loop's body is counted once."""
        return sum(self._lower(step).cost_analysis()["flops"] for step in range(self.period)) / self.period

    def memory(self) -> int:
        """Returns the bytes of a compiled call: arguments, temporaries and result."""
        usage = self._lower(0).compile().memory_analysis()
        arguments = usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
        return arguments + usage.temp_size_in_bytes

    def hlo(self) -> str:
        """Returns the instructions of the compiled call."""
        return self._lower(0).compile().as_text()

    def _lower(self, step):
        return self.program.lower(step, self._state, self._data, self._rows)


def matmul_rate(precision: str, repeats: int = 5) -> float:
    """Returns the FLOPs per second of a large matrix product in a run's precision: this device's best."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=_PRECISIONS[precision]))
    return 2 * size**3 / best({"product": blocking(product, x, x)}, repeats)["product"]


def bandwidth(repeats: int = 5) -> float:
    """Returns the bytes per second of a sum of two large arrays into a third: two are read, one is written."""
    x = jnp.ones((4096, 10_000), jnp.float32)
    total = jax.jit(lambda a, b: a + b)
    return 3 * x.nbytes / best({"sum": blocking(total, x, x)}, repeats)["sum"]
