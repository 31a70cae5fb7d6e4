"""The training step on one device, as `experiments.main` compiles it, on noise of CIFAR-100-LT's shape and number.

- images/s, ms a step: the best of the repeats, all cases interleaved; fetching a batch, crops and flips included.
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
import time

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments import provenance
from experiments.benchmark import timing
from experiments.jobs import queue_entry
from experiments.reporting import writers
from experiments.trainer import build
from experiments.trainer.dataset import Dataset
from ltkd_jax import groups
from ltkd_jax.data import augment, datasets, longtail
from ltkd_jax.data.records import Images

CONFIG = "configs/cifar100lt.py"
METHODS = ("ce", "kd", "dkd", "ltkd", "bikd")
_SHAPE, _VIEWS = (32, 32, 3), augment.Views(pad=4, flip=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a method, where its teacher's logits come from ("none", "table" or "network"), and a precision."""

    method: str
    teacher: str
    precision: str = "float32"


def cases(methods, teachers, precisions) -> list[Case]:
    """All combinations; a method without a teacher once for each precision."""
    found = []
    for precision, method in itertools.product(precisions, methods):
        known = teachers if build.needs_teacher(config(Case(method, "none"))) else ["none"]
        found += [Case(method, teacher, precision) for teacher in known]
    return found


def config(case: Case, models=()):
    """The config of a case; `models` are pairs of "teacher" or "student" and a name."""
    argument = ",".join((case.method, *(f"{role}={name}" for role, name in models)))
    found = queue_entry.load_config(f"{CONFIG}:{argument}")
    found.precision, found.devices = case.precision, 1
    return found


def noise(of) -> Dataset:
    """A data set of noise, with as many images of each class as a config draws."""
    counts = longtail.counts(of.data.n_max or 500, of.data.imbalance, 100)
    rng = np.random.default_rng(0)

    def images(labels, name):
        pixels = rng.integers(0, 256, (len(labels), *_SHAPE), np.uint8)
        return Images(pixels, labels.astype(np.int32), np.array([f"{name}_{i:05d}" for i in range(len(labels))]))

    train = images(np.repeat(np.arange(100), counts), "train")
    meta = images(np.repeat(np.arange(100), of.data.meta_per_class), "meta")
    test = images(np.arange(100), "test")
    names = tuple(f"class {c}" for c in range(100))
    source = datasets.Source("noise", train, test, 100, names, (0.5,) * 3, (0.25,) * 3, _VIEWS)
    by_rank = groups.ClassGroups.from_counts(counts)
    return Dataset(source, train, meta, test.take(np.arange(0)), test, counts, by_rank, groups.shots(counts))


def start(case: Case, models=()) -> timing.Running:
    """A case in the middle of its training."""
    of = config(case, models)
    data = noise(of)
    program = build.program(of, data, role="student", teacher_kind=case.teacher)
    return timing.Running(program, _teacher(of, data, case.teacher))


def _teacher(of, data, kind):
    if kind == "table":
        return np.zeros((len(data.train), data.source.views.num, data.num_classes), np.float32)
    if kind == "network":
        init = jax.jit(functools.partial(build.teacher_model(of, data).init, train=False))
        return init(jax.random.key(0), np.zeros((1, *_SHAPE), np.float32))
    return None


def first_step(case: Case, models) -> tuple[float, float]:
    """Seconds from the config to the end of the first step, with an empty and with a filled compilation cache."""
    kept = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory() as folder:
        try:
            _compile_into(folder)
            return tuple(_seconds_to_first_step(case, models) for _ in range(2))
        finally:
            _compile_into(kept)


def _compile_into(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def _seconds_to_first_step(case, models):
    jax.clear_caches()
    before = time.perf_counter()
    start(case, models)
    return time.perf_counter() - before


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one case costs; seconds of a step, of the first with an empty cache, and of the first with a filled one."""

    batch_size: int
    seconds: float
    flops: float
    memory: int
    cold: float
    cached: float


def measure(wanted: list[Case], models, *, repeats: int, steps: int) -> dict[Case, Measured]:
    """All cases, interleaved."""
    first = {case: first_step(case, models) for case in wanted}
    running = {case: start(case, models) for case in wanted}
    rounds = [{case: run.seconds(steps) for case, run in running.items()} for _ in range(repeats + 1)]
    return {
        case: Measured(
            run.program.recipe.batch_size,
            min(found[case] for found in rounds[1:]),  # the first round warms up
            run.flops(),
            run.memory(),
            *first[case],
        )
        for case, run in running.items()
    }


def table(measured: dict[Case, Measured], rates: dict[str, float]) -> writers.Table:
    """The rows; `rates` are FLOPs per second of a matrix product, by precision."""
    names = ["method", "teacher", "precision", "batch", "images/s", "ms a step", "GFLOP a step", "of matmul"]
    rows = []
    for case, found in measured.items():
        share = found.flops / found.seconds / rates[case.precision]
        row = [case.method, case.teacher, case.precision, f"{found.batch_size}"]
        row += [f"{found.batch_size / found.seconds:,.0f}", f"{1e3 * found.seconds:,.2f}"]
        row += [f"{found.flops / 1e9:.1f}", f"{100 * share:.0f} %"]
        rows.append(row + [f"{found.cold:.1f}", f"{found.cached:.1f}", f"{found.memory / 2**20:,.0f}"])
    return writers.Table([*names, "first step, s", "cached, s", "MiB"], rows)


def report(*, methods, teachers, precisions, teacher: str, student: str, repeats: int, steps: int) -> str:
    """The whole measurement as text."""
    models = (("teacher", teacher), ("student", student))
    rates = {precision: timing.matmul_rate(precision) for precision in precisions}
    measured = measure(cases(methods, teachers, precisions), models, repeats=repeats, steps=steps)
    lines = [f"{teacher} → {student}, CIFAR-100-LT's number of images", writers.as_text(table(measured, rates))]
    lines += [f"a matrix product in {name}: {rate / 1e12:.3f} TFLOP/s" for name, rate in rates.items()]
    return "\n".join([*lines, provenance.short()])
