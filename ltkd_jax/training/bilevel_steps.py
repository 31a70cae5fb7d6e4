"""The step whose loss weights are learned: `ltkd_jax.bilevel` with a student, its terms and a weight net in it."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from ltkd_jax import bilevel
from ltkd_jax.bilevel import PyTree
from ltkd_jax.groups import ClassGroups
from ltkd_jax.methods import Objective, Predictions
from ltkd_jax.models import Model, WeightNet
from ltkd_jax.training.state import LearnedSums, TrainState
from ltkd_jax.training.steps import Batch, apply_gradients, forward, sum_over_devices


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How weights are learned.

    Attributes:
      net: computes weights `[B, T]` from features `[B, F]`.
      features: `predictions -> [B, F]`, see `methods.features`.
      num_features: F.
      outer_loss: `predictions -> [B]`, see `methods.outer_loss`.
      scales: T constants by which the net's weights are multiplied.
      optimizer: of the net.
      update_every: k, iterations between its updates.
      groups: by which the learned weights are summed up.
    """

    net: WeightNet
    features: Callable[[Predictions], jax.Array]
    num_features: int
    outer_loss: Callable[[Predictions], jax.Array]
    scales: tuple[float, ...]
    optimizer: optax.GradientTransformation
    update_every: int
    groups: ClassGroups

    def __post_init__(self) -> None:
        if len(self.scales) != self.net.num_terms:
            raise ValueError(
                f"scales={self.scales}: give one for each of the {self.net.num_terms} terms"
            )

    def weights(self, params: PyTree, features: jax.Array) -> jax.Array:
        """Returns the weights `[B, T]` for features `[B, F]`."""
        scales = jnp.asarray(self.scales, features.dtype)
        return scales[None, :] * cast(
            jax.Array, self.net.apply({"params": params}, features)
        )

    def add_to(self, state: TrainState, seed: jax.Array | int) -> TrainState:
        """Returns the state with a fresh weight net in it; the seed may be traced."""
        key = jax.random.fold_in(
            jax.random.key(seed), 1
        )  # key(seed) itself is the student's
        params = self.net.init(key, jnp.zeros((1, self.num_features)))["params"]
        num_groups = len(self.groups.names)
        learned = LearnedSums(
            outer_loss=jnp.zeros(()),
            weights=jnp.zeros((num_groups, self.net.num_terms)),
            features=jnp.zeros((num_groups, self.num_features)),
            examples=jnp.zeros(num_groups),
        )
        meta = bilevel.init(params, self.optimizer)
        return state._replace(meta=meta, sums=state.sums._replace(learned=learned))


def problem(
    batch_stats: PyTree,
    *,
    model: Model,
    objective: Objective,
    weighting: Weighting,
    axis_name: str | None = None,
) -> bilevel.Problem:
    """Returns student, terms and weight net as the callables of `ltkd_jax.bilevel`.

    Batch norm is in training mode throughout.

    Args:
      batch_stats: the student's at the step's start; only the real step's new ones are kept.
      model, objective, weighting, axis_name: as `bilevel_step`.
    """
    predict = forward(model, batch_stats, axis_name)

    def terms_fn(params: PyTree, batch: Batch) -> tuple[jax.Array, bilevel.Aux]:
        predictions, new_stats = predict(params, batch)
        return objective(predictions), bilevel.Aux(
            weighting.features(predictions), (predictions, new_stats)
        )

    def outer_fn(params: PyTree, batch: Batch) -> jax.Array:
        predictions, _ = predict(params, batch)
        return weighting.outer_loss(predictions).mean()

    return bilevel.Problem(terms_fn, outer_fn, weighting.weights, axis_name)


def bilevel_step(
    state: TrainState,
    batches: Batch,
    outer_batch: Batch,
    *,
    model: Model,
    objective: Objective,
    weighting: Weighting,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axis_name: str | None = None,
    update_weight_net: bool | None = None,
    unroll: bool = False,
) -> TrainState:
    """Takes one step of SGD on mean_i Σ_t w_it · term_t(i), w from a weight net that learns beside it.

    Args:
      state: with a weight net, see `Weighting.add_to`.
      batches: leaves `[K, B, …]`: this step's batch and the K − 1 that the lookahead takes too; under `pmap` this
        device's share, as of the next.
      outer_batch: of the outer set, leaves `[B, …]`.
      model, objective, optimizer, axis_name: as `steps.train_step`; the objective's static weights are not used.
      weighting: how the weights are learned.
      schedule: the student's learning rate, of which the virtual steps take the current one.
      update_weight_net: whether the weight net is updated in this step; None decides on the device.
      unroll: as `bilevel.step`.
    """
    result = bilevel.step(
        problem(
            state.batch_stats,
            model=model,
            objective=objective,
            weighting=weighting,
            axis_name=axis_name,
        ),
        state.params,
        state.meta,
        batches,
        outer_batch,
        schedule(state.step),
        optimizer=weighting.optimizer,
        update_every=weighting.update_every,
        update_weight_net=update_weight_net,
        unroll=unroll,
    )
    predictions, batch_stats = result.aux.extra
    state = apply_gradients(
        state,
        result.gradient,
        result.terms,
        result.weights,
        predictions,
        batch_stats,
        optimizer=optimizer,
        axis_name=axis_name,
    )
    group = jnp.asarray(weighting.groups.assignment)[predictions.labels]
    learned = _add(state.sums.learned, group, result, axis_name)
    return state._replace(meta=result.meta, sums=state.sums._replace(learned=learned))


def _add(
    sums: LearnedSums,
    group: jax.Array,
    result: bilevel.StepResult,
    axis_name: str | None,
) -> LearnedSums:
    features = result.aux.features

    def by_group(values: jax.Array) -> jax.Array:
        return (
            jnp.zeros((len(sums.examples), *values.shape[1:]), values.dtype)
            .at[group]
            .add(values)
        )

    batch_sums = LearnedSums(
        outer_loss=result.outer_loss,
        weights=by_group(result.weights),
        features=by_group(features),
        examples=by_group(jnp.ones_like(features[:, 0])),
    )
    # The outer loss is an average over the devices already.
    global_sums = sum_over_devices(batch_sums, axis_name)._replace(
        outer_loss=result.outer_loss
    )
    return jax.tree.map(
        lambda total, new: total + new.astype(total.dtype), sums, global_sums
    )
