"""The training step and the evaluation step, as pure functions.

They are written once, for three uses: on one device, under `jit` with a sharded batch,
and under `pmap` with an `axis_name`. `training.parallel` compiles them.
"""

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
from ltkd_jax.training.state import EpochSums, TrainState, reset_sums

# What a batch is made from: indices of images on the device, or streamed images.
BatchSource = BatchIndices | StreamedBatch


class TrainData(NamedTuple):
    """Holds what stays on the device for all steps.

    Attributes:
      images: uint8 `[N, H, W, channels]`, or features, float32 `[N, D]`; None where
        batches are streamed.
      labels: int32 `[N]`; None where batches are streamed.
      teacher: what the run's `TeacherFn` reads: the table of logits, the teacher's
        variables, or None.
      outer: `TrainData` of the balanced outer set, where weights are learned; else
        None.
      class_mass: `[C]`, see `methods.Predictions`; None where no term reads it.
    """

    images: jax.Array | None
    labels: jax.Array | None
    teacher: Any
    outer: Any = None
    class_mass: jax.Array | None = None


class StepInputs(NamedTuple):
    """Holds the inputs of one step, or of the S steps of one call.

    Leaves are `[B, …]`, or `[S, B, …]`.

    Attributes:
      train: the training batches. Where weights are learned with K lookahead steps,
        leaves are `[B, K, …]`.
      mixup: the images that those are mixed with, of the same shape; None without
        Mixup.
      outer: batches of the outer set; None where weights are static.
    """

    train: BatchSource
    mixup: BatchSource | None = None
    outer: BatchSource | None = None


class TeacherOutputs(NamedTuple):
    """Holds what a teacher computes for a batch; None where a method needs none of it.

    Attributes:
      logits: float `[B, C]`.
      features: float `[B, H, W, channels]` each.
    """

    logits: jax.Array | None = None
    features: tuple[jax.Array, ...] | None = None


class Batch(NamedTuple):
    """Holds a batch as the loss needs it.

    Attributes:
      images: float `[B, H, W, channels]`, augmented and normalised, or `[B, D]`.
      labels: int32 `[B]`.
      teacher: the teacher's outputs for these images.
      mixup: labels and shares of the other images under Mixup, else None.
      class_mass: `[C]`, of the training set, not of the batch, see `TrainData`.
    """

    images: jax.Array
    labels: jax.Array
    teacher: TeacherOutputs = TeacherOutputs()
    mixup: Mixup | None = None
    class_mass: jax.Array | None = None


class EvalBatch(NamedTuple):
    """Holds a batch of an evaluation, of images that are not augmented.

    Attributes:
      images: uint8 `[B, H, W, channels]`, or features, float32 `[B, D]`.
      labels: int32 `[B]`.
      mask: bool `[B]`, False for the padding that fills up the last batch.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


# uint8 images, or features -> normalised float images
Preprocess = Callable[[jax.Array], jax.Array]
# (data.teacher, source of the batch, float images) -> the teacher's outputs
TeacherFn = Callable[[Any, Any, jax.Array], TeacherOutputs]
# (params, batch) -> (predictions, new batch statistics)
PredictFn = Callable[[PyTree, Batch], tuple[Predictions, PyTree]]
# (state, data, inputs of one step) -> new state
StepFn = Callable[[TrainState, TrainData, StepInputs], TrainState]
_T = TypeVar("_T")


def no_teacher(teacher: Any, source: BatchSource, images: jax.Array) -> TeacherOutputs:
    """Returns no outputs: the `TeacherFn` of a method without a teacher."""
    return TeacherOutputs()


def table_teacher(
    table: jax.Array, source: BatchIndices, images: jax.Array
) -> TeacherOutputs:
    """Returns logits from the teacher's table `[N, V, C]`.

    A table of one view (V = 1) serves for all views of an image.
    """
    view = source.view if table.shape[1] > 1 else 0
    return TeacherOutputs(table[source.index, view])


def network_teacher(model: models.Model) -> TeacherFn:
    """Returns the `TeacherFn` that runs the teacher, in evaluation mode."""
    model = models.fold_norms(model)

    def teacher_fn(
        variables: PyTree, source: BatchSource, images: jax.Array
    ) -> TeacherOutputs:
        return TeacherOutputs(model.apply(variables, images, train=False))

    return teacher_fn


def feature_teacher(model: models.Model) -> TeacherFn:
    """Returns the `TeacherFn` that runs the teacher and returns its features too.

    They are ordered from the first stage to the pooled vector, see
    `models.review.feature_maps`.
    """
    model = models.fold_norms(model)

    def teacher_fn(
        variables: PyTree, source: BatchSource, images: jax.Array
    ) -> TeacherOutputs:
        logits, features, _ = models.apply_with_features(
            model, variables, images, train=False
        )
        return TeacherOutputs(logits, review.feature_maps(features))

    return teacher_fn


def make_batch(
    data: TrainData,
    source: BatchSource,
    mixup: BatchSource | None = None,
    *,
    views: augment.Views,
    preprocess: Preprocess,
    teacher_fn: TeacherFn,
    extra: augment.Extra = augment.NO_EXTRA,
) -> Batch:
    """Returns a batch: augmented, normalised, mixed, and with the teacher's outputs.

    Args:
      data: the images on the device, and what `teacher_fn` reads.
      source: indices into `data`, whose images are then cropped and flipped, or
        streamed images, which already are; leaves `[B, …]`.
      mixup: source of the images to mix in.
      views: the crops and flips that `source.view` numbers.
      preprocess: converts uint8 images to normalised float images.
      teacher_fn: see `table_teacher`, `network_teacher`, `feature_teacher` and
        `no_teacher`.
      extra: augmentation beyond the views.
    """
    images, labels = _augment(data, source, views, extra)
    images = preprocess(images)
    mixed_labels = None
    if mixup is not None:
        # They are drawn whenever Mixup is on.
        assert source.random_bits is not None
        other_images, other_labels = _augment(data, mixup, views, extra)
        lam = augment.mixup_lam(source.random_bits, extra.mixup)
        images = augment.mix(images, preprocess(other_images), lam)
        mixed_labels = Mixup(other_labels, lam)
    # Last, so that a teacher in the step sees the mixed images, as the student does.
    teacher = teacher_fn(data.teacher, source, images)
    return Batch(images, labels, teacher, mixed_labels, data.class_mass)


def _augment(
    data: TrainData,
    source: BatchSource,
    views: augment.Views,
    extra: augment.Extra,
) -> tuple[jax.Array, jax.Array]:
    """Returns the augmented uint8 images of a source, and their labels."""
    if isinstance(source, StreamedBatch):
        # The host has cropped them already.
        images = jnp.asarray(source.images)
        labels = jnp.asarray(source.labels)
    else:
        # They are None only where all batches are streamed.
        assert data.images is not None
        assert data.labels is not None
        images = augment.apply_views(data.images[source.index], source.view, views)
        labels = data.labels[source.index]
    return augment.apply_extra(images, source.random_bits, extra), labels


def make_predict_fn(
    model: models.Model, batch_stats: PyTree, axis_name: str | None
) -> PredictFn:
    """Returns the student in training mode, as a function of parameters and batch.

    Args:
      model: the student. A batch with the teacher's features needs a
        `models.review.StudentWithFusion`, whose features are compared with them.
      batch_stats: the student's, before the step.
      axis_name: the device axis under `pmap`, for the terms; else None.
    """

    def predict(params: PyTree, batch: Batch) -> tuple[Predictions, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        features = None
        if batch.teacher.features is None:
            logits, updates = model.apply(
                variables, batch.images, train=True, mutable=["batch_stats"]
            )
        else:
            assert isinstance(model, review.StudentWithFusion)
            logits, features, updates = model.apply_with_features(
                variables, batch.images
            )
        predictions = Predictions(
            student_logits=logits,
            teacher_logits=batch.teacher.logits,
            labels=batch.labels,
            axis_name=axis_name,
            student_features=features,
            teacher_features=batch.teacher.features,
            mixup=batch.mixup,
            class_mass=batch.class_mass,
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
    """Returns the state after one optimizer step on a batch.

    The loss is (1/B) Σ_i Σ_t w_t · l_it, with the static weights w_t of the objective
    at `state.step`.

    Args:
      state: before the step.
      batch: leaves `[B, …]`; under `pmap` this device's share of the batch.
      model: the student.
      objective: the loss terms and their weights.
      optimizer: of the student.
      axis_name: the device axis under `pmap`, over which gradients are averaged. None
        on one device and under `jit`, where arrays are global.
    """
    weights = objective.weights(state.step)[None, :]
    predict = make_predict_fn(model, state.batch_stats, axis_name)

    def loss_fn(
        params: PyTree,
    ) -> tuple[jax.Array, tuple[jax.Array, Predictions, PyTree]]:
        predictions, batch_stats = predict(params, batch)
        terms = objective(predictions)
        # The mean over this device's examples only. JAX differentiates the collectives
        # inside the terms and batch norm as sums over devices, so each device gets the
        # derivative of all local losses with respect to its copy of the parameters.
        # The mean of these, below, is the gradient of the global loss.
        loss = jnp.mean(jnp.sum(terms * weights, axis=-1))
        return loss, (terms, predictions, batch_stats)

    gradient, aux = jax.grad(loss_fn, has_aux=True)(state.params)
    terms, predictions, batch_stats = aux
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
    """Returns the state after an optimizer step, with the batch added to its sums.

    Args:
      state: before the step.
      gradient: of the loss, already averaged over devices.
      terms: `[B, T]`, of this device's examples.
      weights: `[B, T]` or `[1, T]`.
      predictions: of the batch.
      batch_stats: after the step. They are the same on all devices, since batch norm
        takes its statistics over the global batch.
      optimizer: of the student.
      axis_name: see `train_step`.
    """
    loss = jnp.mean(jnp.sum(terms * weights, axis=-1))
    predicted_labels = jnp.argmax(predictions.student_logits, axis=-1)
    # Floats, so that XLA sums them over the devices together with the loss.
    correct = jnp.sum(
        predicted_labels == predictions.labels, dtype=state.sums.correct.dtype
    )
    # Each device has as many examples, so the mean of its means is the global mean.
    loss, mean_terms = mean_over_devices((loss, terms.mean(axis=0)), axis_name)
    correct = sum_over_devices(correct, axis_name)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        sums=_add_step(state.sums, mean_terms, loss, correct, state.step),
    )


def mean_over_devices(tree: _T, axis_name: str | None) -> _T:
    """Returns the mean over the device axis; without one, the tree itself.

    Under `jit` there is no axis: arrays are global, and XLA adds the collectives.
    """
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over_devices(tree: _T, axis_name: str | None) -> _T:
    """Returns the sum over the device axis; without one, the tree itself."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _add_step(
    sums: EpochSums,
    mean_terms: jax.Array,
    loss: jax.Array,
    correct: jax.Array,
    step: jax.Array,
) -> EpochSums:
    """Returns the sums with one step added; values are of the global batch."""
    is_first_bad = (sums.bad_step < 0) & ~jnp.isfinite(loss)
    return sums._replace(
        terms=sums.terms + mean_terms,
        loss=sums.loss + loss,
        correct=sums.correct + correct,
        steps=sums.steps + 1,
        bad_step=jnp.where(is_first_bad, step, sums.bad_step),
        bad_terms=jnp.where(is_first_bad, ~jnp.isfinite(mean_terms), sums.bad_terms),
    )


def train_steps(
    state: TrainState,
    data: TrainData,
    inputs: StepInputs,
    *,
    step_fn: StepFn,
    steps_per_epoch: int,
) -> TrainState:
    """Returns the state after S steps, which are one computation on the device.

    The sums of `state` are reset before the first step of an epoch, not after its last
    one, when they are logged.

    Args:
      state: before the steps.
      data: passed to every step.
      inputs: leaves `[S, B, …]`; step s gets their s-th entries.
      step_fn: computes one step.
      steps_per_epoch: of the run.
    """

    def body(state: TrainState, inputs: StepInputs) -> tuple[TrainState, None]:
        # Selected on the device, where the step counter is.
        is_new_epoch = state.step % steps_per_epoch == 0
        select = functools.partial(jnp.where, is_new_epoch)
        sums = jax.tree.map(select, reset_sums(state.sums), state.sums)
        return step_fn(state._replace(sums=sums), data, inputs), None

    num_steps = jax.tree.leaves(inputs)[0].shape[0]
    if num_steps == 1:
        # Without the scan: on CPU, XLA's convolutions are several times slower inside a
        # loop. On accelerators, one scan over many steps saves their dispatch.
        step_inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
        new_state, _ = body(state, step_inputs)
    else:
        new_state, _ = jax.lax.scan(body, state, inputs)
    return new_state


def eval_step(
    variables: PyTree,
    batch: EvalBatch,
    *,
    model: models.Model,
    preprocess: Preprocess,
    temperature: float = 1.0,
    axis_name: str | None = None,
) -> metrics.EvalSums:
    """Returns the evaluation sums of one padded batch, over all devices.

    Args:
      variables: of the model.
      batch: leaves `[B, …]`; under `pmap` this device's share of the batch.
      model: the model to evaluate.
      preprocess: converts uint8 images to normalised float images.
      temperature: by which the logits are divided.
      axis_name: see `train_step`.
    """
    logits = model.apply(variables, preprocess(batch.images), train=False)
    logits /= temperature
    sums = metrics.eval_sums(logits, batch.labels, batch.mask)
    return sum_over_devices(sums, axis_name)
