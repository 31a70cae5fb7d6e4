"""The training step with learned loss weights.

It applies `ltkd_jax.bilevel` to a student, the loss terms of a method and a weight net.
"""

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
from ltkd_jax.training.steps import (
    Batch,
    apply_gradients,
    make_predict_fn,
    sum_over_devices,
)


@dataclasses.dataclass(frozen=True)
class LearnedWeighting:
    """Describes how a weight net learns the weights of the loss terms.

    Attributes:
      net: the weight net, from features `[B, F]` to weights `[B, T]`.
      features_fn: `predictions -> [B, F]`, see `methods.features`.
      num_features: F.
      outer_loss_fn: `predictions -> [B]`, the loss per example of the outer set, see
        `methods.outer_loss`.
      scales: T constants by which the net's weights are multiplied.
      optimizer: of the weight net.
      update_every: k, the number of steps between two updates of the weight net.
      groups: the class groups for which the weights are reported.
    """

    net: WeightNet
    features_fn: Callable[[Predictions], jax.Array]
    num_features: int
    outer_loss_fn: Callable[[Predictions], jax.Array]
    scales: tuple[float, ...]
    optimizer: optax.GradientTransformation
    update_every: int
    groups: ClassGroups

    def __post_init__(self) -> None:
        if len(self.scales) != self.net.num_terms:
            raise ValueError(
                f"scales={self.scales}: give one for each of the "
                f"{self.net.num_terms} terms"
            )

    def compute_weights(self, meta_params: PyTree, features: jax.Array) -> jax.Array:
        """Returns the weights `[B, T]` for features `[B, F]`.

        Args:
          meta_params: of the weight net.
          features: `[B, F]`.
        """
        scales = jnp.asarray(self.scales, features.dtype)[None, :]
        weights = cast(jax.Array, self.net.apply({"params": meta_params}, features))
        return scales * weights

    def init_weight_net(self, state: TrainState, seed: jax.Array | int) -> TrainState:
        """Returns the state with a new weight net and its sums in it.

        Args:
          state: of a new student, see `state.create`.
          seed: int scalar, may be traced.
        """
        # `key(seed)` itself initialises the student.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        meta_params = self.net.init(key, jnp.zeros((1, self.num_features)))["params"]
        num_groups = len(self.groups.names)
        learned = LearnedSums(
            outer_loss=jnp.zeros(()),
            weights=jnp.zeros((num_groups, self.net.num_terms)),
            features=jnp.zeros((num_groups, self.num_features)),
            examples=jnp.zeros(num_groups),
        )
        return state._replace(
            meta=bilevel.init(meta_params, self.optimizer),
            sums=state.sums._replace(learned=learned),
        )


def make_problem(
    batch_stats: PyTree,
    *,
    model: Model,
    objective: Objective,
    weighting: LearnedWeighting,
    axis_name: str | None = None,
) -> bilevel.Problem:
    """Returns the two levels as the callables of `ltkd_jax.bilevel`.

    Batch norm is in training mode everywhere, in the virtual steps too.

    Args:
      batch_stats: the student's, before the step. The new ones are returned in
        `Aux.extra`, after the predictions; those of virtual steps are not used.
      model: the student.
      objective: the loss terms.
      weighting: the weight net, its features and the outer loss.
      axis_name: see `bilevel_step`.
    """
    # All forward passes start from the same statistics. In training mode these affect
    # only the new statistics, not the predictions.
    predict = make_predict_fn(model, batch_stats, axis_name)

    def terms_fn(params: PyTree, batch: Batch) -> tuple[jax.Array, bilevel.Aux]:
        predictions, new_stats = predict(params, batch)
        terms = objective(predictions)
        features = weighting.features_fn(predictions)
        # Where the device decides on the weight net's update, this is the result of a
        # branch, which may hold arrays only: no name of an axis.
        predictions = predictions._replace(axis_name=None)
        return terms, bilevel.Aux(features, (predictions, new_stats))

    def outer_fn(params: PyTree, batch: Batch) -> jax.Array:
        # The new statistics are dropped: the outer set is only for the weight net.
        predictions, _ = predict(params, batch)
        return weighting.outer_loss_fn(predictions).mean()

    return bilevel.Problem(terms_fn, outer_fn, weighting.compute_weights, axis_name)


def bilevel_step(
    state: TrainState,
    batches: Batch,
    outer_batch: Batch,
    *,
    model: Model,
    objective: Objective,
    weighting: LearnedWeighting,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axis_name: str | None = None,
    update_weight_net: bool | None = None,
    unroll: bool = False,
) -> TrainState:
    """Returns the state after one step of the weight net and of the student.

    The student's loss is (1/B) Σ_i Σ_t w_it · l_it, on the first of the batches. The
    weight net gives the weights w_it; `bilevel.step` trains it by K virtual steps of
    the student, and then computes the gradient that the student's optimizer takes.

    Args:
      state: before the step, with a weight net, see `LearnedWeighting.init_weight_net`.
      batches: leaves `[K, B, …]`: the batch of this step, and those of the K − 1 next
        steps, which only the virtual steps use. Under `pmap`, this device's share.
      outer_batch: a batch of the balanced outer set, of any size; under `pmap`, this
        device's share.
      model: the student.
      objective: the loss terms; its static weights are not used.
      weighting: how the weights are learned.
      optimizer: of the student.
      schedule: the student's learning rate. All virtual steps use its current value.
      axis_name: the device axis under `pmap`, else None.
      update_weight_net: whether the weight net is updated in this step, see
        `bilevel.step`. None decides on the device.
      unroll: see `bilevel.lookahead`.
    """
    problem = make_problem(
        state.batch_stats,
        model=model,
        objective=objective,
        weighting=weighting,
        axis_name=axis_name,
    )
    result = bilevel.step(
        problem,
        state.params,
        state.meta,
        batches,
        outer_batch,
        # The student's optimizer counts its steps the same way, from 0.
        schedule(state.step),
        optimizer=weighting.optimizer,
        update_every=weighting.update_every,
        update_weight_net=update_weight_net,
        unroll=unroll,
    )
    # Of the first batch, at the parameters before the step.
    predictions, batch_stats = result.aux.extra
    new_state = apply_gradients(
        state,
        result.gradient,
        result.terms,
        result.weights,
        predictions,
        batch_stats,
        optimizer=optimizer,
        axis_name=axis_name,
    )
    groups = jnp.asarray(weighting.groups.assignment)[predictions.labels]
    learned = _add_step(new_state.sums.learned, groups, result, axis_name)
    return new_state._replace(
        meta=result.meta, sums=new_state.sums._replace(learned=learned)
    )


def _add_step(
    sums: LearnedSums,
    groups: jax.Array,
    result: bilevel.StepResult,
    axis_name: str | None,
) -> LearnedSums:
    """Returns the sums with one step added; `groups` is `[B]`, of the examples."""
    num_groups = len(sums.examples)
    features = result.aux.features

    def sum_by_group(values: jax.Array) -> jax.Array:
        # A scatter-add, which sums the examples of the same group.
        zeros = jnp.zeros((num_groups, *values.shape[1:]), values.dtype)
        return zeros.at[groups].add(values)

    device_sums = LearnedSums(
        outer_loss=result.outer_loss,
        weights=sum_by_group(result.weights),
        features=sum_by_group(features),
        examples=sum_by_group(jnp.ones_like(features[:, 0])),
    )
    global_sums = sum_over_devices(device_sums, axis_name)
    # `bilevel.step` has averaged the outer loss over devices: it must not be summed.
    global_sums = global_sums._replace(outer_loss=result.outer_loss)
    return jax.tree.map(
        lambda total, new: total + new.astype(total.dtype), sums, global_sums
    )
