"""Config -> objects: the checks, the identity of a run, its data, and its compiled functions."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import ml_collections
import numpy as np

from ltkd_jax import groups, models, objectives
from ltkd_jax.data import augment, longtail, sources
from ltkd_jax.data import plan as plans
from ltkd_jax.training import state as states
from ltkd_jax.training import steps, teacher_table
from ltkd_jax.training.parallel import MODES, Parallel

# How a run is carried out, not what it computes: no part of a result's identity. (A teacher from elsewhere is one, by
# its hash and not by its folder.)
EXECUTION = (
    "data.dir",
    "teacher.cache",
    "teacher.checkpoint",
    "teacher.table",
    "teacher.table_memory",
    "teacher.table_runs",
    "parallel",
    "steps_per_call",
    "eval_batch",
    "eval_every",
    "checkpoint_every",
    "smoke",
)
_TEACHER_KEYS = ("data", "groups", "seed_split", "seed_teacher", "precision")


class ConfigError(ValueError):
    """A config that cannot be run; its message names the key, the value and the remedy."""


def validate(config) -> None:
    """Checks all that can be checked without the data.

    Raises:
      ConfigError: naming the key, its value and what it may be.
    """
    method = config.method.to_dict()
    try:
        known = set(objectives.hyperparameters(method["name"])) | {"name", "warmup_epochs"}
        for role in ("teacher", "student"):
            models.create(config[role].model, 1, precision=config.precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if known != set(method):
        raise ConfigError(
            f"config.method holds {sorted(method)}, but {method['name']!r} takes {sorted(known)}: "
            f"choose a method by the config's argument, --config=configs/….py:{method['name']}"
        )
    _require(config.parallel in MODES, "parallel", config.parallel, f"must be one of {', '.join(MODES)}")
    choices = ("auto", "always", "never")
    _require(config.teacher.table in choices, "teacher.table", config.teacher.table, f"must be one of {choices}")
    memory = config.teacher.table_memory
    _require(0 < memory <= 1, "teacher.table_memory", memory, "must lie in (0, 1]")
    _require(config.data.imbalance >= 1, "data.imbalance", config.data.imbalance, "must be at least 1 (balanced)")
    for key in ("data.n_max", "data.meta_per_class", "data.validation_per_class", "data.test_images"):
        _require(_at(config, key) >= 0, key, _at(config, key), "must not be negative")
    for key in ("eval_batch", "eval_every", "checkpoint_every", "teacher.table_runs"):
        _require(_at(config, key) >= 1, key, _at(config, key), "must be at least 1")
    for key in ("steps_per_call", "method.warmup_epochs", "seed", "seed_split", "seed_teacher"):
        _require(0 <= _at(config, key) < 2**31, key, _at(config, key), "must not be negative, and below 2³¹")
    for path, value in _floats(config.to_dict()):
        _require(np.isfinite(value), path, value, "must be finite")
    temperature = method.get("temperature", 1.0)
    _require(temperature > 0, "method.temperature", temperature, "must be positive")
    for role, recipe in (("train", config.train), ("teacher.train", config.teacher.train)):
        _validate_recipe(role, recipe, config.parallel)


def _validate_recipe(role, recipe, parallel):
    for key in ("batch_size", "epochs", "lr", "decay"):
        _require(recipe[key] > 0, f"{role}.{key}", recipe[key], "must be positive")
    for key in ("max_steps", "weight_decay"):
        _require(recipe[key] >= 0, f"{role}.{key}", recipe[key], "must not be negative")
    _require(0 <= recipe.momentum < 1, f"{role}.momentum", recipe.momentum, "must lie in [0, 1)")
    inside = all(isinstance(m, (int, float)) and 0 < m <= 1 for m in recipe.milestones)
    _require(inside, f"{role}.milestones", recipe.milestones, "must be fractions of the run, in (0, 1]")
    devices = jax.device_count()
    divides = recipe.batch_size % devices == 0
    _require(divides, f"{role}.batch_size", recipe.batch_size, f"must be a multiple of the {devices} devices")


def _require(condition, key, value, what):
    if not condition:
        raise ConfigError(f"config.{key}={value!r} {what}")


def _floats(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def _at(config, path):
    for name in path.split("."):
        config = config[name]
    return config


def identity(config) -> dict:
    """What the result depends on: the config without the keys of `EXECUTION`; a teacher from elsewhere by its hash."""
    tree = _without(_plain(config), EXECUTION)
    if config.teacher.checkpoint:
        tree["teacher"]["checkpoint"] = teacher_results(config.teacher.checkpoint)["hash"]
    return tree


def config_hash(config) -> str:
    """Twelve hexadecimal digits of the SHA-256 of `identity(config)`."""
    return identity_hash(identity(config))


def teacher_identity(config) -> dict:
    """What the teacher depends on: data, split, model, recipe and precision, and nothing of the student."""
    whole = identity(config)
    own = {key: value for key, value in whole["teacher"].items() if key != "checkpoint"}
    return {**{key: whole[key] for key in _TEACHER_KEYS}, "teacher": own}


def teacher_results(folder) -> dict:
    """The `results.json` of a finished teacher.

    Raises:
      ConfigError: the folder holds none.
    """
    path = pathlib.Path(folder) / "results.json"
    found = read_json(path) if path.exists() else {}
    if not {"hash", "model", "step"} <= set(found):
        raise ConfigError(
            f"{folder} holds no finished teacher: give config.teacher.checkpoint a folder of config.teacher.cache, "
            "or, where it is of the cache, remove it and the teacher is trained again"
        )
    return found


def read_json(path) -> dict:
    """A JSON object from a file.

    Raises:
      ConfigError: the file is damaged.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object: remove it")
    return found


def teacher_hash(config) -> str:
    """The hash of `teacher_identity(config)`."""
    return identity_hash(teacher_identity(config))


def identity_hash(tree: dict) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a tree, as JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _plain(config):
    """A ConfigDict as JSON has it: dicts, lists and scalars."""
    return json.loads(json.dumps(config.to_dict()))


def _without(tree, paths, prefix=""):
    return {
        key: _without(value, paths, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in paths
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A long-tailed training set, balanced held-out sets, and how its classes are grouped. Host arrays."""

    source: sources.Source
    train: sources.Images
    validation: sources.Images
    test: sources.Images
    class_counts: np.ndarray
    groups: groups.ClassGroups
    shots: dict[str, np.ndarray]

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.images.shape[1:]

    def preprocess(self, images):
        """uint8 images -> normalised float images."""
        return augment.normalize(images, self.source.mean, self.source.std)


def dataset(config) -> Dataset:
    """The data of a config; the last ones are kept, so that runs in one process share them.

    Raises:
      ConfigError: unknown or unprepared data, or a split that the data cannot give.
    """
    keys = ("data", "groups", "seed_split")
    return _dataset(json.dumps({key: _plain(config)[key] for key in keys}))


@functools.lru_cache(maxsize=2)
def _dataset(key: str) -> Dataset:
    spec = json.loads(key)
    data = spec["data"]
    try:
        source = sources.load(data["name"], data["dir"] or None)
        split = longtail.split(
            source.train.labels,
            source.train.keys,
            num_classes=source.num_classes,
            imbalance=data["imbalance"],
            n_max=data["n_max"],
            meta_per_class=data["meta_per_class"],
            validation_per_class=data["validation_per_class"],
            seed=spec["seed_split"],
        )
        train = _take(source.train, split.train)
        class_counts = np.bincount(train.labels, minlength=source.num_classes)
        by_rank = groups.ClassGroups.from_counts(class_counts, fractions=spec["groups"]["fractions"])
        test = _some(source.test, data["test_images"], source.num_classes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Dataset(
        source=source,
        train=train,
        validation=_take(source.train, split.validation),
        test=test,
        class_counts=class_counts,
        groups=by_rank,
        shots=groups.shots(class_counts),
    )


def _take(images, indices):
    return sources.Images(images.images[indices], images.labels[indices], images.keys[indices])


def _some(images, number, num_classes):
    """A fixed, balanced part of the images; all of them if 0 or at least as many are asked for."""
    if not 0 < number < len(images):
        return images
    per_class = max(number // num_classes, 1)
    return _take(images, longtail.balanced(images.labels, images.keys, num_classes=num_classes, per_class=per_class))


class Program:
    """One network's training as compiled functions; the seed is an argument, so all seeds share one compilation.

    Attributes:
      total_steps, steps_per_epoch: of the whole run.
      objective, schedule: the loss terms and the learning rate, functions of the step.
      init: `seed -> TrainState` on the default device.
      plan: `(seed, epoch) -> Plan`.
      chunk: `(state, data, rows) -> state`, state and data replicated, rows sharded; the state is donated.
    """

    def __init__(self, config, data: Dataset, *, model_name, recipe, method, teacher_fn):
        self.data, self.recipe = data, recipe
        self.parallel = Parallel(config.parallel)
        self.steps_per_epoch = plans.steps_per_epoch(len(data.train), recipe.batch_size)
        every_step = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.total_steps = min(every_step, recipe.max_steps or every_step)
        self.steps_per_call = config.steps_per_call or (1 if jax.default_backend() == "cpu" else self.steps_per_epoch)
        values = {key: value for key, value in method.items() if key not in ("name", "warmup_epochs")}
        warmup = round(method["warmup_epochs"] * self.steps_per_epoch)
        self.objective = objectives.create(
            method["name"], data.class_counts, data.groups, warmup_steps=warmup, **values
        )
        self.schedule = states.step_schedule(
            recipe.lr, total_steps=self.total_steps, milestones=recipe.milestones, decay=recipe.decay
        )
        optimizer = states.sgd(self.schedule, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        axis_name = self.parallel.axis_name
        model = models.create(model_name, data.num_classes, precision=config.precision, axis_name=axis_name)
        local = models.create(model_name, data.num_classes, precision=config.precision)

        num_terms = len(self.objective.terms)
        self.init = jax.jit(lambda seed: states.create(local, optimizer, num_terms, data.image_shape, seed))
        views = data.source.views
        self.plan = jax.jit(
            functools.partial(
                plans.epoch_plan,
                num_examples=len(data.train),
                batch_size=recipe.batch_size,
                num_views=views.num,
            )
        )
        chunk = functools.partial(
            steps.train_chunk,
            steps_per_epoch=self.steps_per_epoch,
            fetch_fn=functools.partial(steps.fetch, views=views, preprocess=data.preprocess, teacher_fn=teacher_fn),
            step_fn=functools.partial(
                steps.train_step,
                model=model,
                objective=self.objective,
                optimizer=optimizer,
                axis_name=axis_name,
            ),
        )
        self.chunk = self.parallel.compile(chunk, batch_axis=1, donate=(0,))
        self._evaluator = Evaluator(local, data, self.parallel, config.eval_batch)
        self.evaluate = self._evaluator.evaluate

    def train_data(self, teacher) -> steps.TrainData:
        """The training set on the devices, with what its `TeacherFn` reads."""
        return self.parallel.replicate(steps.TrainData(self.data.train.images, self.data.train.labels, teacher))


class Evaluator:
    """Evaluation of a model on a set of images, batch by batch, each example counted once."""

    def __init__(self, model, data: Dataset, parallel: Parallel, batch_size: int):
        self._parallel = parallel
        largest = min(batch_size, max(len(data.train), len(data.test)))
        self._batch = -(-largest // parallel.num_devices) * parallel.num_devices
        step = functools.partial(steps.eval_step, model=model, preprocess=data.preprocess, axis_name=parallel.axis_name)
        self._step = parallel.compile(step, batch_axis=0)
        self._on_device = {}

    def evaluate(self, variables, images: sources.Images):
        """`metrics.EvalSums` of a set; `variables` replicated."""
        # Keyed by the object itself: the sets are few and live as long as the data.
        if id(images) not in self._on_device:
            self._on_device[id(images)] = [self._parallel.shard(batch, 0) for batch in self._batches(images)]
        parts = [self._parallel.first(self._step(variables, batch)) for batch in self._on_device[id(images)]]
        return jax.tree.map(lambda *sums: np.sum([np.asarray(s, np.float64) for s in sums], axis=0), *parts)

    def _batches(self, images):
        for start in range(0, len(images), self._batch):
            part = slice(start, start + self._batch)
            pad = self._batch - len(images.labels[part])
            yield steps.EvalBatch(
                np.pad(images.images[part], ((0, pad), (0, 0), (0, 0), (0, 0))),
                np.pad(images.labels[part], (0, pad)),
                np.arange(self._batch) < self._batch - pad,
            )


def needs_teacher(config) -> bool:
    """Whether a term of the method distils."""
    return objectives.create(config.method.name, np.ones(3)).needs_teacher


def student_program(config, teacher_kind: str) -> Program:
    """The student's program.

    Args:
      config: a whole config.
      teacher_kind: where the teacher's logits come from: "none", "table" or "network".
    """
    return _program(_seedless(config), "student", teacher_kind)


def teacher_program(config) -> Program:
    """The teacher's: plain cross-entropy on the same long-tailed data, in the same loop."""
    return _program(_seedless(config), "teacher", "none")


def _seedless(config):
    return json.dumps(_without(_plain(config), ("seed", "seed_teacher")))


@functools.lru_cache(maxsize=3)
def _program(key: str, role: str, teacher_kind: str) -> Program:
    config = ml_collections.ConfigDict(json.loads(key))
    data = dataset(config)
    if role == "teacher":
        method, recipe = {"name": "ce", "warmup_epochs": 0.0}, config.teacher.train
    else:
        method, recipe = config.method.to_dict(), config.train
    teacher_fn = {"none": steps.no_teacher, "table": steps.table_teacher}.get(teacher_kind)
    if teacher_fn is None:
        teacher_fn = steps.network_teacher(teacher_model(config, data))
    try:
        return Program(config, data, model_name=config[role].model, recipe=recipe, method=method, teacher_fn=teacher_fn)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def teacher_model(config, data: Dataset):
    """The teacher as it is used: in evaluation mode, so without a device axis."""
    return models.create(config.teacher.model, data.num_classes, precision=config.precision)


def table_logits(config, data: Dataset):
    """`(teacher's variables, train data, rows) -> logits`, compiled: the teacher on any views, for its table."""
    fetch = functools.partial(
        steps.fetch,
        views=data.source.views,
        preprocess=data.preprocess,
        teacher_fn=steps.network_teacher(teacher_model(config, data)),
    )
    return jax.jit(lambda train_data, rows: fetch(train_data, rows).teacher_logits)


def wants_table(config, data: Dataset) -> bool:
    """Whether this run reads the teacher's table: `teacher.table`, or for "auto" the rule of `teacher_table`."""
    if config.teacher.table != "auto":
        return config.teacher.table == "always"
    program_steps = config.train.epochs * plans.steps_per_epoch(len(data.train), config.train.batch_size)
    forwards = min(program_steps, config.train.max_steps or program_steps) * config.train.batch_size
    epochs = forwards / len(data.train)
    views = data.source.views.num
    size = teacher_table.table_bytes(len(data.train), views, data.num_classes)
    return (
        teacher_table.pays(views, epochs=epochs, runs=config.teacher.table_runs)
        and size <= config.teacher.table_memory * _device_memory()
    )


def _device_memory() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
