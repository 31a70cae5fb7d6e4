"""LTKD's loss alone, value and gradient by the student's logits, beside what its bytes cost at least.

The floor: both logits read once and the gradient written once, at the bandwidth of a sum of two large arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import provenance
from experiments.benchmark import timing
from experiments.reporting import writers
from ltkd_jax import groups, losses

_SIZES = ((64, 100), (1024, 1000), (4096, 10_000))


def logits(size) -> tuple[np.ndarray, np.ndarray]:
    """Returns random logits of a student and a teacher."""
    rng = np.random.default_rng(0)
    return tuple(3 * rng.standard_normal(size, np.float32) for _ in range(2))


def value_and_gradient(size):
    """Returns a call of the compiled mean loss and its gradient."""
    by_rank = groups.ClassGroups.from_counts(np.arange(size[1], 0, -1))
    fn = jax.jit(
        jax.value_and_grad(
            lambda student, teacher: losses.ltkd(student, teacher, by_rank).mean()
        )
    )
    return timing.blocking(fn, *map(jnp.asarray, logits(size)))


def report(*, repeats: int, twin=None) -> str:
    """Returns the measurement as text.

    Args:
      repeats: timed calls of each.
      twin: `size -> call` of PyTorch's implementation, to compare with.
    """
    bandwidth = timing.bandwidth()
    rows = []
    for size in _SIZES:
        calls = {"ours": value_and_gradient(size)} | (
            {"twin": twin(size)} if twin else {}
        )
        # Small ones are called often enough to be timed.
        seconds = timing.best(calls, repeats * max(1, 1_000_000 // (size[0] * size[1])))
        floor = 3 * 4 * size[0] * size[1] / bandwidth
        row = [
            str(list(size)),
            f"{1e3 * seconds['ours']:.2f}",
            f"{seconds['ours'] / floor:.1f}",
        ]
        if twin:
            row += [
                f"{1e3 * seconds['twin']:.2f}",
                f"{seconds['twin'] / seconds['ours']:.2f}",
            ]
        rows.append(row)
    header = ["logits", "ms", "/ floor"] + (
        ["PyTorch, ms", "PyTorch / ours"] if twin else []
    )
    lines = [
        "LTKD's loss, value and gradient, float32",
        writers.as_text(writers.Table(header, rows)),
    ]
    return "\n".join(
        [*lines, f"bandwidth of a sum: {bandwidth / 1e9:.1f} GB/s", provenance.short()]
    )
