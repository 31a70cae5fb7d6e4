"""Compiles the program's functions for an H100, an A100 or a TPU v5e, without one.

The compilers are those of jax's plugins, and need no device. What they return is read
by `hlo`. Columns:

- kernels, MB, passes, collectives: see `hlo.Counts`; MB are 10⁶ bytes, passes are those
  over arrays of the size of the logits. A loop's body and the branches of a conditional
  have rows of their own, and "total" counts all iterations and the dearest branches.
- temporaries, memory: MiB of the compiled call on each device; memory is arguments,
  results and temporaries, of which donated arguments count once.
- compiled, s: the compilation on this machine.
- estimate, µs: MB over the bandwidth, plus kernels times the launch time. It knows
  neither arithmetic nor the exchange between devices: only a device can tell the time.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from experiments import provenance
from experiments.benchmark import hlo, timing, train_step
from experiments.reporting import writers
from experiments.trainer import teacher as teachers
from experiments.trainer.dataset import Dataset
from experiments.trainer.evaluator import Evaluator
from experiments.trainer.trainer import Trainer, teacher_model
from ltkd_jax import groups, losses
from ltkd_jax.data.records import Images, Records
from ltkd_jax.data.sampling import BatchIndices
from ltkd_jax.training import steps
from ltkd_jax.training.parallel import Parallel

PROGRAMS = ("step", "epoch", "lookahead", "streamed", "evaluation", "table", "losses")
_LOOKAHEAD = 5
# Views in a batch of the table: what the program takes, and a smaller one.
_TABLE_BATCHES = (512, teachers.TABLE_BATCH)


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes a kind of device.

    Attributes:
      platform: jax's name of the compiler's plugin, "cuda" or "tpu".
      bandwidth: of its memory, bytes per second, by its data sheet.
      launch: seconds that a kernel takes beside its bytes, an assumption.
      memory: bytes.
      description: on GPUs, what the compiler must know of the device.
    """

    platform: str
    bandwidth: float
    launch: float
    memory: int
    description: str = ""

    def estimate(self, counts: hlo.Counts) -> float:
        """Returns the estimated seconds of some kernels."""
        return counts.bytes / self.bandwidth + counts.kernels * self.launch


def _gpu(name: str, major: int, cores: int, *, l2: int, shared: int, **rates) -> Target:
    """Returns the target of an NVIDIA GPU.

    Args:
      name: that the driver reports.
      major: of its compute capability.
      cores: streaming multiprocessors.
      l2: bytes of its second cache.
      shared: bytes of shared memory that a block may ask for.
      **rates: the other fields of the target.
    """
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {shared + 1024}
          shared_memory_per_block_optin: {shared}
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          core_count: {cores}
          fpus_per_core: {128 if major >= 9 else 64}
          memory_bandwidth: {int(rates["bandwidth"])}
          device_memory_size: {rates["memory"]}
          l2_cache_size: {l2}
          clock_rate_ghz: {1.755 if major >= 9 else 1.41}
          cuda_compute_capability {{ major: {major} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "{name}"
    """
    return Target("cuda", launch=2e-6, description=description, **rates)


TARGETS = {
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        9,
        132,
        l2=50 * 2**20,
        shared=227 * 2**10,
        bandwidth=3.35e12,
        memory=80 * 2**30,
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-40GB",
        8,
        108,
        l2=40 * 2**20,
        shared=163 * 2**10,
        bandwidth=1.555e12,
        memory=40 * 2**30,
    ),
    # A TPU runs a program as a whole, so that its kernels are not launched.
    "v5e": Target("tpu", bandwidth=0.819e12, launch=0.0, memory=16 * 2**30),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Describes a function to compile.

    Attributes:
      name: of its rows.
      num_devices: that it is split over.
      lower: returns it, lowered.
      full_size: elements of the arrays whose passes are counted; None: of none.
    """

    name: str
    num_devices: int
    lower: Callable[[], Any]
    full_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds what the compiler says of a program.

    Attributes:
      block: its kernels.
      temporaries: bytes.
      memory: bytes of arguments, results and temporaries.
      seconds: that the compilation took.
    """

    block: hlo.Block
    temporaries: int
    memory: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds what is to be compiled; see the command's help.

    Attributes:
      programs: some of `PROGRAMS`.
      methods, teachers, precisions: of the steps, see `train_step.cases`.
      teacher, student: models.
      losses: some of `LOSSES`.
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


def _in_groups(loss, num_groups, **options):
    """Returns a loss of groups of classes as `(student, teacher, labels) -> [B]`."""

    def fn(student, teacher, labels):
        num_classes = student.shape[-1]
        by_rank = groups.ClassGroups.from_counts(
            np.arange(num_classes, 0, -1),
            fractions=np.full(num_groups, 1 / num_groups),
        )
        return loss(student, teacher, by_rank, **options)

    return fn


def _group_terms(student, teacher, by_rank):
    """Returns the sum of the terms of `group_kl`, each of which has a gradient."""
    terms = losses.group_kl(student, teacher, by_rank)
    return sum(jnp.sum(term) for term in jax.tree.leaves(terms))


LOSSES: dict[str, Callable] = {
    "kd": lambda student, teacher, labels: losses.kd(student, teacher),
    "dkd": losses.dkd,
    "ltkd3": _in_groups(losses.ltkd, 3),
    "ltkd10": _in_groups(losses.ltkd, 10),
    "ltkd100": _in_groups(losses.ltkd, 100),
    "group_kl3": _in_groups(_group_terms, 3),
}


def _loss_programs(options: Options, devices) -> Iterator[Program]:
    """Yields the losses' values and gradients, of logits on one device."""
    describe = Parallel("jit", devices[:1]).describe
    # The precision of matmuls does not matter here, only the logits' type does.
    are_bfloat16 = {name == "bfloat16": None for name in options.precisions}
    for name in options.losses:
        loss = LOSSES[name]
        fn = jax.jit(jax.value_and_grad(lambda *args, loss=loss: loss(*args).mean()))
        for size in options.sizes:
            for is_bfloat16 in are_bfloat16:
                dtype = jnp.bfloat16 if is_bfloat16 else jnp.float32
                logits = jax.ShapeDtypeStruct(size, dtype)
                labels = jax.ShapeDtypeStruct(size[:1], jnp.int32)
                arguments = describe((logits, logits, labels))
                yield Program(
                    f"{name} {list(size)} {jnp.dtype(dtype).name}",
                    1,
                    functools.partial(fn.lower, *arguments),
                    full_size=size[0] * size[1],
                )


# Steps and what belongs to a run.


def _on_disk(images: Images | Records) -> Records:
    """Returns images as streamed ones, with the same labels but without files."""
    numbers = np.arange(len(images))
    return Records((), numbers, images.labels, images.keys, images.shape)


def _streamed(data: Dataset) -> Dataset:
    return dataclasses.replace(
        data, train=_on_disk(data.train), outer=_on_disk(data.outer)
    )


class _Run:
    """Holds the functions of a run on described devices.

    Args:
      case: of `train_step`.
      options: for the models.
      devices: described.
      steps_per_call: 0: an epoch.
      lookahead: of learned weights.
      streamed: whether images are inputs of the step.
      update_weight_net: whether a call of one step updates the weight net.
    """

    def __init__(
        self,
        case: train_step.Case,
        options: Options,
        devices,
        *,
        steps_per_call: int = 1,
        lookahead: int = 1,
        streamed: bool = False,
        update_weight_net: bool = False,
    ):
        self._case = case
        self._update_weight_net = update_weight_net
        self.spec = train_step.spec_of(
            case, teacher=options.teacher, student=options.student
        )
        data = train_step.noise(self.spec)
        self.data = _streamed(data) if streamed else data
        training = self.spec.student_training(case.teacher)
        execution = dataclasses.replace(
            training.execution, steps_per_call=steps_per_call
        )
        # A batch is a multiple of the devices.
        batch_size = -(-training.recipe.batch_size // len(devices)) * len(devices)
        recipe = dataclasses.replace(training.recipe, batch_size=batch_size)
        weighting = training.loss_weighting
        if weighting is not None:
            weighting = dataclasses.replace(weighting, lookahead=lookahead)
        training = dataclasses.replace(
            training, execution=execution, recipe=recipe, loss_weighting=weighting
        )
        self.trainer = Trainer(training, self.data, devices)

    def lower_step(self) -> Any:
        """Returns the lowered call of `Trainer.train_steps`."""
        trainer = self.trainer
        step = 0
        if self._update_weight_net and trainer.loss_weighting:
            # The k-th step is the first that updates it.
            step = trainer.loss_weighting.update_every - 1
        return trainer.lower(step, *trainer.argument_shapes(self._teacher()))

    def lower_evaluation(self) -> Any:
        """Returns the lowered evaluation of a batch."""
        state = jax.eval_shape(self.trainer.init, 0)
        trainer = self.trainer
        evaluator = Evaluator(
            trainer.model,
            self.data,
            trainer.parallel,
            trainer.spec.execution.eval_batch_size,
        )
        return evaluator.lower(state.variables)

    def lower_table(self, batch_size: int) -> Any:
        """Returns the lowered logits of the teacher for a batch of the table."""
        describe = self.trainer.parallel.describe
        images: Any = self.data.train
        numbers: Any = jax.ShapeDtypeStruct((batch_size,), np.int32)
        data = steps.TrainData(images.images, images.labels, self._variables())
        logits_fn: Any = teachers.table_logits_fn(self.spec, self.data)
        return logits_fn.lower(describe(data), describe(BatchIndices(numbers, numbers)))

    def _teacher(self):
        """Returns the shapes of what a step reads of the teacher."""
        if self._case.teacher == "none":
            return None
        if self._case.teacher == "table":
            num_views = self.data.source.views.num
            shape = len(self.data.train), num_views, self.data.num_classes
            return jax.ShapeDtypeStruct(shape, np.float32)
        return self._variables()

    def _variables(self):
        model = teacher_model(self.trainer.spec, self.data)
        init = functools.partial(model.init, train=False)
        image = jax.ShapeDtypeStruct((1, *self.data.image_shape), np.float32)
        return jax.eval_shape(init, jax.random.key(0), image)


def _step_kinds(
    programs: list[str], case: train_step.Case
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each kind of step of a case, and the options of its `_Run`."""
    learned = case.method == "bikd"
    if "step" in programs and learned:
        yield "step without update", {}
        yield "step with update", {"update_weight_net": True}
    elif "step" in programs:
        yield "step", {}
    if "epoch" in programs:
        yield "epoch", {"steps_per_call": 0}
    if "lookahead" in programs and learned:
        yield f"step with K = {_LOOKAHEAD}", {"lookahead": _LOOKAHEAD}
    # The table has the views of images in memory.
    if "streamed" in programs and case.teacher != "table":
        yield "streamed step", {"streamed": True}


def _step_programs(options: Options, devices: list) -> Iterator[Program]:
    """Yields the steps of all methods."""
    for case in train_step.cases(options.methods, options.teachers, options.precisions):
        for kind, run_options in _step_kinds(options.programs, case):
            run = functools.partial(_Run, case, options, devices, **run_options)
            yield Program(
                f"{kind}, {case.method}, {case.teacher}, {case.precision}",
                len(devices),
                lambda run=run: run().lower_step(),  # type: ignore[misc]
            )


def _other_programs(options: Options, devices) -> Iterator[Program]:
    """Yields the evaluation and the table's batches."""
    num_devices = len(devices)
    for precision in options.precisions:
        run = functools.partial(
            _Run, train_step.Case("kd", "network", precision), options, devices
        )
        if "evaluation" in options.programs:
            yield Program(
                f"evaluation of the student, {precision}",
                num_devices,
                lambda run=run: run().lower_evaluation(),  # type: ignore[misc]
            )
        # The table is computed on one device.
        if "table" in options.programs and num_devices == 1:
            for size in _TABLE_BATCHES:
                yield Program(
                    f"table, batch {size}, {precision}",
                    num_devices,
                    lambda run=run, size=size: run().lower_table(size),  # type: ignore[misc]
                )


def programs(options: Options, described_devices: Callable) -> Iterator[Program]:
    """Yields the programs to compile.

    Args:
      options: which ones.
      described_devices: `number -> devices`.
    """
    if "losses" in options.programs:
        yield from _loss_programs(options, described_devices(1))
    for number in options.devices:
        devices = described_devices(number)
        yield from _step_programs(options, devices)
        yield from _other_programs(options, devices)


# The compilers.


def missing_package(target: Target) -> str | None:
    """Returns a package that the target's compiler needs and that is not installed."""
    if target.platform == "tpu":
        needed = {"libtpu": "libtpu"}
    else:
        needed = {
            "jax_plugins.xla_cuda12": "jax-cuda12-plugin",
            "jax_plugins.xla_cuda12.xla_cuda_plugin": "jax-cuda12-pjrt",
            "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
        }
    for module, package in needed.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return package
    return None


def start(target: Target) -> None:
    """Sets jax up for a target's compiler, before jax uses a device.

    Raises:
      ValueError: its packages are not installed.
    """
    package = missing_package(target)
    if package:
        raise ValueError(
            f'{package} is not installed: pip install -e ".[train,aot]", best into an '
            "environment of its own"
        )
    # Arrays and small computations of this program stay on the CPU.
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would have no compilation time.
    jax.config.update("jax_enable_compilation_cache", False)
    if target.platform == "tpu":
        # Else libtpu would ask for the cloud's metadata.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")


def described_devices(target: Target, number: int) -> list:
    """Returns devices of a target that the compiler knows and nobody has."""
    if target.platform == "tpu":
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=_TPU_TOPOLOGIES[number]
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="described",
            topology=f"1x1x{number}",
            target_config=target.description,
        )
    return topology.devices


_TPU_TOPOLOGIES = {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"}


def _compiler_options(target: Target) -> dict[str, Any]:
    if target.platform == "tpu":
        return {}
    nvcc = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert nvcc is not None and nvcc.submodule_search_locations
    return {
        # Trying out convolutions needs the device.
        "xla_gpu_autotune_level": 0,
        # With the assembler of nvidia-cuda-nvcc.
        "xla_gpu_cuda_data_dir": nvcc.submodule_search_locations[0],
    }


def compile_program(program: Program, target: Target) -> Cost:
    """Returns the costs of a program, after compiling it."""
    lowered = program.lower()
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=_compiler_options(target))
    seconds = time.perf_counter() - start
    usage = compiled.memory_analysis()
    return Cost(
        block=hlo.read(compiled.as_text(), program.full_size),
        temporaries=usage.temp_size_in_bytes,
        memory=timing.memory_bytes(usage),
        seconds=seconds,
    )


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


def rows(program: Program, cost: Cost, target: Target) -> list[list[str]]:
    """Returns the table's rows of a program."""
    parts = dict(cost.block.parts())
    if len(parts) > 1:
        parts["total"] = cost.block.total()
    table_rows = []
    for part, counts in parts.items():
        is_first = part == "entry"
        name = program.name if is_first else f"· {part}"
        row = [
            name,
            f"{program.num_devices}" if is_first else "",
            f"{counts.kernels:,}",
            f"{counts.bytes / 1e6:,.2f}",
            f"{counts.passes}" if program.full_size else "–",
            f"{counts.collectives}",
            f"{cost.temporaries / 2**20:,.1f}" if is_first else "",
            f"{cost.memory / 2**20:,.1f}" if is_first else "",
            f"{cost.seconds:.1f}" if is_first else "",
            f"{1e6 * target.estimate(counts):,.0f}",
        ]
        table_rows.append(row)
    return table_rows


def report(*, target: str, memory_gib: float | None = None, **options) -> str:
    """Returns what the compiler says as text.

    Args:
      target: one of `TARGETS`.
      memory_gib: of a device; by default the target's.
      **options: of `Options`.
    """
    device = TARGETS[target]
    start(device)
    memory = device.memory if memory_gib is None else memory_gib * 2**30
    table_rows = []
    remarks = []
    for program in programs(
        Options(**options), functools.partial(described_devices, device)
    ):
        cost = compile_program(program, device)
        table_rows += rows(program, cost, device)
        if cost.memory > memory:
            remarks.append(
                f"does not fit into {memory / 2**30:g} GiB: {program.name}, which "
                f"needs {cost.memory / 2**30:.1f} GiB"
            )
    lines = [
        f"compiled for {target}; nothing ran on one",
        writers.as_text(writers.Table(_HEADER, table_rows)),
        *remarks,
        f"estimate: bytes / ({device.bandwidth / 1e12:g} TB/s) + kernels · "
        f"{1e6 * device.launch:g} µs; no arithmetic, no exchange between devices",
        f"{_compiler_version(device)}, {provenance.short()}",
    ]
    return "\n".join(lines)


def _compiler_version(target: Target) -> str:
    name = "libtpu" if target.platform == "tpu" else "jax-cuda12-pjrt"
    return f"{name} {importlib.metadata.version(name)}"
