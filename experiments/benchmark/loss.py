"""Measures LTKD's loss alone: value and gradient with respect to student logits.

The lower bound ("floor") is the time to read both logits once and to write the gradient
once, at the bandwidth of adding two large arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import provenance
from experiments.benchmark import timing
from experiments.reporting import writers
from ltkd_jax import groups, losses

# Shapes of the logits, [B, C].
_SHAPES = ((64, 100), (1024, 1000), (4096, 10_000))


def random_logits(shape) -> tuple[np.ndarray, np.ndarray]:
    """Returns random logits of a student and a teacher, float32."""
    rng = np.random.default_rng(0)
    student = 3 * rng.standard_normal(shape, np.float32)
    teacher = 3 * rng.standard_normal(shape, np.float32)
    return student, teacher


def value_and_gradient(shape):
    """Returns a call of the compiled mean loss and its gradient."""
    num_classes = shape[1]
    by_rank = groups.ClassGroups.from_counts(np.arange(num_classes, 0, -1))

    def mean_loss(student, teacher):
        return losses.ltkd(student, teacher, by_rank).mean()

    fn = jax.jit(jax.value_and_grad(mean_loss))
    return timing.blocking(fn, *map(jnp.asarray, random_logits(shape)))


def report(*, repeats: int, pytorch_call_of=None) -> str:
    """Returns the measurement as text.

    Args:
      repeats: timed calls of each implementation on the largest logits.
      pytorch_call_of: `shape -> call` of PyTorch's implementation, to compare with.
    """
    bandwidth = timing.bandwidth()
    header = ["logits", "ms", "/ floor"]
    if pytorch_call_of:
        header += ["PyTorch, ms", "PyTorch / ours"]
    rows = []
    for shape in _SHAPES:
        size = shape[0] * shape[1]
        calls = {"jax": value_and_gradient(shape)}
        if pytorch_call_of:
            calls["pytorch"] = pytorch_call_of(shape)
        # Calls on small logits are repeated more, since their times vary more.
        seconds = timing.best(calls, repeats * max(1, 1_000_000 // size))
        # Three arrays of float32, with four bytes for each number.
        floor = 3 * 4 * size / bandwidth
        row = [
            str(list(shape)),
            f"{1e3 * seconds['jax']:.2f}",
            f"{seconds['jax'] / floor:.1f}",
        ]
        if pytorch_call_of:
            row += [
                f"{1e3 * seconds['pytorch']:.2f}",
                f"{seconds['pytorch'] / seconds['jax']:.2f}",
            ]
        rows.append(row)
    lines = [
        "LTKD's loss, value and gradient, float32",
        writers.as_text(writers.Table(header, rows)),
        f"bandwidth of a sum: {bandwidth / 1e9:.1f} GB/s",
        provenance.short(),
    ]
    return "\n".join(lines)
