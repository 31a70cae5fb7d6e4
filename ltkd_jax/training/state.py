"""The training state, which every step updates and every checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ltkd_jax.bilevel import PyTree
from ltkd_jax.models import Model


class EpochSums(NamedTuple):
    """Holds sums over the steps of an epoch, from which its log record is made.

    They are kept on the device, so that no step waits for the host.

    Attributes:
      terms: float `[T]`, sum over steps of each term's batch mean.
      loss: float scalar, sum over steps of the batch mean of the weighted loss.
      correct: float scalar, number of correct predictions on training images.
      steps: int scalar, number of steps summed.
      bad_step: int scalar, the first step whose loss was not finite; −1 if none.
      bad_terms: bool `[T]`, the terms that were not finite at that step.
      learned: `LearnedSums` where the weights are learned, else ().
    """

    terms: jax.Array
    loss: jax.Array
    correct: jax.Array
    steps: jax.Array
    bad_step: jax.Array
    bad_terms: jax.Array
    learned: Any = ()


class LearnedSums(NamedTuple):
    """Holds sums about learned weights, over the examples of each class group.

    Attributes:
      outer_loss: float scalar, sum over steps.
      weights: float `[G, T]`.
      features: float `[G, F]`, the weight net's input.
      examples: float `[G]`, number of examples summed.
    """

    outer_loss: jax.Array
    weights: jax.Array
    features: jax.Array
    examples: jax.Array


class TrainState(NamedTuple):
    """Holds all that changes during training, as a pytree of arrays.

    It has no random key: batches are a function of the seed and `step` alone, so that
    a resumed run draws the same ones.

    Attributes:
      step: int scalar, number of steps taken.
      params: the student's parameters.
      batch_stats: its batch norm statistics.
      opt_state: its optimizer's state.
      sums: sums of the current epoch.
      meta: `bilevel.MetaState` where the weights are learned, else ().
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    sums: EpochSums
    meta: Any = ()

    @property
    def variables(self) -> dict[str, PyTree]:
        """Returns the student's variables, as `model.apply` expects them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_sums(num_terms: int) -> EpochSums:
    """Returns the sums before the first step, for T terms with static weights."""
    return EpochSums(
        terms=jnp.zeros(num_terms),
        loss=jnp.zeros(()),
        correct=jnp.zeros(()),
        steps=jnp.zeros((), jnp.int32),
        bad_step=-jnp.ones((), jnp.int32),
        bad_terms=jnp.zeros(num_terms, bool),
    )


def reset_sums(sums: EpochSums) -> EpochSums:
    """Returns the sums at the start of an epoch, of the same shapes as `sums`."""
    zeros = jax.tree.map(jnp.zeros_like, sums)
    return zeros._replace(bad_step=-jnp.ones_like(sums.bad_step))


def create(
    model: Model,
    optimizer: optax.GradientTransformation,
    num_terms: int,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
) -> TrainState:
    """Returns the state of a new student, with static weights.

    Args:
      model: the student.
      optimizer: of the student.
      num_terms: T, the number of loss terms.
      image_shape: `(H, W, channels)`, or `(D,)` of features.
      seed: int scalar, may be traced.
    """
    key = jax.random.key(seed)
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        sums=init_sums(num_terms),
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Returns SGD as in PyTorch: its weight decay is part of the gradient.

    The decay applies to every parameter, biases and batch norm included.
    """
    return optax.chain(
        # Before the momentum, which therefore accumulates the decay too.
        optax.add_decayed_weights(weight_decay),
        # For optax, a momentum of 0 is still a trace to be stored; None is none.
        optax.sgd(learning_rate, momentum=momentum or None),
    )


def adam(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
    """Returns Adam as in PyTorch (not AdamW): its weight decay is part of the gradient.

    The decay applies to every parameter.
    """
    return optax.chain(
        # Before the moments, which AdamW would leave without the decay.
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate),
    )


def step_schedule(
    base: float,
    *,
    total_steps: int,
    milestones: tuple[float, ...],
    decay: float,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Returns a learning rate that is multiplied by `decay` at each milestone.

    Args:
      base: the learning rate before the first milestone.
      total_steps: of the run.
      milestones: fractions of `total_steps`.
      decay: the factor.
      warmup_steps: W; the first W steps have 1/W, 2/W, … of the learning rate.

    >>> schedule = step_schedule(0.1, total_steps=100, milestones=(0.5,), decay=0.1)
    >>> [round(float(schedule(step)), 3) for step in (49, 50)]
    [0.1, 0.01]
    """
    # In a short run two milestones may round to one step. A dict holds that step once,
    # so its scale must be the product of both.
    scales: dict[int, float] = {}
    for milestone in milestones:
        boundary = round(milestone * total_steps)
        scales[boundary] = scales.get(boundary, 1.0) * decay
    schedule = optax.piecewise_constant_schedule(base, scales)
    if not warmup_steps:
        return schedule

    def warmed_up(step: jax.typing.ArrayLike) -> jax.Array:
        return schedule(step) * jnp.minimum(1.0, (step + 1) / warmup_steps)

    return warmed_up
