"""Times functions in alternation, so that a slow minute affects all of them alike."""

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# JAX's name for the matmul precision of a run. None leaves it to the dtype.
_PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}

# Rounds in which the rates of the device are measured.
_REPEATS = 5

_Name = TypeVar("_Name", bound=Hashable)


def best_of_rounds(
    measures: Mapping[_Name, Callable[[], float]], repeats: int
) -> dict[_Name, float]:
    """Returns the smallest value of each measure.

    In each of the `repeats` rounds, every measure is called once. A round before them
    warms up and does not count.
    """
    smallest = {}
    for i in range(repeats + 1):
        for name, measure in measures.items():
            value = measure()
            if i > 0:
                smallest[name] = min(value, smallest.get(name, value))
    return smallest


def seconds(call: Callable[[], object]) -> float:
    """Returns the seconds of a call, which returns only when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the seconds of each call, see `best_of_rounds` and `seconds`."""
    measures = {name: functools.partial(seconds, call) for name, call in calls.items()}
    return best_of_rounds(measures, repeats)


def blocking(fn, *args) -> Callable[[], object]:
    """Returns a call of a JAX function that waits for its result.

    JAX computes asynchronously: without waiting, only the dispatch would be timed.
    """
    return lambda: jax.block_until_ready(fn(*args))


class RunningTraining:
    """Holds a training in progress, after a first call of its compiled step.

    Args:
      trainer: the `Trainer` of the network.
      teacher: the arrays that its `TeacherFn` reads.
    """

    def __init__(self, trainer, teacher=None):
        self.trainer = trainer
        self._data = trainer.device_data(teacher)
        self._state = trainer.parallel.replicate(trainer.init(0))
        # The inputs of the calls to come. When none are left, `advance` makes new ones.
        self._calls: Iterator[tuple[int, Any]] = iter(())
        self._step = 0
        # The first call compiles, so it is made here, where it is not timed.
        self.advance()

    def advance(self) -> int:
        """Makes one call of the compiled step, waits, and returns its number of steps.

        After the last step of the training, it continues with the inputs of the first.
        """
        call = next(self._calls, None)
        if call is None:
            self._calls = self.trainer.inputs(seed=0, step=0)
            self._step = 0
            call = next(self._calls)
        num_steps, self._inputs = call
        self._state = self.trainer.train_steps(
            self._step, self._state, self._data, self._inputs
        )
        jax.block_until_ready(self._state.step)
        self._step += num_steps
        return num_steps

    @property
    def period(self) -> int:
        """Returns the number of steps after which the costs repeat.

        It is k for learned weights and calls of one step: the weight net is updated in
        one of k calls. Otherwise it is 1.
        """
        weighting = self.trainer.loss_weighting
        if weighting is None or self.trainer.steps_per_call > 1:
            return 1
        return weighting.update_every

    def seconds(self, min_steps: int) -> float:
        """Returns the mean seconds of a step, over complete periods."""
        start = time.perf_counter()
        num_steps = 0
        while num_steps < min_steps or num_steps % self.period:
            num_steps += self.advance()
        return (time.perf_counter() - start) / num_steps

    def flops(self) -> float:
        """Returns the mean FLOPs of a step over a period.

        They are counted before compilation, and the body of a loop counts once.
        """
        total = 0.0
        for step in range(self.period):
            total += self._lower(step).cost_analysis()["flops"]
        return total / self.period

    def memory(self) -> int:
        """Returns the bytes of a compiled call: arguments, temporaries and result."""
        return memory_bytes(self._lower(0).compile().memory_analysis())

    def hlo(self) -> str:
        """Returns the instructions of the compiled call."""
        return self._lower(0).compile().as_text()

    def _lower(self, step):
        return self.trainer.lower(step, self._state, self._data, self._inputs)


def memory_bytes(usage: Any) -> int:
    """Returns the bytes of a compiled call by its memory analysis.

    They are those of arguments, results and temporaries; donated arguments and the
    results that take their memory count once.
    """
    return (
        usage.argument_size_in_bytes
        + usage.output_size_in_bytes
        - usage.alias_size_in_bytes
        + usage.temp_size_in_bytes
    )


def matmul_rate(precision: str) -> float:
    """Returns the FLOPs per second of a large matrix product in a run's precision.

    This is the rate that the device can reach at best.
    """
    # Large enough for the device to reach its rate, and small enough to be quick.
    size = 1024 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=_PRECISIONS[precision]))
    times = best({"product": blocking(product, x, x)}, _REPEATS)
    return 2 * size**3 / times["product"]


def bandwidth() -> float:
    """Returns the bytes per second of adding two large arrays.

    Two arrays are read, and one is written.
    """
    x = jnp.ones((4096, 10_000), jnp.float32)
    add = jax.jit(lambda a, b: a + b)
    times = best({"sum": blocking(add, x, x)}, _REPEATS)
    return 3 * x.nbytes / times["sum"]
