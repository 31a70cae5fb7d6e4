"""Times functions in turns, so that a slow minute slows all of them."""

import time
from collections.abc import Callable, Hashable, Mapping

import jax
import jax.numpy as jnp

_PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}


def best_of_rounds(
    measures: Mapping[Hashable, Callable[[], float]], repeats: int
) -> dict[Hashable, float]:
    """Returns the least value of each measure over `repeats` rounds of all, after a round that warms up."""
    rounds = [
        {name: measure() for name, measure in measures.items()}
        for _ in range(repeats + 1)
    ]
    return {name: min(values[name] for values in rounds[1:]) for name in measures}


def seconds(call: Callable[[], object], number: int = 1) -> float:
    """Returns the seconds of one call, which returns when its work is done, over a number of them."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def best(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the seconds of a call of each, see `best_of_rounds` and `seconds`."""
    return best_of_rounds(
        {name: lambda call=call: seconds(call) for name, call in calls.items()}, repeats
    )


def blocking(fn, *args) -> Callable[[], object]:
    """Returns a call of a JAX function that waits for its result."""
    return lambda: jax.block_until_ready(fn(*args))


class Running:
    """A training in progress, after a first call of its compiled step.

    Args:
      trainer: of the network.
      teacher: what its `TeacherFn` reads.
    """

    def __init__(self, trainer, teacher=None):
        self.trainer = trainer
        self._data = trainer.device_data(teacher)
        self._state = trainer.parallel.replicate(trainer.init(0))
        self._calls = iter(())
        self._step = 0
        self.advance()

    def advance(self) -> int:
        """Makes one call of the compiled step and waits; returns its steps. The first step follows the last."""
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
        """The steps after which costs repeat: k, where the weight net is updated in one of k calls."""
        learned = (
            self.trainer.loss_weighting is not None and self.trainer.steps_per_call == 1
        )
        return self.trainer.loss_weighting.update_every if learned else 1

    def seconds(self, steps: int) -> float:
        """Returns the seconds of a step, over at least so many, in whole periods."""
        start = time.perf_counter()
        done = 0
        while done < steps or done % self.period:
            done += self.advance()
        return (time.perf_counter() - start) / done

    def flops(self) -> float:
        """Returns the FLOPs of a step; a loop's body is counted once."""
        return (
            sum(
                self._lower(step).cost_analysis()["flops"]
                for step in range(self.period)
            )
            / self.period
        )

    def memory(self) -> int:
        """Returns the bytes of a compiled call: arguments, temporaries and result."""
        usage = self._lower(0).compile().memory_analysis()
        arguments = (
            usage.argument_size_in_bytes
            + usage.output_size_in_bytes
            - usage.alias_size_in_bytes
        )
        return arguments + usage.temp_size_in_bytes

    def hlo(self) -> str:
        """Returns the instructions of the compiled call."""
        return self._lower(0).compile().as_text()

    def _lower(self, step):
        return self.trainer.lower(step, self._state, self._data, self._inputs)


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
