"""Measures the training step on one device, as `experiments.main` compiles it.

The data are noise, with the shape and the number of images of CIFAR-100-LT. Columns:

- images/s, ms a step: the best of the repeats, all cases in turns. A step includes
  making a batch, crops and flips.
- GFLOP a step: of the program before the compiler's optimizations. For `bikd` on CPU it
  is the mean over k steps, on accelerators that of a step that updates the weight net.
- of matmul: the rate of these FLOPs, over that of a large matrix product in the same
  precision on this device.
- first step: from the config to the end of the first step, with an empty compilation
  cache and with a filled one.
- memory: arguments, temporaries and result of the compiled call.
"""

import dataclasses
import functools
import itertools
import tempfile
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments import provenance
from experiments.benchmark import timing
from experiments.config import load
from experiments.config.spec import RunSpec, TrainingSpec, resolve
from experiments.reporting import writers
from experiments.trainer.dataset import Dataset
from experiments.trainer.trainer import Trainer, teacher_model
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images

METHODS = ("ce", "kd", "dkd", "ltkd", "bikd")
_IMAGE_SHAPE = (32, 32, 3)
_NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes a row of the table.

    Attributes:
      method: its name.
      teacher: source of the teacher's logits, "none", "table" or "network".
      precision: "float32", "tf32" or "bfloat16".
    """

    method: str
    teacher: str
    precision: str = "float32"


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Holds what a case costs.

    Attributes:
      batch_size: images in a step.
      seconds: of a step.
      flops: of a step.
      memory: bytes of the compiled call.
      first_step: seconds until the end of the first step, with an empty cache.
      cached_first_step: the same with a filled cache.
    """

    batch_size: int
    seconds: float
    flops: float
    memory: int
    first_step: float
    cached_first_step: float


def cases(methods, teachers, precisions) -> list[Case]:
    """Returns all combinations; a method without a teacher has one per precision."""
    combinations = []
    for precision, method in itertools.product(precisions, methods):
        needs_teacher = spec_of(Case(method, "none")).needs_teacher
        sources = teachers if needs_teacher else ["none"]
        combinations += [Case(method, source, precision) for source in sources]
    return combinations


def spec_of(case: Case, **models: str) -> RunSpec:
    """Returns the specification of a case.

    Args:
      case: the row.
      **models: names of the models, `teacher` and `student`.
    """
    arguments = [case.method]
    arguments += [f"{role}={name}" for role, name in models.items()]
    config = load.load_config(f"configs/cifar100lt.py:{','.join(arguments)}")
    config.precision = case.precision
    # The numbers of a step are those of one device.
    config.devices = 1
    return resolve(config)


def noise(spec: RunSpec) -> Dataset:
    """Returns a data set of noise with as many images of each class as a run draws."""
    counts = longtail.counts(spec.data.n_max or 500, spec.data.imbalance, _NUM_CLASSES)
    rng = np.random.default_rng(0)
    classes = np.arange(_NUM_CLASSES)

    def images(labels, name):
        pixels = rng.integers(0, 256, (len(labels), *_IMAGE_SHAPE), np.uint8)
        keys = np.array([f"{name}_{i:05d}" for i in range(len(labels))])
        return Images(pixels, labels.astype(np.int32), keys)

    train = images(np.repeat(classes, counts), "train")
    outer = images(np.repeat(classes, spec.data.outer_per_class), "outer")
    test = images(classes, "test")
    no_validation = test.take(np.arange(0))
    source = datasets.Source(
        "noise",
        train,
        test,
        _NUM_CLASSES,
        tuple(f"class {c}" for c in classes),
        (0.5,) * 3,
        (0.25,) * 3,
        augment.Views(pad=4, flip=True),
    )
    return Dataset(
        source,
        train,
        outer,
        no_validation,
        test,
        counts,
        groups.ClassGroups.from_counts(counts),
        groups.shots(counts),
    )


def start(case: Case, **models: str) -> timing.RunningTraining:
    """Returns the training of a case after its first step; see `spec_of`."""
    spec = spec_of(case, **models)
    data = noise(spec)
    training_spec = spec.student_training(case.teacher)
    # The teacher's values do not change the costs.
    teacher = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), teacher_shapes(training_spec, data)
    )
    return timing.RunningTraining(Trainer(training_spec, data), teacher)


def teacher_shapes(spec: TrainingSpec, data: Dataset) -> Any:
    """Returns the shapes of what a step reads of the teacher, None without one."""
    if spec.teacher_source == "none":
        return None
    if spec.teacher_source == "table":
        shape = len(data.train), data.source.views.num, data.num_classes
        return jax.ShapeDtypeStruct(shape, np.float32)
    return teacher_variable_shapes(spec, data)


def teacher_variable_shapes(spec: TrainingSpec, data: Dataset) -> Any:
    """Returns the shapes of the teacher's variables."""
    init = functools.partial(teacher_model(spec, data).init, train=False)
    image = jax.ShapeDtypeStruct((1, *data.image_shape), np.float32)
    return jax.eval_shape(init, jax.random.key(0), image)


def first_step(case: Case, **models: str) -> tuple[float, float]:
    """Returns the seconds from the config to the end of the first step.

    The first number is with an empty compilation cache, the second with a filled one.
    """

    def seconds():
        # The compiled functions in memory, besides those on disk.
        jax.clear_caches()
        return timing.seconds(lambda: start(case, **models))

    # JAX defines the attribute dynamically.
    previous_folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _set_compilation_cache(folder)
            empty_cache = seconds()
            filled_cache = seconds()
            return empty_cache, filled_cache
        finally:
            _set_compilation_cache(previous_folder)


def _set_compilation_cache(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    # JAX opens the cache once, and ignores a later change of the option without this.
    compilation_cache.reset_cache()


def measure(
    cases: list[Case], *, repeats: int, steps: int, **models: str
) -> dict[Case, StepCost]:
    """Returns the costs of all cases, whose steps are timed in turns."""
    # First, because it clears the compiled functions of all cases.
    first_steps = {case: first_step(case, **models) for case in cases}
    trainings = {case: start(case, **models) for case in cases}
    measures = {}
    for case, training in trainings.items():
        measures[case] = functools.partial(training.seconds, steps)
    seconds = timing.best_of_rounds(measures, repeats)
    costs = {}
    for case, training in trainings.items():
        empty_cache, filled_cache = first_steps[case]
        costs[case] = StepCost(
            batch_size=training.trainer.recipe.batch_size,
            seconds=seconds[case],
            flops=training.flops(),
            memory=training.memory(),
            first_step=empty_cache,
            cached_first_step=filled_cache,
        )
    return costs


def table(costs: dict[Case, StepCost], matmul_rates: dict[str, float]) -> writers.Table:
    """Returns the table of the costs.

    Args:
      costs: by case.
      matmul_rates: by precision, FLOPs per second of a matrix product.
    """
    header = [
        "method",
        "teacher",
        "precision",
        "batch",
        "images/s",
        "ms a step",
        "GFLOP a step",
        "of matmul",
        "first step, s",
        "cached, s",
        "MiB",
    ]
    rows = []
    for case, cost in costs.items():
        rate = cost.flops / cost.seconds
        matmul_share = rate / matmul_rates[case.precision]
        row = [
            case.method,
            case.teacher,
            case.precision,
            f"{cost.batch_size}",
            f"{cost.batch_size / cost.seconds:,.0f}",
            f"{1e3 * cost.seconds:,.2f}",
            f"{cost.flops / 1e9:.1f}",
            f"{100 * matmul_share:.0f} %",
            f"{cost.first_step:.1f}",
            f"{cost.cached_first_step:.1f}",
            f"{cost.memory / 2**20:,.0f}",
        ]
        rows.append(row)
    return writers.Table(header, rows)


def report(
    *,
    methods,
    teachers,
    precisions,
    teacher: str,
    student: str,
    repeats: int,
    steps: int,
) -> str:
    """Returns the measurement as text."""
    matmul_rates = {name: timing.matmul_rate(name) for name in precisions}
    costs = measure(
        cases(methods, teachers, precisions),
        repeats=repeats,
        steps=steps,
        teacher=teacher,
        student=student,
    )
    lines = [
        f"{teacher} → {student}, CIFAR-100-LT's number of images",
        writers.as_text(table(costs, matmul_rates)),
    ]
    for name, rate in matmul_rates.items():
        lines.append(f"a matrix product in {name}: {rate / 1e12:.3f} TFLOP/s")
    return "\n".join([*lines, provenance.short()])
