"""Config -> objects: a network's training as compiled functions."""

import functools
import json

import jax
import ml_collections
import numpy as np

from experiments.config import checks
from experiments.trainer import dataset, input_pipeline
from experiments.trainer.dataset import Dataset
from ltkd_jax import methods, models
from ltkd_jax.data import augment, longtail, streaming
from ltkd_jax.data import sampling as plans
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import review
from ltkd_jax.training import bilevel_steps, steps, teacher_table
from ltkd_jax.training import state as states
from ltkd_jax.training.parallel import Parallel


class Program:
    """One network's training as compiled functions; the seed is an argument, so all seeds share one compilation.

    Attributes:
      total_steps, steps_per_epoch: of the whole run.
      objective, schedule: the loss terms and the learning rate, functions of the step.
      weighting: how the terms' weights are learned; None where they are static.
      model: as it is evaluated, without a device axis.
      init: `seed -> TrainState` on the default device.
      evaluate: `(variables, images) -> metrics.EvalSums` of a set, variables replicated.
    """

    def __init__(self, config, data: Dataset, *, role, recipe, method, weighting, teacher_fn):
        self.data, self.recipe = data, recipe
        self.parallel = Parallel(config.parallel, jax.devices()[: config.devices or None])
        self.steps_per_epoch = plans.steps_per_epoch(len(data.train), recipe.batch_size)
        self.total_steps = _total_steps(recipe, self.steps_per_epoch)
        # The one switch for CPU, where XLA's convolutions are many times slower inside a loop or a branch.
        on_cpu = jax.default_backend() == "cpu"
        # Streamed batches are large: an epoch of them is not sent to the device at once.
        self.steps_per_call = config.steps_per_call or (1 if on_cpu or data.streams else self.steps_per_epoch)
        self.objective = _objective(method, data, self.steps_per_epoch)
        self.schedule = self._schedule(recipe.lr, recipe.decay)
        self.weighting = self._weighting(weighting) if weighting["name"] == "bilevel" else None
        self._extra = augment.Extra(**config.augment)
        if self._extra.cutout >= min(data.image_shape[:2]):
            raise ValueError(
                f"augment.cutout={self._extra.cutout} blackens images of {data.image_shape[:2]} pixels: lower it"
            )
        places = input_pipeline.Places(
            self.parallel.places(recipe.batch_size), recipe.batch_size, mixes=self._extra.mixup > 0
        )
        self._source = self._feed(weighting, places, config.data.workers)

        optimizer = states.sgd(self.schedule, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        axis_name = self.parallel.axis_name
        model, self.model = (self._model(config, role, name) for name in (axis_name, None))
        step = dict(model=model, objective=self.objective, optimizer=optimizer, axis_name=axis_name)
        if self.weighting is None:
            fetch_fn = self._fetch(teacher_fn, self._extra)
            step_fn = functools.partial(steps.train_step, **step)
        else:
            meta_teacher_fn = teacher_fn if outer_needs_teacher(weighting) else steps.no_teacher
            fetch_fn = functools.partial(
                bilevel_steps.fetch,
                fetch_fn=self._fetch(teacher_fn, self._extra),
                fetch_meta_fn=self._fetch(meta_teacher_fn, augment.NOTHING),
            )
            step_fn = functools.partial(
                bilevel_steps.bilevel_step, weighting=self.weighting, schedule=self.schedule, unroll=on_cpu, **step
            )
        self.init = jax.jit(lambda seed: self._init(self.model, optimizer, seed))
        self.evaluate = Evaluator(self.model, data, self.parallel, config.eval_batch).evaluate
        self._compiled = functools.cache(functools.partial(self._compile, fetch_fn, step_fn))

    def _model(self, config, role, axis_name):
        options = dict(precision=config.precision, axis_name=axis_name)
        model = models.create(config[role].model, self.data.num_classes, **options)
        if not self.objective.needs_features:
            return model
        return review.reviewed(model, teacher_model(config, self.data), self.data.image_shape)

    def _fetch(self, teacher_fn, extra):
        data = self.data
        options = dict(views=data.source.views, preprocess=data.preprocess, teacher_fn=teacher_fn, extra=extra)
        return functools.partial(steps.fetch, **options)

    def _feed(self, weighting, places, workers):
        data, learned = self.data, self.weighting is not None
        ahead = weighting.get("lookahead", 1)
        if data.streams:
            meta = data.meta if learned else None
            reading = dict(places=places, total_steps=self.total_steps, workers=workers)
            return input_pipeline.FromDisk(data.train, meta, ahead=ahead, **reading)
        bits = self._extra != augment.NOTHING
        rows = dict(batch_size=self.recipe.batch_size, num_views=data.source.views.num, bits=bits)
        if learned:
            sizes = dict(num_train=len(data.train), num_meta=len(data.meta))
            plan = functools.partial(bilevel_steps.rows, ahead=ahead, **sizes, **rows)
        else:
            plan = functools.partial(plans.epoch_plan, num_examples=len(data.train), **rows)
        return input_pipeline.FromMemory(jax.jit(plan), self.steps_per_epoch, places)

    def chunks(self, seed: int, step: int):
        """Yields (number of steps, rows for `chunk`) from a step to the run's end; `close` ends it early."""
        place = functools.partial(self.parallel.shard, batch_axis=1)
        sizes = list(self._sizes(step))
        return input_pipeline.chunks(self._source, seed, step, sizes, place=place)

    def _sizes(self, step):
        while step < self.total_steps:
            left = self.steps_per_epoch - step % self.steps_per_epoch
            size = min(self.steps_per_call, left, self.total_steps - step)
            yield size
            step += size

    def chunk(self, step: int, state, data, rows):
        """The state after the steps of `rows`, the first of which is `step`; state and data replicated, rows sharded.

        The state is donated.
        """
        return self._function(step)(state, data, rows)

    def lower(self, step: int, state, data, rows):
        """`chunk`'s computation, lowered: for the compiler's counts."""
        return self._function(step).lower(state, data, rows)

    def _function(self, step):
        known = {}
        if self.weighting is not None and self.steps_per_call == 1:
            known["changes"] = (step + 1) % self.weighting.every == 0
        return self._compiled(**known)

    def _compile(self, fetch_fn, step_fn, **known):
        chunk = functools.partial(
            steps.train_chunk,
            steps_per_epoch=self.steps_per_epoch,
            fetch_fn=fetch_fn,
            step_fn=functools.partial(step_fn, **known),
        )
        return self.parallel.compile(chunk, batch_axis=1, donate=(0,))

    def train_data(self, teacher, meta_teacher=None):
        """The training set on the devices, with what its `TeacherFn` reads; the meta set beside it where it is used."""
        train = _on_device(self.data.train, teacher)
        if self.weighting is None:
            return self.parallel.replicate(train)
        return self.parallel.replicate(bilevel_steps.BilevelData(train, _on_device(self.data.meta, meta_teacher)))

    def _schedule(self, base, decay):
        return states.step_schedule(base, total_steps=self.total_steps, milestones=self.recipe.milestones, decay=decay)

    def _weighting(self, spec) -> bilevel_steps.Weighting:
        data, objective, every = self.data, self.objective, spec["every"]
        longtail.check_meta(
            data.meta.labels,
            data.meta.keys,
            data.train.keys,
            num_classes=data.num_classes,
            batch_size=self.recipe.batch_size,
        )
        by_step = self._schedule(spec["lr"], spec["decay"])
        return bilevel_steps.Weighting(
            net=models.WeightNet(len(objective.terms), tuple(spec["hidden"])),
            features=methods.features(objective, spec["features"]),
            num_features=len(spec["features"]),
            outer_loss=methods.outer_loss(objective, spec["outer"]),
            scales=tuple(spec["scales"]) or (1.0,) * len(objective.terms),
            # Adam counts its own updates: the u-th comes at the end of step u · k + k − 1.
            optimizer=states.adam(
                lambda update: by_step(update * every + every - 1), weight_decay=spec["weight_decay"]
            ),
            every=every,
            groups=data.groups,
        )

    def _init(self, model, optimizer, seed):
        state = states.create(model, optimizer, len(self.objective.terms), self.data.image_shape, seed)
        return state if self.weighting is None else self.weighting.add_to(state, seed)


def _on_device(images, teacher):
    if isinstance(images, Records):
        return steps.TrainData(None, None, teacher)
    return steps.TrainData(images.images, images.labels, teacher)


def _objective(method, data, steps_per_epoch):
    values = {key: value for key, value in method.items() if key not in ("name", "warmup_epochs")}
    warmup = round(method.get("warmup_epochs", 0.0) * steps_per_epoch)
    return methods.create(method["name"], data.class_counts, data.groups, warmup_steps=warmup, **values)


def outer_needs_teacher(weighting) -> bool:
    """Whether the outer loss looks at the teacher's logits of the meta images."""
    return weighting["name"] == "bilevel" and weighting["outer"] != "hard"


def _total_steps(recipe, steps_per_epoch):
    of_epochs = max(1, round(recipe.epochs * steps_per_epoch))
    return min(of_epochs, recipe.max_steps or of_epochs)


class Evaluator:
    """Evaluation of a model on a set of images, batch by batch, each example counted once."""

    def __init__(self, model, data: Dataset, parallel: Parallel, batch_size: int):
        self._parallel = parallel
        largest = min(batch_size, max(len(data.train), len(data.test)))
        self._batch = -(-largest // parallel.num_devices) * parallel.num_devices
        step = functools.partial(steps.eval_step, model=model, preprocess=data.preprocess, axis_name=parallel.axis_name)
        self._step = parallel.compile(step, batch_axis=0)
        self._on_device = {}

    def evaluate(self, variables, images: Images | Records):
        """`metrics.EvalSums` of a set; `variables` replicated."""
        parts = [self._parallel.first(self._step(variables, batch)) for batch in self._sharded(images)]
        return jax.tree.map(lambda *sums: np.sum([np.asarray(s, np.float64) for s in sums], axis=0), *parts)

    def _sharded(self, images):
        """Batches on the devices, where images of the memory stay from the first call on."""
        if isinstance(images, Records):
            return self._batches(images)
        if id(images) not in self._on_device:
            # The images are held too: were they freed, another set could get their id.
            self._on_device[id(images)] = images, list(self._batches(images))
        return self._on_device[id(images)][1]

    def _batches(self, images):
        """This process's share of full batches, the last of them filled up by an image that does not count."""
        count, places = len(images), self._parallel.places(self._batch)
        rows = np.arange(-(-count // self._batch))[:, None] * self._batch + places[None, :]
        last = np.minimum(rows, count - 1)
        if isinstance(images, Records):
            found = streaming.in_order(images, last)
        else:
            found = ((images.images[row], images.labels[row]) for row in last)
        for mask, batch in zip(rows < count, found):
            yield self._parallel.shard(steps.EvalBatch(*batch, mask), 0)


def needs_teacher(config) -> bool:
    """Whether a term of the method distils."""
    return methods.create(config.method.name, np.ones(3)).needs_teacher


def student_program(config, teacher_kind: str) -> Program:
    """The student's program.

    Args:
      config: a whole config.
      teacher_kind: where the teacher's logits come from: "none", "table", "network", or "features" for a network
        whose features are distilled too.
    """
    return _program(_seedless(config), "student", teacher_kind)


def teacher_program(config) -> Program:
    """The teacher's: plain cross-entropy on the same long-tailed data, in the same loop."""
    return _program(_seedless(config), "teacher", "none")


def _seedless(config):
    return json.dumps(checks.without(checks.plain(config), ("seed", "seed_teacher")))


@functools.lru_cache(maxsize=3)
def _program(key: str, role: str, teacher_kind: str) -> Program:
    config = ml_collections.ConfigDict(json.loads(key))
    return program(config, dataset.load(config), role=role, teacher_kind=teacher_kind)


def program(config, data: Dataset, *, role: str, teacher_kind: str) -> Program:
    """The program of a "student" or a "teacher" on any data; see `student_program`."""
    if role == "teacher":
        method, weighting, recipe = {"name": "ce"}, {"name": "static"}, config.teacher.train
    else:
        method, weighting, recipe = config.method.to_dict(), config.weighting.to_dict(), config.train
    teacher_fn = {
        "none": lambda: steps.no_teacher,
        "table": lambda: steps.table_teacher,
        "network": lambda: steps.network_teacher(teacher_model(config, data)),
        "features": lambda: steps.feature_teacher(teacher_model(config, data)),
    }[teacher_kind]()
    try:
        found = Program(
            config, data, role=role, recipe=recipe, method=method, weighting=weighting, teacher_fn=teacher_fn
        )
        jax.eval_shape(found.init, 0)  # a model that the images do not fit says so now
        return found
    except ValueError as error:
        raise checks.ConfigError(str(error)) from error


def teacher_model(config, data: Dataset):
    """The teacher as it is used: in evaluation mode, so without a device axis."""
    return models.create(config.teacher.model, data.num_classes, precision=config.precision)


def table_logits(config, data: Dataset):
    """`(train data, rows) -> logits [B, C]`, compiled; the data holds the teacher's variables. For its table."""
    fetch = functools.partial(
        steps.fetch,
        views=data.source.views,
        preprocess=data.preprocess,
        teacher_fn=steps.network_teacher(teacher_model(config, data)),
    )
    return jax.jit(lambda train_data, rows: fetch(train_data, rows).teacher_logits)


def teacher_kind(config, data: Dataset) -> str:
    """Where this run's logits of the teacher come from, see `student_program`: `teacher.table`, or for "auto" the rule
    of `teacher_table`. There is no table where views have no end, or features are needed."""
    objective = methods.create(config.method.name, np.ones(3))
    if not objective.needs_teacher:
        return "none"
    if objective.needs_features:
        return "features"
    if config.teacher.table == "never" or checks.no_table(config):
        return "network"
    if config.teacher.table == "always" or checks.given_teacher(config) == "logits":
        return "table"
    steps_per_epoch = plans.steps_per_epoch(len(data.train), config.train.batch_size)
    epochs = _total_steps(config.train, steps_per_epoch) / steps_per_epoch
    views = data.source.views.num
    tabled = len(data.train) + (len(data.meta) if outer_needs_teacher(config.weighting) else 0)
    size = teacher_table.table_bytes(tabled, views, data.num_classes)
    # A lookahead meets each image K times in an epoch.
    epochs *= config.weighting.get("lookahead", 1)
    pays = teacher_table.pays(views, epochs=epochs, runs=config.teacher.table_runs)
    return "table" if pays and size <= config.teacher.table_memory * dataset.device_memory() else "network"
