"""The step, written once: it runs on one device, sharded by `jit`, or mapped by `pmap` with an `axis_name`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from ltkd_jax import metrics, models
from ltkd_jax.bilevel import PyTree
from ltkd_jax.data import augment
from ltkd_jax.data.sampling import Plan
from ltkd_jax.data.streaming import Streamed
from ltkd_jax.methods import Mix, Objective, Predictions
from ltkd_jax.models import review
from ltkd_jax.training.state import EpochSums, TrainState, cleared


class TrainData(NamedTuple):
    """A training set that lives on the device; of one that is streamed, only what teaches.

    Attributes:
      images: uint8 `[N, H, W, channels]`; None where batches are streamed.
      labels: int32 `[N]`; None likewise.
      teacher: whatever the run's `TeacherFn` reads: its table, its variables, or None.
    """

    images: jax.Array | None
    labels: jax.Array | None
    teacher: Any


class Batch(NamedTuple):
    """What a step sees."""

    images: jax.Array  # float [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    teacher_logits: jax.Array | None  # [B, C]
    # of a method that distils them: float [B, H, W, channels] each
    teacher_features: tuple[jax.Array, ...] | None = None
    mix: Mix | None = None  # what each image is mixed with


class EvalBatch(NamedTuple):
    """A batch of an evaluation: identity views, padded to a full batch."""

    images: jax.Array  # uint8 [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    mask: jax.Array  # bool [B], false for padding


class Taught(NamedTuple):
    """What a teacher says of a batch."""

    logits: jax.Array | None = None  # [B, C]
    features: tuple[jax.Array, ...] | None = None  # float [B, H, W, channels] each


class Paired(NamedTuple):
    """Rows, and for each the row that it is mixed with."""

    rows: Plan | Streamed
    partners: Plan | Streamed


Preprocess = Callable[[jax.Array], jax.Array]  # uint8 images -> float images
TeacherFn = Callable[[Any, Any, jax.Array], Taught]  # (data.teacher, its Plan or Streamed, images) -> what it says

Forward = Callable[[PyTree, Batch], tuple[Predictions, PyTree]]  # (params, batch) -> predictions, batch statistics
_T = TypeVar("_T")


def no_teacher(teacher: Any, rows: Plan | Streamed, images: jax.Array) -> Taught:
    """The `TeacherFn` of a method without a teacher."""
    return Taught()


def table_teacher(teacher: jax.Array, rows: Plan, images: jax.Array) -> Taught:
    """The `TeacherFn` that looks logits up in the teacher's table, `[N, views, C]`; a single view stands for all."""
    return Taught(teacher[rows.index, rows.view if teacher.shape[1] > 1 else 0])


def network_teacher(model: models.Model) -> TeacherFn:
    """The `TeacherFn` that runs the teacher, in evaluation mode, on the batch's images."""
    return lambda teacher, rows, images: Taught(model.apply(teacher, images, train=False))


def feature_teacher(model: models.Model) -> TeacherFn:
    """As `network_teacher`, with the teacher's features, from the first stage to the pooled vector."""

    def teach(teacher: PyTree, rows: Plan | Streamed, images: jax.Array) -> Taught:
        logits, features, _ = models.apply_with_features(model, teacher, images, train=False)
        return Taught(logits, review.maps(features))

    return teach


def fetch(
    data: TrainData,
    rows: Plan | Streamed | Paired,
    *,
    views: augment.Views,
    preprocess: Preprocess,
    teacher_fn: TeacherFn,
    extra: augment.Extra = augment.NOTHING,
) -> Batch:
    """The batch of `rows`, leaves `[B, …]`: augmented and normalised images, and what the teacher says of them.

    What is not streamed is gathered, cropped and flipped first.

    Args:
      data: the training set.
      rows: of one step; `Paired` for Mixup.
      views: of images on the device.
      preprocess: uint8 images to float ones.
      teacher_fn: one of those above.
      extra: augmentation beyond the views.
    """
    if not isinstance(rows, Paired):
        images, labels = _images(data, rows, views, extra)
        images, mix = preprocess(images), None
    else:
        (images, labels), (others, other_labels) = (_images(data, part, views, extra) for part in rows)
        assert rows.rows.bits is not None  # Mixup has them drawn
        share = augment.mixup_share(rows.rows.bits, extra.mixup)
        images = augment.mix(preprocess(images), preprocess(others), share)
        rows, mix = rows.rows, Mix(other_labels, share)
    taught = teacher_fn(data.teacher, rows, images)
    return Batch(images, labels, taught.logits, taught.features, mix)


def _images(
    data: TrainData, rows: Plan | Streamed, views: augment.Views, extra: augment.Extra
) -> tuple[jax.Array, jax.Array]:
    if isinstance(rows, Streamed):
        images, labels = jnp.asarray(rows.images), jnp.asarray(rows.labels)
    else:
        assert data.images is not None and data.labels is not None  # they are None for streams alone
        images, labels = augment.apply(data.images[rows.index], rows.view, views), data.labels[rows.index]
    return augment.apply_extra(images, rows.bits, extra), labels


def forward(model: models.Model, batch_stats: PyTree, axis_name: str | None) -> Forward:
    """The student in training mode: `(params, batch) -> (Predictions, new batch statistics)`.

    Features are asked for only where the batch has the teacher's to compare them with; the model is then a
    `models.review.Reviewed`.
    """

    def predict(params: PyTree, batch: Batch) -> tuple[Predictions, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        if batch.teacher_features is None:
            features = None
            logits, updates = model.apply(variables, batch.images, train=True, mutable=["batch_stats"])
        else:
            assert isinstance(model, review.Reviewed)
            logits, features, updates = model.apply_with_features(variables, batch.images)
        predictions = Predictions(
            logits, batch.teacher_logits, batch.labels, axis_name, features, batch.teacher_features, batch.mix
        )
        return predictions, updates["batch_stats"]

    return predict


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: models.Model,
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
    weights = objective.weights(state.step)[None, :]
    predict = forward(model, state.batch_stats, axis_name)

    def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, tuple[Predictions, PyTree]]]:
        seen = predict(params, batch)
        terms = objective(seen[0])
        # The local mean: a collective's value must not be returned to `grad`. Gradients are averaged below.
        return jnp.mean(jnp.sum(terms * weights, axis=-1)), (terms, seen)

    gradient, (terms, seen) = jax.grad(loss_fn, has_aux=True)(state.params)
    gradient = mean_over_devices(gradient, axis_name)
    return advance(state, gradient, terms, weights, seen, optimizer=optimizer, axis_name=axis_name)


def advance(
    state: TrainState,
    gradient: PyTree,
    terms: jax.Array,
    weights: jax.Array,
    seen: tuple[Predictions, PyTree],
    *,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
) -> TrainState:
    """The state after the optimizer's step along an averaged gradient, with the step in its sums.

    Args:
      state: before.
      gradient: by the parameters, the same on all devices.
      terms: `[B, T]`.
      weights: `[B, T]` or `[1, T]`.
      seen: predictions and new batch statistics, as `forward` gives them.
      optimizer, axis_name: as `train_step`.
    """
    predictions, batch_stats = seen  # batch norm's statistics are already those of the global batch
    loss = jnp.mean(jnp.sum(terms * weights, axis=-1))
    correct = jnp.sum(jnp.argmax(predictions.student_logits, axis=-1) == predictions.labels)
    loss, terms = mean_over_devices((loss, terms.mean(axis=0)), axis_name)
    correct = sum_over_devices(correct, axis_name)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        sums=_add(state.sums, terms, loss, correct, state.step),
    )


def mean_over_devices(tree: _T, axis_name: str | None) -> _T:
    """The mean over a named device axis; under `jit` values are global already."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over_devices(tree: _T, axis_name: str | None) -> _T:
    """The sum over a named device axis; under `jit` values are global already."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _add(sums: EpochSums, terms: jax.Array, loss: jax.Array, correct: jax.Array, step: jax.Array) -> EpochSums:
    first_bad = (sums.bad_step < 0) & ~jnp.isfinite(loss)
    return sums._replace(
        terms=sums.terms + terms,
        loss=sums.loss + loss,
        correct=sums.correct + correct,
        steps=sums.steps + 1,
        bad_step=jnp.where(first_bad, step, sums.bad_step),
        bad_terms=jnp.where(first_bad, ~jnp.isfinite(terms), sums.bad_terms),
    )


def train_chunk(
    state: TrainState,
    data: PyTree,
    rows: PyTree,
    *,
    steps_per_epoch: int,
    fetch_fn: Callable[[PyTree, PyTree], PyTree],
    step_fn: Callable[[TrainState, PyTree], TrainState],
) -> TrainState:
    """Steps over `rows`, leaves `[S, …]`, as one computation; an epoch's first step clears the sums.

    A single row is not put in a loop: XLA's convolutions inside one are several times slower on CPU.

    Args:
      state: before.
      data, rows: what `fetch_fn(data, row)` makes a batch of.
      steps_per_epoch: of the run.
      fetch_fn: such as `fetch`.
      step_fn: `(state, batch) -> state`.
    """

    def body(state: TrainState, row: PyTree) -> tuple[TrainState, None]:
        at_start = state.step % steps_per_epoch == 0
        sums = jax.tree.map(functools.partial(jnp.where, at_start), cleared(state.sums), state.sums)
        return step_fn(state._replace(sums=sums), fetch_fn(data, row)), None

    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return body(state, jax.tree.map(lambda leaf: leaf[0], rows))[0]
    return jax.lax.scan(body, state, rows)[0]


def eval_step(
    variables: PyTree,
    batch: EvalBatch,
    *,
    model: models.Model,
    preprocess: Preprocess,
    axis_name: str | None = None,
) -> metrics.EvalSums:
    """`metrics.EvalSums` of one padded batch, over all devices."""
    logits = model.apply(variables, preprocess(batch.images), train=False)
    return sum_over_devices(metrics.eval_sums(logits, batch.labels, batch.mask), axis_name)
