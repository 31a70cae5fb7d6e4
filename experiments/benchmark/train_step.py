"""The training step on one device, as `experiments.main` compiles it, on noise of CIFAR-100-LT's shape and number.

- images/s, ms a step: the best of the repeats, all cases interleaved; includes fetching a batch, crops and flips.
- GFLOP a step: as the program asks for it, before the compiler's savings; of `bikd` on CPU the mean over k steps, on
  accelerators of a step in which the weight net changes.
- of matmul: the rate of these FLOPs, over that of a large matrix product in the same precision on this device.
- first step: from the config to the first step's end, once with an empty compilation cache and once with a filled one.
- memory: arguments, temporaries and result of the compiled call.
"""

import dataclasses
import functools
import itertools
import tempfile

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments import provenance
from experiments.benchmark import timing
from experiments.config import load
from experiments.config.spec import RunSpec, resolve
from experiments.reporting import writers
from experiments.trainer.dataset import Dataset
from experiments.trainer.trainer import Trainer, teacher_model
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images

METHODS = ("ce", "kd", "dkd", "ltkd", "bikd")
_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a method, the source of its teacher's logits ("none", "table" or "network"), and a precision."""

    method: str
    teacher: str
    precision: str = "float32"


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a case costs; seconds of a step, of the first with an empty cache, and of the first with a filled one."""

    batch_size: int
    seconds: float
    flops: float
    memory: int
    cold: float
    cached: float


def cases(methods, teachers, precisions) -> list[Case]:
    """Returns all combinations; a method without a teacher once for each precision."""
    combinations = []
    for precision, method in itertools.product(precisions, methods):
        sources = teachers if spec_of(Case(method, "none")).needs_teacher else ["none"]
        combinations += [Case(method, source, precision) for source in sources]
    return combinations


def spec_of(case: Case, **models: str) -> RunSpec:
    """Returns the specification of a case; `models` are the names of the teacher and the student."""
    argument = ",".join(
        (case.method, *(f"{role}={name}" for role, name in models.items()))
    )
    config = load.load_config(f"configs/cifar100lt.py:{argument}")
    config.precision = case.precision
    config.devices = 1
    return resolve(config)


def noise(spec: RunSpec) -> Dataset:
    """Returns a data set of noise with as many images of each class as a run draws."""
    counts = longtail.counts(spec.data.n_max or 500, spec.data.imbalance, 100)
    rng = np.random.default_rng(0)

    def images(labels, name):
        pixels = rng.integers(0, 256, (len(labels), *_SHAPE), np.uint8)
        return Images(
            pixels,
            labels.astype(np.int32),
            np.array([f"{name}_{i:05d}" for i in range(len(labels))]),
        )

    train = images(np.repeat(np.arange(100), counts), "train")
    outer = images(np.repeat(np.arange(100), spec.data.outer_per_class), "outer")
    test = images(np.arange(100), "test")
    names = tuple(f"class {c}" for c in range(100))
    views = augment.Views(pad=4, flip=True)
    source = datasets.Source(
        "noise", train, test, 100, names, (0.5,) * 3, (0.25,) * 3, views
    )
    by_rank = groups.ClassGroups.from_counts(counts)
    return Dataset(
        source,
        train,
        outer,
        test.take(np.arange(0)),
        test,
        counts,
        by_rank,
        groups.shots(counts),
    )


def start(case: Case, **models: str) -> timing.Running:
    """Returns a case in the middle of its training."""
    spec = spec_of(case, **models)
    data = noise(spec)
    training = spec.student_training(case.teacher)
    teacher = None
    if case.teacher == "table":
        teacher = np.zeros(
            (len(data.train), data.source.views.num, data.num_classes), np.float32
        )
    elif case.teacher == "network":
        init = jax.jit(
            functools.partial(teacher_model(training, data).init, train=False)
        )
        teacher = init(jax.random.key(0), np.zeros((1, *_SHAPE), np.float32))
    return timing.Running(Trainer(training, data), teacher)


def first_step(case: Case, **models: str) -> tuple[float, float]:
    """Returns the seconds from config to first step's end, with an empty and with a filled compilation cache."""

    def seconds():
        jax.clear_caches()
        return timing.seconds(lambda: start(case, **models))

    previous = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory() as folder:
        try:
            _compile_into(folder)
            return seconds(), seconds()
        finally:
            _compile_into(previous)


def _compile_into(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def measure(
    cases: list[Case], *, repeats: int, steps: int, **models: str
) -> dict[Case, StepCost]:
    """Returns the costs of all cases, whose steps are timed in turns."""
    first = {case: first_step(case, **models) for case in cases}
    running = {case: start(case, **models) for case in cases}
    seconds = timing.best_of_rounds(
        {case: lambda r=r: r.seconds(steps) for case, r in running.items()}, repeats
    )
    return {
        case: StepCost(
            r.trainer.recipe.batch_size,
            seconds[case],
            r.flops(),
            r.memory(),
            *first[case],
        )
        for case, r in running.items()
    }


def table(costs: dict[Case, StepCost], rates: dict[str, float]) -> writers.Table:
    """Returns the rows; `rates` are FLOPs per second of a matrix product, by precision."""
    header = [
        "method",
        "teacher",
        "precision",
        "batch",
        "images/s",
        "ms a step",
        "GFLOP a step",
        "of matmul",
    ]
    header += ["first step, s", "cached, s", "MiB"]
    rows = []
    for case, cost in costs.items():
        share = cost.flops / cost.seconds / rates[case.precision]
        row = [case.method, case.teacher, case.precision, f"{cost.batch_size}"]
        row += [f"{cost.batch_size / cost.seconds:,.0f}", f"{1e3 * cost.seconds:,.2f}"]
        row += [f"{cost.flops / 1e9:.1f}", f"{100 * share:.0f} %"]
        row += [f"{cost.cold:.1f}", f"{cost.cached:.1f}", f"{cost.memory / 2**20:,.0f}"]
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
    """Returns the whole measurement as text."""
    rates = {precision: timing.matmul_rate(precision) for precision in precisions}
    rows = cases(methods, teachers, precisions)
    costs = measure(
        rows, repeats=repeats, steps=steps, teacher=teacher, student=student
    )
    lines = [
        f"{teacher} → {student}, CIFAR-100-LT's number of images",
        writers.as_text(table(costs, rates)),
    ]
    lines += [
        f"a matrix product in {name}: {rate / 1e12:.3f} TFLOP/s"
        for name, rate in rates.items()
    ]
    return "\n".join([*lines, provenance.short()])
