"""The step, written once: it runs on one device, sharded by `jit`, or mapped by `pmap` with an `axis_name`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ltkd_jax import metrics
from ltkd_jax.data import augment
from ltkd_jax.data.plan import Plan
from ltkd_jax.objectives import Objective, Predictions
from ltkd_jax.training.state import EpochSums, TrainState, zero_sums


class TrainData(NamedTuple):
    """A training set that lives on the device.

    Attributes:
      images: uint8 `[N, H, W, channels]`.
      labels: int32 `[N]`.
      teacher: whatever the run's `TeacherFn` reads: its table, its variables, or None.
    """

    images: jax.Array
    labels: jax.Array
    teacher: Any


class Batch(NamedTuple):
    """What a step sees."""

    images: jax.Array  # float [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    teacher_logits: jax.Array | None  # [B, C]


class EvalBatch(NamedTuple):
    """A batch of an evaluation: identity views, padded to a full batch."""

    images: jax.Array  # uint8 [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    mask: jax.Array  # bool [B], false for padding


Preprocess = Callable[[jax.Array], jax.Array]  # uint8 images -> float images
TeacherFn = Callable[[Any, Plan, jax.Array], jax.Array | None]  # (data.teacher, rows, images) -> logits [B, C]


def no_teacher(teacher, rows, images):
    """The `TeacherFn` of a method without a teacher."""
    return None


def table_teacher(teacher, rows, images):
    """The `TeacherFn` that looks logits up in the teacher's table, `[N, views, C]`."""
    return teacher[rows.index, rows.view]


def network_teacher(model) -> TeacherFn:
    """The `TeacherFn` that runs the teacher, in evaluation mode, on the batch's images."""
    return lambda teacher, rows, images: model.apply(teacher, images, train=False)


def fetch(data: TrainData, rows: Plan, *, views: augment.Views, preprocess: Preprocess, teacher_fn: TeacherFn):
    """The batch of `rows`, index and view `[B]`: gather, crop, flip, normalise, and the teacher's logits."""
    images = preprocess(augment.apply(data.images[rows.index], rows.view, views))
    return Batch(images, data.labels[rows.index], teacher_fn(data.teacher, rows, images))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
) -> TrainState:
    """One step of SGD on mean_i Σ_t weight_t · term_t(i).

    Args:
      state, batch: see there; under `pmap` the batch is this device's share.
      model: a Linen module with batch norm.
      objective: terms and weights.
      optimizer: an optax transformation.
      axis_name: the device axis under `pmap`; gradients are averaged over it.
    """
    weights = objective.weights(state.step)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"])
        terms = objective(Predictions(logits, batch.teacher_logits, batch.labels, axis_name))
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)
        # The local mean: a collective's value must not be returned to `grad`. Gradients are averaged below.
        loss = jnp.mean(jnp.sum(terms * weights[None, :], axis=-1))
        return loss, (updates["batch_stats"], terms.mean(axis=0), correct)

    (loss, (batch_stats, terms, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    if axis_name is not None:
        # Batch norm's statistics are already those of the global batch.
        grads, loss, terms = jax.lax.pmean((grads, loss, terms), axis_name)
        correct = jax.lax.psum(correct, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        sums=_add(state.sums, terms, loss, correct, state.step),
    )


def _add(sums: EpochSums, terms, loss, correct, step) -> EpochSums:
    first_bad = (sums.bad_step < 0) & ~jnp.isfinite(loss)
    return EpochSums(
        terms=sums.terms + terms,
        loss=sums.loss + loss,
        correct=sums.correct + correct,
        steps=sums.steps + 1,
        bad_step=jnp.where(first_bad, step, sums.bad_step),
        bad_terms=jnp.where(first_bad, ~jnp.isfinite(terms), sums.bad_terms),
    )


def train_chunk(state: TrainState, data: TrainData, rows: Plan, *, steps_per_epoch: int, fetch_fn, step_fn):
    """Steps over `rows`, index and view `[K, B]`, as one computation; an epoch's first step clears the sums.

    A single row is not put in a loop: XLA's convolutions inside one are several times slower on CPU.
    """

    def body(state, row):
        fresh = zero_sums(state.sums.terms.shape[0])
        at_start = state.step % steps_per_epoch == 0
        sums = jax.tree.map(lambda new, old: jnp.where(at_start, new.astype(old.dtype), old), fresh, state.sums)
        return step_fn(state._replace(sums=sums), fetch_fn(data, row)), None

    if rows.index.shape[0] == 1:
        return body(state, jax.tree.map(lambda leaf: leaf[0], rows))[0]
    return jax.lax.scan(body, state, rows)[0]


def eval_step(variables, batch: EvalBatch, *, model, preprocess: Preprocess, axis_name: str | None = None):
    """`metrics.EvalSums` of one padded batch, over all devices."""
    logits = model.apply(variables, preprocess(batch.images), train=False)
    sums = metrics.eval_sums(logits, batch.labels, batch.mask)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
