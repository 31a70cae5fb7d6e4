"""Compiles functions for GPUs and TPUs on a machine that has none.

The compilers are parts of jax's plugins. They get a description of a target, whose
devices have no memory and run nothing, but for which a function can be lowered and
compiled.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from experiments.benchmark import hlo, timing

# Seconds that a kernel takes besides moving its bytes: an assumption. A TPU runs a
# program as a whole, so that its kernels are not launched one by one.
_LAUNCH_ON_GPU = 2e-6
_LAUNCH_ON_TPU = 0.0
# The arrangement of a TPU host's chips, by their number.
_TPU_BOUNDS = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes a kind of device.

    Attributes:
      platform: jax's name of the compiler's plugin, "cuda" or "tpu".
      bandwidth: of its memory, bytes per second.
      launch: seconds that a kernel takes besides moving its bytes.
      memory: bytes.
      description: on GPUs, what the compiler must know of the device.
    """

    platform: str
    bandwidth: float
    launch: float
    memory: int
    description: str = ""

    def estimate(self, counts: hlo.Counts) -> float:
        """Returns the estimated seconds: bytes / bandwidth + kernels · launch."""
        return counts.bytes / self.bandwidth + counts.kernels * self.launch


def _gpu(
    name: str,
    compute_capability: int,
    *,
    cores: int,
    units: int,
    clock: float,
    shared_memory: int,
    cache: int,
    bandwidth: int,
    memory: int,
) -> Target:
    """Returns the target of an NVIDIA GPU.

    What XLA fuses depends on all of these numbers.

    Args:
      name: as the driver reports it, like all the others.
      compute_capability: its major number.
      cores: multiprocessors.
      units: of a multiprocessor that compute float32.
      clock: GHz.
      shared_memory: of a multiprocessor, bytes.
      cache: the second level, bytes.
      bandwidth: of the memory, bytes per second.
      memory: bytes.
    """
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {shared_memory}
          shared_memory_per_block_optin: {shared_memory - 1024}
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          core_count: {cores}
          fpus_per_core: {units}
          memory_bandwidth: {bandwidth}
          device_memory_size: {memory}
          l2_cache_size: {cache}
          clock_rate_ghz: {clock}
          cuda_compute_capability {{ major: {compute_capability} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "{name}"
    """
    return Target("cuda", bandwidth, _LAUNCH_ON_GPU, memory, description)


TARGETS = {
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        9,
        cores=132,
        units=128,
        clock=1.98,
        shared_memory=228 * 2**10,
        cache=50 * 2**20,
        bandwidth=3_352_320_000_000,
        memory=84_929_347_584,
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-40GB",
        8,
        cores=108,
        units=64,
        clock=1.41,
        shared_memory=164 * 2**10,
        cache=40 * 2**20,
        bandwidth=1_555_200_000_000,
        memory=42_331_013_120,
    ),
    "v5e": Target("tpu", bandwidth=819e9, launch=_LAUNCH_ON_TPU, memory=16 * 2**30),
}


class OutOfMemoryError(Exception):
    """Reports that a compiler refuses a program that exceeds its target's memory."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds what a compiler says of a program.

    Attributes:
      block: its kernels.
      temporaries: bytes.
      memory: bytes of arguments, results and temporaries, see `timing.memory_bytes`.
      seconds: that the compilation took.
    """

    block: hlo.Block
    temporaries: int
    memory: int
    seconds: float


def missing_package(target: Target) -> str | None:
    """Returns a package that a target's compiler needs and that is not installed."""
    if target.platform == "tpu":
        needed = {"libtpu": "libtpu"}
    else:
        needed = {
            "jax_plugins.xla_cuda12": "jax-cuda12-plugin",
            "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
        }
    for module, package in needed.items():
        try:
            module_spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the parent
            module_spec = None
        if module_spec is None:
            return package
    return None


def check_devices(target: Target, number: int) -> None:
    """Checks that a target has a host with this number of devices.

    Raises:
      ValueError: it has not.
    """
    if target.platform == "tpu" and number not in _TPU_BOUNDS:
        numbers = ", ".join(map(str, _TPU_BOUNDS))
        raise ValueError(f"{number} devices: a host of this TPU has one of {numbers}")


def start(target: Target) -> None:
    """Sets jax up for a target's compiler, before jax uses a device.

    Raises:
      ValueError: a package is not installed.
    """
    package = missing_package(target)
    if package:
        raise ValueError(
            f'{package} is not installed: pip install -e ".[train,aot]", best into an '
            "environment of its own"
        )
    # Small computations of the program itself stay on the CPU.
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would have no compilation time.
    jax.config.update("jax_enable_compilation_cache", False)
    if target.platform == "tpu":
        # Else libtpu would ask the cloud for the machine's description.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        # Without a TPU, several processes may use the compiler at once.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def devices(target: Target, number: int) -> list[jax.Device]:
    """Returns described devices of a target, all of one host."""
    if target.platform == "tpu":
        bounds = _TPU_BOUNDS[number]
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name="v5e:" + "x".join(map(str, bounds)),
            chips_per_host_bounds=bounds,
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="described",
            topology=f"1x1x{number}",
            target_config=target.description,
        )
    return topology.devices


def compile_lowered(lowered: Any, target: Target, full_size: int | None = None) -> Cost:
    """Compiles a function and returns what the compiler says of it.

    Args:
      lowered: of `jax.jit(f).lower`, for devices of the target.
      target: its kind.
      full_size: see `hlo.read`.

    Raises:
      OutOfMemoryError: the compiler finds that it exceeds the target's memory.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=_options(target))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(str(error).splitlines()[0]) from error
    seconds = time.perf_counter() - start
    usage = compiled.memory_analysis()
    return Cost(
        block=hlo.read(compiled.as_text(), full_size),
        temporaries=usage.temp_size_in_bytes,
        memory=timing.memory_bytes(usage),
        seconds=seconds,
    )


def _options(target: Target) -> dict[str, Any]:
    """Returns XLA's options."""
    if target.platform == "tpu":
        return {}
    nvcc = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert nvcc is not None and nvcc.submodule_search_locations
    return {
        # Timing the candidates for a convolution needs the device.
        "xla_gpu_autotune_level": 0,
        # The folder with the assembler.
        "xla_gpu_cuda_data_dir": nvcc.submodule_search_locations[0],
    }


def version(target: Target) -> str:
    """Returns the compiler's package and version."""
    package = "libtpu" if target.platform == "tpu" else "jax-cuda12-pjrt"
    return f"{package} {importlib.metadata.version(package)}"
