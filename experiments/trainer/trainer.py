"""The compiled functions of one network's training.

This module assembles the training step from the library's parts: images, augmentation,
teacher, model, loss terms and optimizer.
"""

import functools
import math
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config.spec import LearnedWeights, Recipe, TrainingSpec
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import input_pipeline
from experiments.trainer.dataset import Dataset
from experiments.trainer.evaluator import Evaluator
from ltkd_jax import inference, methods, metrics, models
from ltkd_jax.data import augment, longtail, sampling
from ltkd_jax.data.records import Images, Records
from ltkd_jax.data.streaming import StreamedBatch
from ltkd_jax.models import review
from ltkd_jax.training import bilevel_steps, steps
from ltkd_jax.training import state as states
from ltkd_jax.training.parallel import Parallel
from ltkd_jax.training.state import TrainState


class Trainer:
    """Holds the compiled functions of one network's training, and makes their inputs.

    The training loop (`loop.fit`) calls `train_steps` on what `inputs` yields. No
    function is compiled for a seed, so all seeds share one compilation.

    Args:
      spec: of the training.
      data: the data set of the training.
      devices: by default those of the process, as many as the specification says. They
        may be only described (`jax.experimental.topologies`), to compile for them.

    Attributes:
      steps_per_epoch: the number of steps of an epoch.
      total_steps: the number of steps of the complete run.
      steps_per_call: the number of steps that one call of `train_steps` makes; the last
        call of an epoch may make fewer.
      objective: the loss terms with their static weights.
      schedule: the learning rate, a function of the step.
      loss_weighting: how a weight net learns the terms' weights; None if they are
        static.
      model: the network as it is evaluated, without a device axis.
      init: `seed -> TrainState`, on the default device.
      evaluate: `(replicated variables, images) -> metrics.EvalSums`.

    Raises:
      ValueError: the parts do not fit each other, such as a model that needs larger
        images.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        data: Dataset,
        devices: Sequence[jax.Device] | None = None,
    ):
        recipe = spec.recipe
        execution = spec.execution
        self.spec = spec
        self.data = data
        self.recipe = recipe
        platform = jax.default_backend() if devices is None else devices[0].platform
        if devices is None:
            devices = jax.devices()[: execution.devices or None]
        self.parallel = Parallel(execution.parallel, devices)
        self.steps_per_epoch = sampling.steps_per_epoch(
            len(data.train), recipe.batch_size
        )
        self.total_steps = recipe.total_steps(self.steps_per_epoch)
        # On CPU, XLA compiles convolutions inside a loop or a branch to much slower
        # code. So on CPU a call makes one step by default, and lookahead is unrolled.
        self._on_cpu = platform == "cpu"
        if execution.steps_per_call:
            self.steps_per_call = execution.steps_per_call
        elif self._on_cpu or data.is_streamed:
            # Streamed images are inputs of the call, and an epoch of them would not
            # fit into memory.
            self.steps_per_call = 1
        else:
            self.steps_per_call = self.steps_per_epoch

        self.objective = spec.method.objective(
            data.class_counts, data.groups, self.steps_per_epoch
        )
        self.schedule = states.step_schedule(
            recipe.lr,
            total_steps=self.total_steps,
            milestones=recipe.milestones,
            decay=recipe.lr_decay,
            warmup_steps=round(recipe.lr_warmup_epochs * self.steps_per_epoch),
        )
        self._optimizer = states.sgd(
            self.schedule, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.loss_weighting = None
        if spec.loss_weighting is not None:
            self.loss_weighting = _create_weighting(
                spec.loss_weighting, recipe, self.objective, data, self.total_steps
            )
        # Two modules for the same parameters. They differ under `pmap`: the one in the
        # training step averages the statistics of batch norm over the devices.
        self.model = self._create_model(axis_name=None)
        self._model_in_step = self._create_model(axis_name=self.parallel.axis_name)
        self._teacher_fn = _create_teacher_fn(spec, data)
        self._shard = input_pipeline.BatchShard(
            self.parallel.local_positions(recipe.batch_size),
            recipe.batch_size,
            mixup=spec.augment.mixup > 0,
        )
        outer_size = 0
        if self.loss_weighting is not None:
            # If the outer set is smaller than a batch, each step takes all of it.
            outer_size = min(recipe.batch_size, len(data.outer))
            self._check_outer_batch(outer_size)
        self._outer_shard = input_pipeline.BatchShard(
            self.parallel.local_positions(outer_size), outer_size
        )

        self.init = jax.jit(self._init)
        self.evaluate = Evaluator(
            self.model, data, self.parallel, execution.eval_batch_size
        ).evaluate
        self._epoch_fn = jax.jit(self._epoch_indices)
        # Compiles each function once; `_compiled_at` chooses one.
        self._compiled = functools.cache(self._compile)
        self._check_input()

    def _create_model(self, axis_name: str | None) -> models.Model:
        model = models.create(
            self.spec.model,
            self.data.num_classes,
            precision=self.spec.execution.precision,
            axis_name=axis_name,
        )
        if not self.objective.needs_features:
            return model
        # The method compares features, so the student gets layers that map its features
        # to the shapes of the teacher's.
        teacher: Any = teacher_model(self.spec, self.data)
        return review.with_fusion(model, teacher, self.data.image_shape)

    def _check_input(self) -> None:
        """Raises ValueError unless the augmentation and the model fit the images."""
        policy = self.spec.augment.policy
        cutout = self.spec.augment.cutout
        if len(self.data.image_shape) == 1 and (policy != "none" or cutout):
            raise ValueError(
                f"augment.policy={policy!r}, augment.cutout={cutout}: features have no "
                "pixels: set them to 'none' and 0"
            )
        height_width = self.data.image_shape[:2]
        if cutout >= min(height_width):
            raise ValueError(
                f"augment.cutout={cutout} blackens images of {height_width} pixels: "
                "lower it"
            )
        # Only shapes are computed: a model that needs larger images fails here, before
        # any work is done.
        jax.eval_shape(self.init, 0)

    def _check_outer_batch(self, size: int) -> None:
        """Raises ValueError unless an outer batch splits evenly over the devices."""
        num_devices = self.parallel.num_devices
        if size % num_devices == 0:
            return
        per_class = self.spec.data.outer_per_class
        fitting = per_class
        while fitting * self.data.num_classes % num_devices:
            fitting += 1
        raise ValueError(
            f"data.outer_per_class={per_class}: each step takes the whole outer set, "
            f"since it has only {size} images, fewer than a batch, and {size} cannot "
            f"be divided among {num_devices} devices: hold out {fitting} of each "
            f"class, or set config.devices to {math.gcd(size, num_devices)}"
        )

    def _init(self, seed: jax.Array | int) -> TrainState:
        state = states.create(
            self.model,
            self._optimizer,
            len(self.objective.terms),
            self.data.image_shape,
            seed,
        )
        if self.loss_weighting is not None:
            state = self.loss_weighting.init_weight_net(state, seed)
        return state

    # The training step.

    def _step_fn(self, update_weight_net: bool | None) -> steps.StepFn:
        """Returns the training step, a pure function `(state, data, inputs) -> state`.

        Args:
          update_weight_net: with learned weights, whether this step updates the weight
            net; None lets the device decide. Without them it has no effect.
        """
        if self.loss_weighting is None:
            return self._static_step
        return functools.partial(
            self._bilevel_step, update_weight_net=update_weight_net
        )

    def _static_step(
        self, state: TrainState, data: steps.TrainData, inputs: steps.StepInputs
    ) -> TrainState:
        return steps.train_step(
            state,
            self._train_batch(data, inputs.train, inputs.mixup),
            model=self._model_in_step,
            objective=self.objective,
            optimizer=self._optimizer,
            axis_name=self.parallel.axis_name,
        )

    def _bilevel_step(
        self,
        state: TrainState,
        data: steps.TrainData,
        inputs: steps.StepInputs,
        *,
        update_weight_net: bool | None,
    ) -> TrainState:
        weighting = self.loss_weighting
        weighting_spec = self.spec.loss_weighting
        assert weighting is not None and weighting_spec is not None
        # Inputs are [B, K, …], split over the devices by B. The step takes [K, B, …].
        batches = []
        for j in range(weighting_spec.lookahead):
            indices, mixup = jax.tree.map(
                lambda x, j=j: x[:, j], (inputs.train, inputs.mixup)
            )
            batches.append(self._train_batch(data, indices, mixup))
        if weighting_spec.outer_loss_needs_teacher:
            outer_teacher_fn = self._teacher_fn
        else:
            outer_teacher_fn = steps.no_teacher
        assert inputs.outer is not None
        outer_batch = steps.make_batch(
            data.outer,
            inputs.outer,
            views=self.data.source.views,
            preprocess=self.data.preprocess,
            teacher_fn=outer_teacher_fn,
        )
        return bilevel_steps.bilevel_step(
            state,
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches),
            outer_batch,
            model=self._model_in_step,
            objective=self.objective,
            weighting=weighting,
            optimizer=self._optimizer,
            schedule=self.schedule,
            axis_name=self.parallel.axis_name,
            update_weight_net=update_weight_net,
            unroll=self._on_cpu,
        )

    def _train_batch(
        self, data: steps.TrainData, indices: Any, mixup: Any
    ) -> steps.Batch:
        """Returns augmented training images with labels and the teacher's outputs."""
        return steps.make_batch(
            data,
            indices,
            mixup,
            views=self.data.source.views,
            preprocess=self.data.preprocess,
            teacher_fn=self._teacher_fn,
            extra=self.spec.augment,
        )

    def train_steps(
        self, step: int, state: TrainState, data: steps.TrainData, inputs: Any
    ) -> TrainState:
        """Returns the state after the steps of one call.

        Args:
          step: the first of these steps.
          state: replicated. It is donated: its memory is reused for the result.
          data: replicated, from `device_data`.
          inputs: sharded, from `inputs`.
        """
        return self._compiled_at(step)(state, data, inputs)

    def lower(
        self, step: int, state: TrainState, data: steps.TrainData, inputs: Any
    ) -> Any:
        """Returns `train_steps` lowered for these arguments, as `jax.jit(f).lower`."""
        return self._compiled_at(step).lower(state, data, inputs)

    def argument_shapes(
        self, teacher: Any
    ) -> tuple[TrainState, steps.TrainData, steps.StepInputs]:
        """Returns the arguments of a full call of `train_steps`, as shapes.

        They are for `lower`, which needs neither the arrays nor their devices.

        Args:
          teacher: see `device_data`; leaves have a shape and a dtype. The outer loss
            must not need a teacher.
        """
        data = self._host_data(teacher, outer_teacher=None)
        inputs = jax.eval_shape(self._call_inputs)
        state = jax.eval_shape(self.init, 0)
        describe = self.parallel.describe
        return describe(state), describe(data), describe(inputs, batch_axis=1)

    def _call_inputs(self) -> steps.StepInputs:
        """Returns inputs of a full call as `inputs` yields them, of the global batch.

        It is for their shapes alone.
        """
        num_steps = min(self.steps_per_call, self.steps_per_epoch, self.total_steps)
        train, outer = jax.tree.map(
            lambda x: x[:num_steps], self._epoch_indices(jnp.int32(0), jnp.int32(0))
        )
        if self.data.is_streamed:
            train, outer = jax.tree.map(
                self._streamed_batch,
                (train, outer),
                is_leaf=lambda x: isinstance(x, sampling.BatchIndices),
            )
        mixup = train if self.spec.augment.mixup > 0 else None
        return steps.StepInputs(train, mixup, outer)

    def _streamed_batch(self, indices: sampling.BatchIndices) -> StreamedBatch:
        """Returns a batch of streamed images with the shape of these indices."""
        shape = indices.index.shape
        return StreamedBatch(
            jnp.zeros((*shape, *self.data.image_shape), jnp.uint8),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.uint32),
        )

    def _compiled_at(self, step: int) -> Any:
        """Returns the compiled function for a call whose first step is `step`."""
        weighting_spec = self.spec.loss_weighting
        if weighting_spec is None or self.steps_per_call > 1:
            return self._compiled(None)
        # For a call of a single step the host knows whether the weight net is updated.
        # It chooses between two functions, so neither needs a branch on the device.
        return self._compiled((step + 1) % weighting_spec.update_every == 0)

    def _compile(self, update_weight_net: bool | None) -> Any:
        """Returns the compiled `(state, data, inputs of S steps) -> state`."""
        step_fn = self._step_fn(update_weight_net)

        def train_steps(
            state: TrainState, data: steps.TrainData, inputs: steps.StepInputs
        ) -> TrainState:
            return steps.train_steps(
                state,
                data,
                inputs,
                step_fn=step_fn,
                steps_per_epoch=self.steps_per_epoch,
            )

        # The inputs are [S, B, …].
        return self.parallel.compile(train_steps, batch_axis=1, donate_argnums=(0,))

    # The inputs of the training step.

    def inputs(
        self, seed: int, step: int
    ) -> Generator[tuple[int, steps.StepInputs], None, None]:
        """Yields the number of steps and the inputs of each call of `train_steps`.

        They depend on the seed and the step alone, so a resumed run gets the same. The
        generator must be closed if it is not exhausted.

        Args:
          seed: of the run.
          step: the first step; the last one is the last step of the run.
        """
        call_sizes = self._call_sizes(step)
        train = self.data.train
        outer = self.data.outer
        if isinstance(train, Records):
            assert isinstance(outer, Records)
            weighting_spec = self.spec.loss_weighting
            host_inputs = input_pipeline.from_disk(
                train,
                outer if weighting_spec else None,
                seed,
                step,
                call_sizes,
                shard=self._shard,
                outer_shard=self._outer_shard,
                lookahead=weighting_spec.lookahead if weighting_spec else 1,
                num_workers=self.spec.execution.num_workers,
            )
        else:
            host_inputs = input_pipeline.from_memory(
                self._epoch_fn,
                seed,
                step,
                call_sizes,
                steps_per_epoch=self.steps_per_epoch,
                shard=self._shard,
                outer_shard=self._outer_shard,
            )
        # Host arrays are [S, B, …], for S steps.
        put = functools.partial(self.parallel.shard, batch_axis=1)
        return input_pipeline.prefetch(host_inputs, call_sizes, put)

    def _call_sizes(self, step: int) -> list[int]:
        """Returns the number of steps of each call, from a step to the end of the run.

        No call goes beyond the end of an epoch, where the loop logs and evaluates.
        """
        sizes = []
        while step < self.total_steps:
            left_in_epoch = self.steps_per_epoch - step % self.steps_per_epoch
            size = min(self.steps_per_call, left_in_epoch, self.total_steps - step)
            sizes.append(size)
            step += size
        return sizes

    def _epoch_indices(
        self, seed: jax.Array, epoch: jax.Array
    ) -> tuple[sampling.BatchIndices, sampling.BatchIndices | None]:
        """Returns the indices of an epoch's batches of the training and the outer set.

        The indices of the outer set are None if the weights are static.
        """
        batch_size = self.recipe.batch_size
        num_views = self.data.source.views.num
        # Bits are drawn only for augmentation that needs them.
        random_bits = self.spec.augment != augment.NO_EXTRA
        if self.spec.loss_weighting is None:
            indices = sampling.epoch_indices(
                seed,
                epoch,
                num_examples=len(self.data.train),
                batch_size=batch_size,
                num_views=num_views,
                random_bits=random_bits,
            )
            return indices, None
        indices = sampling.lookahead_indices(
            seed,
            epoch,
            lookahead=self.spec.loss_weighting.lookahead,
            num_examples=len(self.data.train),
            batch_size=batch_size,
            num_views=num_views,
            random_bits=random_bits,
        )
        # An epoch of the outer set has another length. `epoch` is one of the training
        # set, so its first step says which outer batches are next.
        outer_indices = sampling.step_indices(
            sampling.outer_seed(seed),
            epoch * self.steps_per_epoch,
            num_steps=self.steps_per_epoch,
            num_examples=len(self.data.outer),
            batch_size=self._outer_shard.batch_size,
            num_views=num_views,
        )
        return indices, outer_indices

    def classifier(self, state: TrainState) -> inference.Classifier:
        """Returns the network of a state by itself, with host arrays.

        Args:
          state: replicated.
        """
        variables = jax.device_get(self.parallel.unreplicate(state).variables)
        if isinstance(self.model, review.StudentWithFusion):
            variables = review.student_variables(variables)
        source = self.data.source
        return inference.Classifier(
            model=self.spec.model,
            variables=variables,
            class_names=source.class_names,
            image_shape=self.data.image_shape,
            mean=source.mean,
            std=source.std,
            margin=self.data.is_streamed,
            precision=self.spec.execution.precision,
        )

    def device_data(self, teacher: Any, outer_teacher: Any = None) -> steps.TrainData:
        """Puts the training set, and for learned weights the outer set, on the devices.

        Args:
          teacher: what the step reads of the teacher for the training set: a table of
            logits, the teacher's variables, or None.
          outer_teacher: the same for the outer set.

        Returns:
          Replicated data for `train_steps`.
        """
        return self.parallel.replicate(self._host_data(teacher, outer_teacher))

    def _host_data(self, teacher: Any, outer_teacher: Any) -> steps.TrainData:
        """Returns what `device_data` puts on the devices."""
        class_mass = self._class_mass(teacher)
        data = _train_data(self.data.train, teacher, class_mass)
        if self.loss_weighting is not None:
            # The target is the same everywhere: the mass is that of the training set.
            outer = _train_data(self.data.outer, outer_teacher, class_mass)
            data = data._replace(outer=outer)
        return data

    def _class_mass(self, teacher: Any) -> np.ndarray | None:
        """Returns the class mass `[C]` of the teacher, if a term reads it.

            (1/N) Σ_n softmax(z_n / τ)

        z_n are its logits of the N training images as they are, without crops and
        flips, from the table if there is one.
        """
        temperature = self.objective.mass_temperature
        if temperature is None:
            return None
        images = self.data.train
        if self.spec.teacher_source == "table":
            logits = jnp.asarray(self.data.source.views.of_unchanged(teacher))
            logits = logits / temperature
            is_image = np.ones(len(images), bool)
            mass = metrics.eval_sums(logits, images.labels, is_image).mass
        else:
            evaluator = Evaluator(
                teacher_model(self.spec, self.data),
                self.data,
                self.parallel,
                self.spec.execution.eval_batch_size,
                temperature,
            )
            mass = evaluator.evaluate(self.parallel.replicate(teacher), images).mass
        # The loss divides by the mass of a group, which must not underflow to 0.
        return np.maximum(
            np.asarray(mass / len(images), np.float32), np.finfo(np.float32).tiny
        )


def _train_data(
    images: Images | Records, teacher: Any, class_mass: Any
) -> steps.TrainData:
    """Returns the data of a set; streamed images are inputs of the step instead."""
    if isinstance(images, Records):
        return steps.TrainData(None, None, teacher, class_mass=class_mass)
    # These are NumPy arrays, which the types of `TrainData` do not allow.
    pixels: Any = images.images
    labels: Any = images.labels
    return steps.TrainData(pixels, labels, teacher, class_mass=class_mass)


def _create_weighting(
    spec: LearnedWeights,
    recipe: Recipe,
    objective: methods.Objective,
    data: Dataset,
    total_steps: int,
) -> bilevel_steps.LearnedWeighting:
    """Returns the weight net, its input, its loss and its optimizer."""
    longtail.check_outer(
        data.outer.labels,
        data.outer.keys,
        data.train.keys,
        num_classes=data.num_classes,
    )
    schedule = states.step_schedule(
        spec.lr,
        total_steps=total_steps,
        milestones=recipe.milestones,
        decay=spec.lr_decay,
    )

    def schedule_of_updates(update: Any) -> Any:
        # The milestones count steps, but Adam counts its own updates. Update u comes
        # at the end of step u · k + k − 1.
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


def _create_teacher_fn(spec: TrainingSpec, data: Dataset) -> steps.TeacherFn:
    """Returns the function by which a step gets the teacher's outputs."""
    if spec.teacher_source == "none":
        return steps.no_teacher
    if spec.teacher_source == "table":
        return steps.table_teacher
    model = teacher_model(spec, data)
    if spec.teacher_source == "features":
        return steps.feature_teacher(model)
    return steps.network_teacher(model)


def teacher_model(spec: TrainingSpec, data: Dataset) -> models.Model:
    """Returns the teacher's network; it is only evaluated and needs no device axis."""
    return models.create(
        spec.teacher_model, data.num_classes, precision=spec.execution.precision
    )


# Trainers are kept, so that runs of one process that differ only in their seeds share
# the compiled functions.
@functools.lru_cache(maxsize=3)
def get_trainer(spec: TrainingSpec) -> Trainer:
    """Returns the trainer of a specification.

    Raises:
      ConfigError: see `dataset.load`; or the parts do not fit each other.
    """
    data = datasets.load(spec.data)
    try:
        return Trainer(spec, data)
    except ValueError as error:
        raise ConfigError(str(error)) from error
