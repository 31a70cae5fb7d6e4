"""The training step, written once: it runs on one device, sharded by `jit`, or mapped by `pmap` with an `axis_name`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from ltkd_jax import metrics, models
from ltkd_jax.bilevel import PyTree
from ltkd_jax.data import augment
from ltkd_jax.data.sampling import BatchIndices
from ltkd_jax.data.streaming import StreamedBatch
from ltkd_jax.methods import Mixup, Objective, Predictions
from ltkd_jax.models import review
from ltkd_jax.training.state import EpochSums, TrainState, cleared


class TrainData(NamedTuple):
    """A set of images that lives on the device; of a streamed one, only what its teacher needs.

    Attributes:
      images: uint8 `[N, H, W, channels]`; None where batches are streamed.
      labels: int32 `[N]`; None where batches are streamed.
      teacher: whatever the run's `TeacherFn` reads: the table of logits, the teacher's variables, or None.
      outer: the outer set of learned weights, a `TrainData`; None where weights are static.
    """

    images: jax.Array | None
    labels: jax.Array | None
    teacher: Any
    outer: Any = None


class StepInputs(NamedTuple):
    """What steps read, leaves `[B, …]`, or `[S, B, …]` of the S steps of one call.

    Attributes:
      train: the training batches; with weights learned through K lookahead steps `[B, K, …]`.
      mixup: what those are mixed with, of the same shape; None without Mixup.
      outer: batches of the outer set; None where weights are static.
    """

    train: BatchIndices | StreamedBatch
    mixup: BatchIndices | StreamedBatch | None = None
    outer: BatchIndices | StreamedBatch | None = None


class TeacherOutputs(NamedTuple):
    """What a teacher computes for a batch; None where the method does not need it."""

    logits: jax.Array | None = None  # [B, C]
    features: tuple[jax.Array, ...] | None = None  # float [B, H, W, channels] each


class Batch(NamedTuple):
    """A batch as a loss sees it."""

    images: jax.Array  # float [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    teacher: TeacherOutputs = TeacherOutputs()
    mixup: Mixup | None = None


class EvalBatch(NamedTuple):
    """A batch of an evaluation: identity views, padded to a full batch."""

    images: jax.Array  # uint8 [B, H, W, channels]
    labels: jax.Array  # int32 [B]
    mask: jax.Array  # bool [B], false for padding


Preprocess = Callable[[jax.Array], jax.Array]  # uint8 images -> float images
# (data.teacher, the batch's indices or streamed batch, images) -> what the teacher computes for them
TeacherFn = Callable[[Any, Any, jax.Array], TeacherOutputs]
Forward = Callable[
    [PyTree, Batch], tuple[Predictions, PyTree]
]  # (params, batch) -> predictions, batch statistics
StepFn = Callable[[TrainState, TrainData, StepInputs], TrainState]
_T = TypeVar("_T")


def no_teacher(
    teacher: Any, batch: BatchIndices | StreamedBatch, images: jax.Array
) -> TeacherOutputs:
    """Returns nothing: the `TeacherFn` of a method without a teacher."""
    return TeacherOutputs()


def table_teacher(
    table: jax.Array, batch: BatchIndices, images: jax.Array
) -> TeacherOutputs:
    """Looks logits up in the teacher's table, `[N, views, C]`; a table of one view serves for all."""
    return TeacherOutputs(table[batch.index, batch.view if table.shape[1] > 1 else 0])


def network_teacher(model: models.Model) -> TeacherFn:
    """Returns the `TeacherFn` that runs the teacher, in evaluation mode, on the batch's images."""
    return lambda variables, batch, images: TeacherOutputs(
        model.apply(variables, images, train=False)
    )


def feature_teacher(model: models.Model) -> TeacherFn:
    """Returns `network_teacher` with the teacher's features too, from the first stage to the pooled vector."""

    def teacher_fn(
        variables: PyTree, batch: BatchIndices | StreamedBatch, images: jax.Array
    ) -> TeacherOutputs:
        logits, features, _ = models.apply_with_features(
            model, variables, images, train=False
        )
        return TeacherOutputs(logits, review.maps(features))

    return teacher_fn


def make_batch(
    data: TrainData,
    batch: BatchIndices | StreamedBatch,
    mixup: BatchIndices | StreamedBatch | None = None,
    *,
    views: augment.Views,
    preprocess: Preprocess,
    teacher_fn: TeacherFn,
    extra: augment.Extra = augment.NO_EXTRA,
) -> Batch:
    """Returns augmented and normalised images, their labels, and what the teacher computes for them.

    What is not streamed is first gathered from the data, cropped and flipped.

    Args:
      data: the set.
      batch: leaves `[B, …]`.
      mixup: what each image is mixed with.
      views: of images on the device.
      preprocess: uint8 images to float ones.
      teacher_fn: one of those above.
      extra: augmentation beyond the views.
    """
    images, labels = _augmented(data, batch, views, extra)
    images = preprocess(images)
    mixed_with = None
    if mixup is not None:
        assert batch.random_bits is not None  # Mixup has them drawn
        others, other_labels = _augmented(data, mixup, views, extra)
        lam = augment.mixup_lam(batch.random_bits, extra.mixup)
        images = augment.mix(images, preprocess(others), lam)
        mixed_with = Mixup(other_labels, lam)
    return Batch(images, labels, teacher_fn(data.teacher, batch, images), mixed_with)


def _augmented(
    data: TrainData,
    batch: BatchIndices | StreamedBatch,
    views: augment.Views,
    extra: augment.Extra,
) -> tuple[jax.Array, jax.Array]:
    """Returns augmented uint8 images and their labels."""
    if isinstance(batch, StreamedBatch):
        images, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
    else:
        assert (
            data.images is not None and data.labels is not None
        )  # they are None for streams alone
        images = augment.apply_views(data.images[batch.index], batch.view, views)
        labels = data.labels[batch.index]
    return augment.apply_extra(images, batch.random_bits, extra), labels


def forward(model: models.Model, batch_stats: PyTree, axis_name: str | None) -> Forward:
    """Returns the student in training mode: `(params, batch) -> (Predictions, new batch statistics)`.

    Features are computed only where the batch has the teacher's to compare them with; the model is then a
    `models.review.Reviewed`.
    """

    def predict(params: PyTree, batch: Batch) -> tuple[Predictions, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        features = None
        if batch.teacher.features is None:
            logits, updates = model.apply(
                variables, batch.images, train=True, mutable=["batch_stats"]
            )
        else:
            assert isinstance(model, review.Reviewed)
            logits, features, updates = model.apply_with_features(
                variables, batch.images
            )
        predictions = Predictions(
            logits,
            batch.teacher.logits,
            batch.labels,
            axis_name,
            features,
            batch.teacher.features,
            batch.mixup,
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
    """Takes one step of SGD on mean_i Σ_t weight_t · term_t(i).

    Args:
      state: before the step.
      batch: under `pmap` this device's share.
      model: a Linen module with batch norm.
      objective: terms and weights.
      optimizer: an optax transformation.
      axis_name: the device axis under `pmap`; gradients are averaged over it.
    """
    weights = objective.weights(state.step)[None, :]
    predict = forward(model, state.batch_stats, axis_name)

    def loss_fn(
        params: PyTree,
    ) -> tuple[jax.Array, tuple[jax.Array, Predictions, PyTree]]:
        predictions, batch_stats = predict(params, batch)
        terms = objective(predictions)
        # The local mean: a collective's value must not be returned to `grad`. Gradients are averaged below.
        return jnp.mean(jnp.sum(terms * weights, axis=-1)), (
            terms,
            predictions,
            batch_stats,
        )

    gradient, (terms, predictions, batch_stats) = jax.grad(loss_fn, has_aux=True)(
        state.params
    )
    gradient = mean_over_devices(gradient, axis_name)
    return apply_gradients(
        state,
        gradient,
        terms,
        weights,
        predictions,
        batch_stats,
        optimizer=optimizer,
        axis_name=axis_name,
    )


def apply_gradients(
    state: TrainState,
    gradient: PyTree,
    terms: jax.Array,
    weights: jax.Array,
    predictions: Predictions,
    batch_stats: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
) -> TrainState:
    """Takes the optimizer's step along an averaged gradient, and adds the step to the state's sums.

    Args:
      state: before the step.
      gradient: by the parameters, the same on all devices.
      terms: `[B, T]`.
      weights: `[B, T]` or `[1, T]`.
      predictions: of the batch.
      batch_stats: new ones; batch norm has already taken them over the global batch.
      optimizer, axis_name: as `train_step`.
    """
    loss = jnp.mean(jnp.sum(terms * weights, axis=-1))
    correct = jnp.sum(
        jnp.argmax(predictions.student_logits, axis=-1) == predictions.labels
    )
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
    """Returns the mean over a named device axis; under `jit` values are global already."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over_devices(tree: _T, axis_name: str | None) -> _T:
    """Returns the sum over a named device axis; under `jit` values are global already."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _add(
    sums: EpochSums,
    terms: jax.Array,
    loss: jax.Array,
    correct: jax.Array,
    step: jax.Array,
) -> EpochSums:
    first_bad = (sums.bad_step < 0) & ~jnp.isfinite(loss)
    return sums._replace(
        terms=sums.terms + terms,
        loss=sums.loss + loss,
        correct=sums.correct + correct,
        steps=sums.steps + 1,
        bad_step=jnp.where(first_bad, step, sums.bad_step),
        bad_terms=jnp.where(first_bad, ~jnp.isfinite(terms), sums.bad_terms),
    )


def train_steps(
    state: TrainState,
    data: TrainData,
    inputs: StepInputs,
    *,
    step_fn: StepFn,
    steps_per_epoch: int,
) -> TrainState:
    """Takes the S steps of `inputs`, leaves `[S, …]`, as one computation; an epoch's first step clears the sums.

    A single step is not put in a loop: XLA's convolutions inside one are several times slower on CPU.

    Args:
      state: before the steps.
      data, inputs: what `step_fn` takes; of `inputs` a step at a time.
      step_fn: takes one step.
      steps_per_epoch: of the run.
    """

    def body(state: TrainState, inputs: StepInputs) -> tuple[TrainState, None]:
        at_start = state.step % steps_per_epoch == 0
        sums = jax.tree.map(
            functools.partial(jnp.where, at_start), cleared(state.sums), state.sums
        )
        return step_fn(state._replace(sums=sums), data, inputs), None

    if jax.tree.leaves(inputs)[0].shape[0] == 1:
        return body(state, jax.tree.map(lambda leaf: leaf[0], inputs))[0]
    return jax.lax.scan(body, state, inputs)[0]


def eval_step(
    variables: PyTree,
    batch: EvalBatch,
    *,
    model: models.Model,
    preprocess: Preprocess,
    axis_name: str | None = None,
) -> metrics.EvalSums:
    """Returns `metrics.EvalSums` of one padded batch, over all devices."""
    logits = model.apply(variables, preprocess(batch.images), train=False)
    return sum_over_devices(
        metrics.eval_sums(logits, batch.labels, batch.mask), axis_name
    )
