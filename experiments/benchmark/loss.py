"""Measures losses alone: value and gradient with respect to the student's logits.

The lower bound ("floor") is the time to read both logits once and to write the gradient
once, at the bandwidth of adding two large arrays. `optax_kl` is, for comparison, the
distillation loss that optax's functions make; of bfloat16 logits it is computed in
bfloat16, and this library's losses in float32.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import provenance
from experiments.benchmark import timing
from experiments.reporting import writers
from ltkd_jax import groups, losses

# Shapes of the logits, [B, C].
SIZES = ((64, 100), (1024, 1000), (4096, 10_000))
_TEMPERATURE = 4.0

_Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Loss:
    """Describes a loss.

    Attributes:
      fn: `(student logits, teacher logits, labels, temperature, groups) -> [B]`.
      num_groups: of classes; 1 for a loss without groups.
    """

    fn: Callable[..., jax.Array]
    num_groups: int = 1

    def mean_fn(self, num_classes: int) -> Callable[..., jax.Array]:
        """Returns the mean loss of the logits, the labels and the temperature."""
        fractions: tuple[float, ...] = groups.DEFAULT_FRACTIONS
        if self.num_groups != len(fractions):
            fractions = (1 / self.num_groups,) * self.num_groups
        class_groups = groups.ClassGroups.from_counts(
            np.arange(num_classes, 0, -1), fractions=fractions
        )

        def mean_loss(student, teacher, labels, temperature):
            return self.fn(student, teacher, labels, temperature, class_groups).mean()

        return mean_loss


def _kd(student, teacher, labels, temperature, class_groups):
    return losses.kd(student, teacher, temperature=_TEMPERATURE)


def _dkd(student, teacher, labels, temperature, class_groups):
    return losses.dkd(student, teacher, labels, temperature=_TEMPERATURE)


def _ltkd(student, teacher, labels, temperature, class_groups):
    return losses.ltkd(student, teacher, class_groups, temperature=_TEMPERATURE)


def _ltkd_traced(student, teacher, labels, temperature, class_groups):
    """Returns LTKD's loss at a temperature that the compiler does not know."""
    return losses.ltkd(student, teacher, class_groups, temperature=temperature)


def _group_kl(student, teacher, labels, temperature, class_groups):
    terms = losses.group_kl(student, teacher, class_groups)
    return terms.inter + jnp.sum(terms.intra, axis=-1)


def _optax_kl(student, teacher, labels, temperature, class_groups):
    log_predictions = jax.nn.log_softmax(student / _TEMPERATURE)
    log_targets = jax.nn.log_softmax(teacher / _TEMPERATURE)
    kl = optax.losses.kl_divergence_with_log_targets(log_predictions, log_targets)
    return _TEMPERATURE**2 * kl


LOSSES = {
    "kd": Loss(_kd),
    "dkd": Loss(_dkd),
    "ltkd3": Loss(_ltkd, 3),
    "ltkd3_traced": Loss(_ltkd_traced, 3),
    "ltkd10": Loss(_ltkd, 10),
    "ltkd100": Loss(_ltkd, 100),
    "group_kl3": Loss(_group_kl, 3),
    "optax_kl": Loss(_optax_kl),
}


def check_sizes(names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> None:
    """Checks that there are enough classes for the losses' groups.

    Raises:
      ValueError: a loss has more groups than a size has classes.
    """
    for name, (_, num_classes) in itertools.product(names, sizes):
        num_groups = LOSSES[name].num_groups
        if num_groups > num_classes:
            raise ValueError(
                f"{name} has {num_groups} groups of classes: give --sizes with at "
                f"least {num_groups} classes"
            )


def random_logits(size) -> tuple[np.ndarray, np.ndarray]:
    """Returns random logits of a student and a teacher, float32."""
    rng = np.random.default_rng(0)
    student = 3 * rng.standard_normal(size, np.float32)
    teacher = 3 * rng.standard_normal(size, np.float32)
    return student, teacher


def value_and_gradient(loss: Loss, size: tuple[int, int], dtype: str) -> _Call:
    """Returns a call of the compiled mean loss and its gradient."""
    batch_size, num_classes = size
    fn = jax.jit(jax.value_and_grad(loss.mean_fn(num_classes)))
    student, teacher = (jnp.asarray(logits, dtype) for logits in random_logits(size))
    labels = jnp.asarray(np.random.default_rng(1).integers(0, num_classes, batch_size))
    return timing.blocking(fn, student, teacher, labels, _TEMPERATURE)


def report(
    *,
    losses: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    precisions: Sequence[str],
    repeats: int,
    others: Mapping[str, Callable[[tuple[int, int]], _Call]] | None = None,
) -> str:
    """Returns the measurement as text.

    Args:
      losses: some of `LOSSES`.
      sizes: [B, C] of the logits.
      precisions: dtypes of the logits.
      repeats: timed calls of each loss on the largest logits.
      others: `size -> call` of other implementations, in float32, by name.

    Raises:
      ValueError: see `check_sizes`.
    """
    check_sizes(losses, sizes)
    bandwidth = timing.bandwidth()
    rows = []
    for size, dtype in itertools.product(sizes, precisions):
        calls = {name: value_and_gradient(LOSSES[name], size, dtype) for name in losses}
        if others and dtype == "float32":
            calls |= {name: call_of(size) for name, call_of in others.items()}
        num_logits = size[0] * size[1]
        # Calls on small logits are repeated more, since their times vary more.
        rounds = repeats * min(200, max(1, 1_000_000 // num_logits))
        seconds = timing.best(calls, rounds)
        floor = 3 * jnp.dtype(dtype).itemsize * num_logits / bandwidth
        for name in calls:
            row = [str(list(size)), dtype, name]
            row += [f"{1e3 * seconds[name]:.3f}", f"{seconds[name] / floor:.1f}"]
            rows.append(row)
    header = ["logits", "dtype", "loss", "ms", "/ floor"]
    lines = [
        "losses, value and gradient",
        writers.as_text(writers.Table(header, rows, num_text_columns=3)),
        f"bandwidth of a sum: {bandwidth / 1e9:.1f} GB/s",
        provenance.short(),
    ]
    return "\n".join(lines)
