"""One network's training as compiled functions: the step is assembled here, by name."""

import functools

import jax
import jax.numpy as jnp

from experiments.config.spec import LearnedWeights, Recipe, TrainingSpec
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import input_pipeline
from experiments.trainer.dataset import Dataset
from experiments.trainer.evaluator import Evaluator
from ltkd_jax import methods, models
from ltkd_jax.data import augment, longtail, sampling
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import review
from ltkd_jax.training import bilevel_steps, steps
from ltkd_jax.training import state as states
from ltkd_jax.training.parallel import Parallel


class Trainer:
    """A network's training; the seed is an argument of its functions, so that all seeds share one compilation.

    Args:
      spec: of the training.
      data: its data set.

    Attributes:
      total_steps, steps_per_epoch: of the whole run.
      objective: the loss terms, with their static weights.
      schedule: the learning rate, a function of the step.
      loss_weighting: how the terms' weights are learned; None where they are static.
      model: as it is evaluated, without a device axis.
      init: `seed -> TrainState` on the default device.
      evaluate: `(variables, images) -> metrics.EvalSums` of a set, variables replicated.

    Raises:
      ValueError: parts that do not fit each other, such as a model that the images are too small for.
    """

    def __init__(self, spec: TrainingSpec, data: Dataset):
        self.spec = spec
        self.data = data
        self.recipe = spec.recipe
        execution = spec.execution
        self.parallel = Parallel(
            execution.parallel, jax.devices()[: execution.devices or None]
        )
        self.steps_per_epoch = sampling.steps_per_epoch(
            len(data.train), spec.recipe.batch_size
        )
        self.total_steps = spec.recipe.total_steps(self.steps_per_epoch)
        # The one switch for CPU, where XLA's convolutions are many times slower inside a loop or a branch.
        self._on_cpu = jax.default_backend() == "cpu"
        # Streamed batches are large: an epoch of them is not sent to the device at once.
        one_at_a_time = self._on_cpu or data.streams
        self.steps_per_call = execution.steps_per_call or (
            1 if one_at_a_time else self.steps_per_epoch
        )

        self.objective = spec.method.objective(
            data.class_counts, data.groups, self.steps_per_epoch
        )
        self.schedule = _schedule(
            spec.recipe.lr, spec.recipe.lr_decay, spec.recipe, self.total_steps
        )
        self.loss_weighting = None
        if spec.loss_weighting is not None:
            self.loss_weighting = _learned_weights(
                spec.loss_weighting, spec.recipe, self.objective, data, self.total_steps
            )
        self._shard = input_pipeline.BatchShard(
            self.parallel.local_positions(spec.recipe.batch_size),
            spec.recipe.batch_size,
            spec.augment.mixup > 0,
        )
        self.model = self._model(axis_name=None)
        self._optimizer = states.sgd(
            self.schedule,
            momentum=spec.recipe.momentum,
            weight_decay=spec.recipe.weight_decay,
        )
        self.init = jax.jit(self._init)
        self.evaluate = Evaluator(
            self.model, data, self.parallel, execution.eval_batch_size
        ).evaluate
        self._epoch_fn = jax.jit(self._epoch_indices)
        self._compiled = functools.cache(self._compile)
        if spec.augment.cutout >= min(data.image_shape[:2]):
            raise ValueError(
                f"augment.cutout={spec.augment.cutout} blackens images of {data.image_shape[:2]} pixels: lower it"
            )
        jax.eval_shape(
            self.init, 0
        )  # a model that the images do not fit fails here, before any work

    def _model(self, axis_name):
        spec = self.spec
        model = models.create(
            spec.model,
            self.data.num_classes,
            precision=spec.execution.precision,
            axis_name=axis_name,
        )
        if not self.objective.needs_features:
            return model
        return review.with_fusion(
            model, teacher_model(spec, self.data), self.data.image_shape
        )

    def _init(self, seed):
        fresh = states.create(
            self.model,
            self._optimizer,
            len(self.objective.terms),
            self.data.image_shape,
            seed,
        )
        return (
            fresh
            if self.loss_weighting is None
            else self.loss_weighting.init_weight_net(fresh, seed)
        )

    # The step.

    def _step_fn(self, update_weight_net: bool | None) -> steps.StepFn:
        """Returns one step, `(state, data, inputs) -> state`, as a pure function.

        Args:
          update_weight_net: of learned weights, whether this step updates their net; None decides on the device.
        """
        spec = self.spec
        axis_name = self.parallel.axis_name
        model = self._model(axis_name)
        teacher_fn = _teacher_fn(spec, self.data)
        views = self.data.source.views
        preprocess = self.data.preprocess

        def train_batch(data, indices, mixup):
            return steps.make_batch(
                data,
                indices,
                mixup,
                views=views,
                preprocess=preprocess,
                teacher_fn=teacher_fn,
                extra=spec.augment,
            )

        def static_step(state, data, inputs):
            batch = train_batch(data, inputs.train, inputs.mixup)
            return steps.train_step(
                state,
                batch,
                model=model,
                objective=self.objective,
                optimizer=self._optimizer,
                axis_name=axis_name,
            )

        def bilevel_step(state, data, inputs):
            batches = []
            for j in range(spec.loss_weighting.lookahead):
                indices, mixup = jax.tree.map(
                    lambda x, j=j: x[:, j], (inputs.train, inputs.mixup)
                )
                batches.append(train_batch(data, indices, mixup))
            outer_batch = steps.make_batch(
                data.outer,
                inputs.outer,
                views=views,
                preprocess=preprocess,
                teacher_fn=teacher_fn
                if spec.loss_weighting.outer_loss_needs_teacher
                else steps.no_teacher,
            )
            return bilevel_steps.bilevel_step(
                state,
                jax.tree.map(lambda *parts: jnp.stack(parts), *batches),
                outer_batch,
                model=model,
                objective=self.objective,
                weighting=self.loss_weighting,
                optimizer=self._optimizer,
                schedule=self.schedule,
                axis_name=axis_name,
                update_weight_net=update_weight_net,
                unroll=self._on_cpu,
            )

        return static_step if self.loss_weighting is None else bilevel_step

    def _compile(self, update_weight_net):
        step_fn = self._step_fn(update_weight_net)

        def train_steps(state, data, inputs):
            return steps.train_steps(
                state,
                data,
                inputs,
                step_fn=step_fn,
                steps_per_epoch=self.steps_per_epoch,
            )

        return self.parallel.compile(train_steps, batch_axis=1, donate_argnums=(0,))

    def _compiled_at(self, step):
        """Returns the compiled function for a call whose first step is `step`."""
        if self.loss_weighting is None or self.steps_per_call > 1:
            return self._compiled(None)
        # A call of one step knows whether the weight net is updated, and spares the device the branch.
        return self._compiled((step + 1) % self.spec.loss_weighting.update_every == 0)

    def train_steps(self, step: int, state, data, inputs):
        """Returns the state after the steps of `inputs`, the first of which is `step`.

        State and data are replicated, inputs sharded; the state is donated.
        """
        return self._compiled_at(step)(state, data, inputs)

    def lower(self, step: int, state, data, inputs):
        """Returns the computation of `train_steps`, lowered: for the compiler's counts."""
        return self._compiled_at(step).lower(state, data, inputs)

    # Its inputs.

    def inputs(self, seed: int, step: int):
        """Yields (number of steps, inputs for `train_steps`) from a step to the run's end; `close` ends it early."""
        spec = self.spec
        call_sizes = list(self._call_sizes(step))
        if self.data.streams:
            learned = spec.loss_weighting
            on_host = input_pipeline.from_disk(
                self.data.train,
                self.data.outer if learned else None,
                seed,
                step,
                call_sizes,
                shard=self._shard,
                lookahead=learned.lookahead if learned else 1,
                num_workers=spec.execution.num_workers,
            )
        else:
            on_host = input_pipeline.from_memory(
                self._epoch_fn,
                seed,
                step,
                call_sizes,
                steps_per_epoch=self.steps_per_epoch,
                shard=self._shard,
            )
        put = functools.partial(self.parallel.shard, batch_axis=1)
        return input_pipeline.prefetch(on_host, call_sizes, put)

    def _call_sizes(self, step):
        """Yields the number of steps of each call from a step on; none goes beyond an epoch's end."""
        while step < self.total_steps:
            left_in_epoch = self.steps_per_epoch - step % self.steps_per_epoch
            size = min(self.steps_per_call, left_in_epoch, self.total_steps - step)
            yield size
            step += size

    def _epoch_indices(self, seed, epoch):
        """Returns the training indices of an epoch, and those of the outer set where weights are learned."""
        options = dict(
            batch_size=self.recipe.batch_size, num_views=self.data.source.views.num
        )
        train_options = dict(
            options,
            num_examples=len(self.data.train),
            random_bits=self.spec.augment != augment.NO_EXTRA,
        )
        if self.loss_weighting is None:
            return sampling.epoch_indices(seed, epoch, **train_options), None
        lookahead = self.spec.loss_weighting.lookahead
        train = sampling.lookahead_indices(
            seed, epoch, lookahead=lookahead, **train_options
        )
        outer = sampling.step_indices(
            sampling.outer_seed(seed),
            epoch * self.steps_per_epoch,
            num_steps=self.steps_per_epoch,
            num_examples=len(self.data.outer),
            **options,
        )
        return train, outer

    def device_data(self, teacher, outer_teacher=None) -> steps.TrainData:
        """Returns the training set on the devices, with what its `TeacherFn` reads, and the outer set if it is used."""
        data = _train_data(self.data.train, teacher)
        if self.loss_weighting is not None:
            data = data._replace(outer=_train_data(self.data.outer, outer_teacher))
        return self.parallel.replicate(data)


def _train_data(images: Images | Records, teacher) -> steps.TrainData:
    if isinstance(images, Records):
        return steps.TrainData(None, None, teacher)
    return steps.TrainData(images.images, images.labels, teacher)


def _schedule(lr, lr_decay, recipe: Recipe, total_steps):
    return states.step_schedule(
        lr, total_steps=total_steps, milestones=recipe.milestones, decay=lr_decay
    )


def _learned_weights(
    spec: LearnedWeights,
    recipe: Recipe,
    objective: methods.Objective,
    data: Dataset,
    total_steps: int,
) -> bilevel_steps.LearnedWeighting:
    longtail.check_outer(
        data.outer.labels,
        data.outer.keys,
        data.train.keys,
        num_classes=data.num_classes,
        batch_size=recipe.batch_size,
    )
    schedule = _schedule(spec.lr, spec.lr_decay, recipe, total_steps)

    def schedule_of_updates(update):
        # Adam counts its own updates: the u-th comes at the end of step u · k + k − 1.
        return schedule(update * spec.update_every + spec.update_every - 1)

    return bilevel_steps.LearnedWeighting(
        net=models.WeightNet(len(objective.terms), spec.hidden),
        features_fn=methods.features(objective, spec.features),
        num_features=len(spec.features),
        outer_loss_fn=methods.outer_loss(objective, spec.outer_loss),
        scales=spec.scales or (1.0,) * len(objective.terms),
        optimizer=states.adam(schedule_of_updates, weight_decay=spec.weight_decay),
        update_every=spec.update_every,
        groups=data.groups,
    )


def _teacher_fn(spec: TrainingSpec, data: Dataset) -> steps.TeacherFn:
    if spec.teacher_source == "none":
        return steps.no_teacher
    if spec.teacher_source == "table":
        return steps.table_teacher
    model = teacher_model(spec, data)
    return (
        steps.feature_teacher(model)
        if spec.teacher_source == "features"
        else steps.network_teacher(model)
    )


def teacher_model(spec: TrainingSpec, data: Dataset):
    """Returns the teacher as it is used: in evaluation mode, so without a device axis."""
    return models.create(
        spec.teacher_model, data.num_classes, precision=spec.execution.precision
    )


@functools.lru_cache(maxsize=3)
def trainer(spec: TrainingSpec) -> Trainer:
    """Returns the trainer of a specification; the last ones are kept, so that seeds share what is compiled.

    Raises:
      ConfigError: as `dataset.load`, or parts that do not fit each other.
    """
    data = datasets.load(spec.data)
    try:
        return Trainer(spec, data)
    except ValueError as error:
        raise ConfigError(str(error)) from error
