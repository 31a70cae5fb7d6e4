"""The step whose loss weights are learned: `ltkd_jax.bilevel` with a student, its terms and a weight net in it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from ltkd_jax import bilevel
from ltkd_jax.bilevel import PyTree
from ltkd_jax.data import sampling as plans
from ltkd_jax.data.sampling import Plan
from ltkd_jax.data.streaming import Streamed
from ltkd_jax.groups import ClassGroups
from ltkd_jax.methods import Objective, Predictions
from ltkd_jax.models import Model, WeightNet
from ltkd_jax.training.state import LearnedSums, TrainState
from ltkd_jax.training.steps import Batch, TrainData, advance, forward, sum_over_devices


class BilevelData(NamedTuple):
    """The long-tailed training set and the balanced set of the outer loss."""

    train: TrainData
    meta: TrainData


class BilevelRows(NamedTuple):
    """Rows of both: `train` `[S, B, K, …]`, this step's batch and the next K − 1; `meta`, `[S, B, …]`."""

    train: Plan | Streamed
    meta: Plan | Streamed


class BilevelBatch(NamedTuple):
    """What a step sees."""

    ahead: Batch  # leaves [K, B, …]
    meta: Batch


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How weights are learned.

    Attributes:
      net: gives `[B, T]` from features `[B, F]`.
      features: `predictions -> [B, F]`, see `methods.features`.
      num_features: F.
      outer_loss: `predictions -> [B]`, see `methods.outer_loss`.
      scales: T constants by which the net's weights are multiplied.
      optimizer: of the net.
      every: k, iterations between its updates.
      groups: by which what was learned is told.
    """

    net: WeightNet
    features: Callable[[Predictions], jax.Array]
    num_features: int
    outer_loss: Callable[[Predictions], jax.Array]
    scales: tuple[float, ...]
    optimizer: optax.GradientTransformation
    every: int
    groups: ClassGroups

    def __post_init__(self) -> None:
        if len(self.scales) != self.net.num_terms:
            raise ValueError(f"scales={self.scales}: give one for each of the {self.net.num_terms} terms")

    def weights(self, params: PyTree, features: jax.Array) -> jax.Array:
        """Weights `[B, T]` of features `[B, F]`."""
        scales = jnp.asarray(self.scales, features.dtype)
        return scales[None, :] * cast(jax.Array, self.net.apply({"params": params}, features))

    def add_to(self, state: TrainState, seed: jax.Array | int) -> TrainState:
        """The state with a fresh weight net in it; the seed may be traced."""
        key = jax.random.fold_in(jax.random.key(seed), 1)  # key(seed) itself is the student's
        params = self.net.init(key, jnp.zeros((1, self.num_features)))["params"]
        by_group = len(self.groups.names)
        learned = LearnedSums(
            outer_loss=jnp.zeros(()),
            weights=jnp.zeros((by_group, self.net.num_terms)),
            features=jnp.zeros((by_group, self.num_features)),
            examples=jnp.zeros(by_group),
        )
        meta = bilevel.init(params, self.optimizer)
        return state._replace(meta=meta, sums=state.sums._replace(learned=learned))


def rows(
    seed: jax.Array | int,
    epoch: jax.Array | int,
    *,
    ahead: int,
    num_train: int,
    num_meta: int,
    batch_size: int,
    num_views: int,
    bits: bool = False,
) -> BilevelRows:
    """The rows of one epoch, `[S, B, K]` of the training stream and `[S, B]` of the balanced set's own.

    Args:
      seed, epoch: int scalars, may be traced.
      ahead: K, batches that a step looks at: its own and the next ones of the stream, over the epoch's end too.
      num_train, num_meta: images of the two sets.
      batch_size, num_views, bits: as `plan.epoch_plan`; bits are drawn for the training stream alone.
    """
    steps = plans.steps_per_epoch(num_train, batch_size)
    both = dict(batch_size=batch_size, num_views=num_views)
    num_steps = steps + ahead - 1
    train = plans.stream(seed, epoch * steps, num_steps=num_steps, num_examples=num_train, bits=bits, **both)
    window = jnp.arange(steps)[:, None] + jnp.arange(ahead)[None, :]
    meta_seed = jax.random.bits(jax.random.fold_in(jax.random.key(seed), 2))
    meta = plans.stream(meta_seed, epoch * steps, num_steps=steps, num_examples=num_meta, **both)
    return BilevelRows(jax.tree.map(lambda x: jnp.moveaxis(x[window], 1, 2), train), meta)


def fetch(
    data: BilevelData,
    rows: BilevelRows,
    *,
    fetch_fn: Callable[[TrainData, Plan | Streamed], Batch],
    fetch_meta_fn: Callable[[TrainData, Plan | Streamed], Batch],
) -> BilevelBatch:
    """The batches of one step, `rows.train` `[B, K, …]` and `rows.meta` `[B, …]`, each by its own `steps.fetch`."""
    num_ahead = jax.tree.leaves(rows.train)[0].shape[1]
    ahead = [fetch_fn(data.train, jax.tree.map(lambda x, j=j: x[:, j], rows.train)) for j in range(num_ahead)]
    return BilevelBatch(jax.tree.map(lambda *parts: jnp.stack(parts), *ahead), fetch_meta_fn(data.meta, rows.meta))


def problem(
    batch_stats: PyTree,
    *,
    model: Model,
    objective: Objective,
    weighting: Weighting,
    axis_name: str | None = None,
) -> bilevel.Problem:
    """Student, terms and weight net as the callables of `ltkd_jax.bilevel`; batch norm in training mode throughout.

    Args:
      batch_stats: the student's, of the step's start; only the real step's new ones are kept.
      model, objective, weighting, axis_name: as `bilevel_step`.
    """
    predict = forward(model, batch_stats, axis_name)

    def terms_fn(params: PyTree, batch: Batch) -> tuple[jax.Array, bilevel.Aux]:
        seen = predict(params, batch)
        return objective(seen[0]), bilevel.Aux(weighting.features(seen[0]), seen)

    def outer_fn(params: PyTree, batch: Batch) -> jax.Array:
        predictions, _ = predict(params, batch)
        return weighting.outer_loss(predictions).mean()

    return bilevel.Problem(terms_fn, outer_fn, weighting.weights, axis_name)


def bilevel_step(
    state: TrainState,
    batch: BilevelBatch,
    *,
    model: Model,
    objective: Objective,
    weighting: Weighting,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    axis_name: str | None = None,
    changes: bool | None = None,
    unroll: bool = False,
) -> TrainState:
    """One step of SGD on mean_i Σ_t w_it · term_t(i), w from a weight net that learns beside it.

    Args:
      state: with a weight net, see `Weighting.add_to`.
      batch: see there; under `pmap` this device's share.
      model, objective, optimizer, axis_name: as `steps.train_step`; the objective's static weights are not used.
      weighting: how the weights are learned.
      schedule: the student's learning rate, of which the virtual steps take the current one.
      changes, unroll: as `bilevel.step`.
    """
    taken = bilevel.step(
        problem(state.batch_stats, model=model, objective=objective, weighting=weighting, axis_name=axis_name),
        state.params,
        state.meta,
        batch.ahead,
        batch.meta,
        schedule(state.step),
        optimizer=weighting.optimizer,
        every=weighting.every,
        changes=changes,
        unroll=unroll,
    )
    seen = taken.aux.extra
    after = advance(state, taken.gradient, taken.terms, taken.weights, seen, optimizer=optimizer, axis_name=axis_name)
    learned = _add(state.sums.learned, jnp.asarray(weighting.groups.assignment)[seen[0].labels], taken, axis_name)
    return after._replace(meta=taken.meta, sums=after.sums._replace(learned=learned))


def _add(sums: LearnedSums, group: jax.Array, taken: bilevel.Step, axis_name: str | None) -> LearnedSums:
    features = taken.aux.features

    def by_group(values: jax.Array) -> jax.Array:
        return jnp.zeros((len(sums.examples), *values.shape[1:]), values.dtype).at[group].add(values)

    of_batch = LearnedSums(
        outer_loss=taken.outer_loss,
        weights=by_group(taken.weights),
        features=by_group(features),
        examples=by_group(jnp.ones_like(features[:, 0])),
    )
    # The outer loss is an average over the devices already.
    over_devices = sum_over_devices(of_batch, axis_name)._replace(outer_loss=taken.outer_loss)
    return jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, over_devices)
