"""Compiles the program's functions for an H100, an A100 or a TPU v5e, without one.

Programs: a call of one step ("step"), of all steps of an epoch, as on accelerators
("epoch"), of a step with K virtual steps ("lookahead"), or of a step whose images are
inputs ("streamed"); a batch of the evaluation and of the teacher's table; the losses
alone, with their gradients; what experiments/queues/core.json calls ("core_table"),
with the sum of its time. The images are noise, as in `train_step`.

Columns:

- kernels, MB, passes, collectives: see `hlo.Counts`. MB are 10⁶ bytes; passes are those
  over arrays of the size of the logits. A loop's body and the branches of a conditional
  have rows of their own, and "total" has all iterations and the dearest branches.
- temporaries, memory: MiB of the compiled call on each device; memory is arguments,
  results and temporaries, of which donated arguments count once.
- compiled, s: the time of the compilation on this machine.
- estimate, µs: MB over the bandwidth, plus kernels times the launch time. It knows
  neither arithmetic nor the exchange between devices.
"""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import provenance
from experiments.benchmark import compilers, train_step
from experiments.benchmark.loss import LOSSES, Loss, check_sizes
from experiments.reporting import writers
from experiments.trainer.dataset import Dataset
from experiments.trainer.evaluator import Evaluator
from experiments.trainer.table import TABLE_BATCH, table_logits_fn
from experiments.trainer.trainer import Trainer
from ltkd_jax.data.records import Images, Records
from ltkd_jax.data.sampling import BatchIndices
from ltkd_jax.training import steps
from ltkd_jax.training.parallel import Parallel

PROGRAMS = (
    "step",
    "epoch",
    "lookahead",
    "streamed",
    "evaluation",
    "table",
    "losses",
    "core_table",
)
_LOOKAHEAD = 5
# Views in a batch of the teacher's table: a small one, and what the program takes.
_TABLE_BATCHES = (512, TABLE_BATCH)
# Methods and seeds of the core table.
_CORE_METHODS = ("ce", "kd", "dkd", "reviewkd", "ltkd", "ltkd_bs")
_CORE_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """Describes a function to compile.

    Attributes:
      name: of its rows.
      num_devices: that it is split over.
      lower: returns it, lowered.
      full_size: elements of the arrays whose passes are counted; None: of none.
      precision: of the core table that it is a part of.
      core_calls: how often that table calls it; 0 if it is a part of none.
    """

    name: str
    num_devices: int
    lower: Callable[[], Any]
    full_size: int | None = None
    precision: str = ""
    core_calls: int = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds what is to be compiled.

    Attributes:
      programs: some of `PROGRAMS`.
      methods, teachers, precisions: of the steps, see `train_step.cases`.
      teacher, student: models.
      losses: some of `loss.LOSSES`.
      sizes: [B, C] of the losses' logits.
      devices: numbers of devices.
    """

    programs: list[str]
    methods: list[str]
    teachers: list[str]
    precisions: list[str]
    teacher: str
    student: str
    losses: list[str]
    sizes: list[tuple[int, int]]
    devices: list[int]


# Losses alone.


def _loss_programs(options: Options, devices: list[jax.Device]) -> Iterator[Program]:
    """Yields the losses' values and gradients, of logits on one device."""
    # The precision of matmuls does not matter here, only the type of the logits does.
    dtypes = dict.fromkeys(
        "bfloat16" if name == "bfloat16" else "float32" for name in options.precisions
    )
    for name, size, dtype in itertools.product(options.losses, options.sizes, dtypes):
        yield Program(
            f"{name} {list(size)} {dtype}",
            1,
            functools.partial(_lower_loss, LOSSES[name], size, dtype, devices),
            full_size=size[0] * size[1],
        )


def _lower_loss(
    loss: Loss, size: tuple[int, int], dtype: str, devices: list[jax.Device]
) -> Any:
    """Returns the lowered mean loss with its gradient by the student's logits."""
    batch_size, num_classes = size
    logits = jax.ShapeDtypeStruct(size, dtype)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = Parallel("jit", devices).describe((logits, logits, labels, temperature))
    return jax.jit(jax.value_and_grad(loss.mean_fn(num_classes))).lower(*arguments)


# Steps, and what else a run compiles.


class _Run:
    """Lowers the functions of a run for described devices.

    Args:
      case: method, source of the teacher's logits and precision.
      options: has the models.
      devices: described.
      steps_per_call: number of steps in a call; 0: an epoch.
      lookahead: K, where weights are learned.
      streamed: whether images are inputs of the step.
      trains_teacher: whether the teacher is trained, in place of the student.
    """

    def __init__(
        self,
        case: train_step.Case,
        options: Options,
        devices: list[jax.Device],
        *,
        steps_per_call: int = 1,
        lookahead: int = 1,
        streamed: bool = False,
        trains_teacher: bool = False,
    ):
        self._spec = spec = _spec(case, options)
        data = train_step.noise(spec)
        self._data = _streamed(data) if streamed else data
        if trains_teacher:
            training = spec.teacher_training()
        else:
            training = spec.student_training(case.teacher)
        # A batch is a multiple of the devices.
        batch_size = -(-training.recipe.batch_size // len(devices)) * len(devices)
        weighting = training.loss_weighting
        if weighting is not None:
            weighting = dataclasses.replace(weighting, lookahead=lookahead)
        training = dataclasses.replace(
            training,
            execution=dataclasses.replace(
                training.execution, steps_per_call=steps_per_call
            ),
            recipe=dataclasses.replace(training.recipe, batch_size=batch_size),
            loss_weighting=weighting,
        )
        self._trainer = Trainer(training, self._data, devices)

    def step(self) -> Any:
        """Returns the lowered call of `Trainer.train_steps`.

        If it makes one step, this does not update the weight net.
        """
        return self._lower_step(0)

    def updating_step(self) -> Any:
        """Returns a lowered step that updates the weight net."""
        weighting = self._trainer.loss_weighting
        assert weighting is not None
        return self._lower_step(weighting.update_every - 1)

    def _lower_step(self, step: int) -> Any:
        teacher = train_step.teacher_shapes(self._trainer.spec, self._data)
        return self._trainer.lower(step, *self._trainer.argument_shapes(teacher))

    def evaluation(self) -> Any:
        """Returns the lowered evaluation of a batch."""
        trainer = self._trainer
        evaluator = Evaluator(
            trainer.model,
            self._data,
            trainer.parallel,
            trainer.spec.execution.eval_batch_size,
        )
        state = jax.eval_shape(trainer.init, 0)
        images: Any = self._data.test
        return evaluator.lower(state.variables, images)

    def table(self, batch_size: int) -> Any:
        """Returns the lowered logits of the teacher for a batch of its table."""
        images: Any = self._data.train
        numbers: Any = jax.ShapeDtypeStruct((batch_size,), np.int32)
        describe = self._trainer.parallel.describe
        variables = train_step.teacher_variable_shapes(self._trainer.spec, self._data)
        data = steps.TrainData(images.images, images.labels, variables)
        logits_fn: Any = table_logits_fn(self._spec, self._data)
        return logits_fn.lower(describe(data), describe(BatchIndices(numbers, numbers)))


def _spec(case: train_step.Case, options: Options) -> Any:
    return train_step.spec_of(case, teacher=options.teacher, student=options.student)


def _streamed(data: Dataset) -> Dataset:
    """Returns a data set whose images are inputs of the step; they have no files."""

    def records(images: Images | Records) -> Records:
        numbers = np.arange(len(images))
        shape: Any = images.shape
        return Records((), numbers, images.labels, images.keys, shape)

    return dataclasses.replace(
        data, train=records(data.train), outer=records(data.outer)
    )


def _step_programs(options: Options, devices: list[jax.Device]) -> Iterator[Program]:
    """Yields the steps of all methods."""
    for case in train_step.cases(options.methods, options.teachers, options.precisions):
        for kind, lower, run_options in _step_kinds(options.programs, case):
            yield Program(
                f"{kind}, {case.method}, {case.teacher}, {case.precision}",
                len(devices),
                _lowering(lower, case, options, devices, **run_options),
            )


def _step_kinds(
    programs: list[str], case: train_step.Case
) -> Iterator[tuple[str, Callable[[_Run], Any], dict[str, Any]]]:
    """Yields name, lowering and options of each kind of step of a case."""
    learned = case.method == "bikd"
    if "step" in programs and learned:
        yield "step without update", _Run.step, {}
        yield "step with update", _Run.updating_step, {}
    elif "step" in programs:
        yield "step", _Run.step, {}
    if "epoch" in programs:
        yield "epoch", _Run.step, {"steps_per_call": 0}
    if "lookahead" in programs and learned:
        yield f"step with K = {_LOOKAHEAD}", _Run.step, {"lookahead": _LOOKAHEAD}
    # A table has the views of images in memory.
    if "streamed" in programs and case.teacher != "table":
        yield "streamed step", _Run.step, {"streamed": True}


def _lowering(
    lower: Callable[[_Run], Any],
    case: train_step.Case,
    options: Options,
    devices: list[jax.Device],
    **run_options: Any,
) -> Callable[[], Any]:
    """Returns a call that makes the run, which takes a moment, and lowers."""
    return lambda: lower(_Run(case, options, devices, **run_options))


def _other_programs(options: Options, devices: list[jax.Device]) -> Iterator[Program]:
    """Yields the evaluation and the batches of the teacher's table."""
    for precision in options.precisions:
        case = train_step.Case("kd", "table", precision)
        if "evaluation" in options.programs:
            yield Program(
                f"evaluation of the student, {precision}",
                len(devices),
                _lowering(_Run.evaluation, case, options, devices),
            )
        # The table is computed on one device.
        if "table" in options.programs and len(devices) == 1:
            for size in _TABLE_BATCHES:
                yield _table_program(size, case, options, devices)


def _table_program(
    batch_size: int,
    case: train_step.Case,
    options: Options,
    devices: list[jax.Device],
    core_calls: int = 0,
) -> Program:
    def lower(run: _Run) -> Any:
        return run.table(batch_size)

    return Program(
        f"teacher's table, batch {batch_size}, {case.precision}",
        len(devices),
        _lowering(lower, case, options, devices),
        precision=case.precision,
        core_calls=core_calls,
    )


def _core_programs(options: Options, devices: list[jax.Device]) -> Iterator[Program]:
    """Yields what takes time in the core table: teacher, teacher's table, students.

    Evaluations are left out, since they take less than a hundredth of it.
    """
    for precision in options.precisions:
        table_case = train_step.Case("kd", "table", precision)
        spec = _spec(table_case, options)
        yield _core_epoch(
            "the teacher",
            train_step.Case("ce", "none", precision),
            options,
            devices,
            core_calls=round(spec.teacher.train.epochs),
            trains_teacher=True,
        )
        data = train_step.noise(spec)
        num_views = len(data.train) * data.source.views.num
        yield _table_program(
            TABLE_BATCH,
            table_case,
            options,
            devices,
            core_calls=-(-num_views // TABLE_BATCH),
        )
        num_epochs = round(spec.student_training("none").recipe.epochs)
        for method in _CORE_METHODS:
            source = {"ce": "none", "reviewkd": "features"}.get(method, "table")
            yield _core_epoch(
                method,
                train_step.Case(method, source, precision),
                options,
                devices,
                core_calls=_CORE_SEEDS * num_epochs,
            )


def _core_epoch(
    name: str,
    case: train_step.Case,
    options: Options,
    devices: list[jax.Device],
    *,
    core_calls: int,
    trains_teacher: bool = False,
) -> Program:
    return Program(
        f"epoch of {name}, {case.precision}",
        len(devices),
        _lowering(
            _Run.step,
            case,
            options,
            devices,
            steps_per_call=0,
            trains_teacher=trains_teacher,
        ),
        precision=case.precision,
        core_calls=core_calls,
    )


def programs(
    options: Options, devices_of: Callable[[int], list[jax.Device]]
) -> Iterator[Program]:
    """Yields the programs to compile.

    Args:
      options: which ones.
      devices_of: returns a number of described devices.
    """
    if "losses" in options.programs:
        yield from _loss_programs(options, devices_of(1))
    for number in options.devices:
        yield from _step_programs(options, devices_of(number))
        yield from _other_programs(options, devices_of(number))
    if "core_table" in options.programs:
        yield from _core_programs(options, devices_of(1))


def _check(options: Options, target: compilers.Target) -> None:
    """Checks the options, before anything is compiled."""
    for number in options.devices:
        compilers.check_devices(target, number)
    if "losses" in options.programs:
        check_sizes(options.losses, options.sizes)


# The table.

_HEADER = [
    "program",
    "devices",
    "kernels",
    "MB",
    "passes",
    "collectives",
    "temporaries",
    "memory",
    "compiled, s",
    "estimate, µs",
]


def rows(
    program: Program, cost: compilers.Cost, target: compilers.Target
) -> list[list[str]]:
    """Returns the table's rows of a program."""
    parts = dict(cost.block.parts())
    if len(parts) > 1:
        parts["total"] = cost.block.total()
    table_rows = []
    for part, counts in parts.items():
        is_entry = part == "entry"
        row = [
            program.name if is_entry else f"· {part}",
            f"{program.num_devices}" if is_entry else "",
            f"{counts.kernels:,}",
            f"{counts.bytes / 1e6:,.2f}",
            f"{counts.passes:.0f}" if program.full_size else "–",
            f"{counts.collectives:,}",
            f"{cost.temporaries / 2**20:,.1f}" if is_entry else "",
            f"{cost.memory / 2**20:,.1f}" if is_entry else "",
            f"{cost.seconds:.1f}" if is_entry else "",
            f"{1e6 * target.estimate(counts):,.0f}",
        ]
        table_rows.append(row)
    return table_rows


def report(*, target: str, memory_gib: int | None, **options: Any) -> str:
    """Returns what the compiler says as text.

    Args:
      target: one of `compilers.TARGETS`.
      memory_gib: of a device; None: the target's.
      **options: of `Options`.

    Raises:
      ValueError: options that do not fit each other, or a package is not installed.
    """
    selected = Options(**options)
    device = compilers.TARGETS[target]
    _check(selected, device)
    compilers.start(device)
    memory = device.memory if memory_gib is None else memory_gib * 2**30
    table_rows = []
    misfits = []
    core_seconds: dict[str, float] = collections.defaultdict(float)
    for program in programs(selected, functools.partial(compilers.devices, device)):
        # Some take minutes.
        print(f"compiling {program.name}", file=sys.stderr)
        try:
            cost = compilers.compile_lowered(program.lower(), device, program.full_size)
        except compilers.OutOfMemoryError as error:
            misfits.append(f"{program.name}: {error}")
            continue
        table_rows += rows(program, cost, device)
        if cost.memory > memory:
            misfits.append(f"{program.name}: needs {cost.memory / 2**30:.2f} GiB")
        if program.core_calls:
            call_seconds = device.estimate(cost.block.total())
            core_seconds[program.precision] += program.core_calls * call_seconds
    if not table_rows and not misfits:
        raise ValueError(
            "nothing to compile: lookahead is of --methods=bikd, streamed of "
            "--teachers=network or --methods=ce, table of --devices=1"
        )
    lines = [
        f"{selected.teacher} → {selected.student}, compiled for {target}; nothing ran",
        writers.as_text(writers.Table(_HEADER, table_rows)),
        f"estimate: bytes / ({device.bandwidth / 1e12:.3g} TB/s) + kernels · "
        f"{1e6 * device.launch:g} µs; no arithmetic, no exchange between devices",
    ]
    for precision, seconds in core_seconds.items():
        lines.append(
            f"core table in {precision}, {len(_CORE_METHODS)} methods × "
            f"{_CORE_SEEDS} seeds, by this estimate: {seconds / 60:.0f} minutes"
        )
    lines += [f"does not fit into {memory / 2**30:.3g} GiB: {text}" for text in misfits]
    lines.append(f"{compilers.version(device)}, {provenance.short()}")
    return "\n".join(lines)
