"""The state of a run: what a step takes and gives back, and what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ltkd_jax.bilevel import PyTree
from ltkd_jax.models import Model


class EpochSums(NamedTuple):
    """What is logged at an epoch's end, summed on the device so that no step waits for the host.

    Attributes:
      terms: float `[T]`, sum over steps of each term's batch mean.
      loss: float scalar, sum over steps of the batch mean of the weighted loss.
      correct: float scalar, number of right predictions on training views.
      steps: int scalar, steps summed.
      bad_step: int scalar, the first step whose loss was not finite; −1 if there was none.
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
    """What learned weights did, by group of the example's class; sums over examples.

    Attributes:
      outer_loss: float scalar, sum over steps.
      weights: float `[G, T]`.
      features: float `[G, F]`, the weight net's input.
      examples: float `[G]`.
    """

    outer_loss: jax.Array
    weights: jax.Array
    features: jax.Array
    examples: jax.Array


class TrainState(NamedTuple):
    """A pytree of arrays. Nothing random is in it: batches are a function of the seed and `step`."""

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    sums: EpochSums
    meta: Any = ()  # `bilevel.MetaState` where the weights are learned

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def zero_sums(num_terms: int) -> EpochSums:
    """The sums of no step, for T static weights."""
    return EpochSums(
        terms=jnp.zeros(num_terms),
        loss=jnp.zeros(()),
        correct=jnp.zeros(()),
        steps=jnp.zeros((), jnp.int32),
        bad_step=-jnp.ones((), jnp.int32),
        bad_terms=jnp.zeros(num_terms, bool),
    )


def cleared(sums: EpochSums) -> EpochSums:
    """The sums at an epoch's start."""
    return jax.tree.map(jnp.zeros_like, sums)._replace(
        bad_step=-jnp.ones_like(sums.bad_step)
    )


def create(
    model: Model,
    optimizer: optax.GradientTransformation,
    num_terms: int,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
) -> TrainState:
    """A fresh state.

    Args:
      model: a Linen module.
      optimizer: an optax transformation.
      num_terms: T, terms of the objective.
      image_shape: `(H, W, channels)`.
      seed: int scalar, may be traced.
    """
    variables = model.init(
        jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False
    )
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        sums=zero_sums(num_terms),
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD as PyTorch has it: L2 on every parameter, added to the gradient before the momentum."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum or None),
    )


def adam(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
    """Adam as PyTorch has it: L2 on every parameter, added to the gradient before the moments."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
    )


def step_schedule(
    base: float, *, total_steps: int, milestones: tuple[float, ...], decay: float
) -> optax.Schedule:
    """A learning rate that is multiplied by `decay` at each milestone, given as a fraction of all steps.

    >>> schedule = step_schedule(0.1, total_steps=100, milestones=(0.5,), decay=0.1)
    >>> [round(float(schedule(step)), 3) for step in (49, 50)]
    [0.1, 0.01]
    """
    # optax would merge equal boundaries into one; scaling by each keeps a run of few steps right.
    scales: dict[int, float] = {}
    for milestone in milestones:
        boundary = round(milestone * total_steps)
        scales[boundary] = scales.get(boundary, 1.0) * decay
    return optax.piecewise_constant_schedule(base, scales)
