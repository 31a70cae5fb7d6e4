"""Starts processes that share a queue; each of them sees one device of this machine.

The process that starts them uses no device itself: a device that a process has opened
may not be available to another one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType

import tqdm

from experiments.config.validation import ConfigError
from experiments.runtime import STOPPED
from experiments.trainer.interrupts import StopRequest
from ltkd_jax import signals

# The processes on a TPU host need a port each.
_FIRST_PORT = 8476
# Between two counts of the missing runs, for the progress bar.
_COUNT_SECONDS = 30.0
# On some TPUs a chip has two devices (with the same coordinates), which only one
# process can use.
_COUNT_DEVICES = """
import jax, json
devices = jax.devices()
slots = {tuple(getattr(device, "coords", None) or [device.id]) for device in devices}
print(json.dumps([devices[0].platform, len(slots)]))
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Describes the devices of this machine.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      slots: the number of processes that can have a device of their own.
    """

    platform: str
    slots: int

    def environment(self, slot: int, environment: Mapping[str, str]) -> dict[str, str]:
        """Returns the environment variables of a process that sees only one device.

        Args:
          slot: number of the device.
          environment: the variables of this process.
        """
        if self.platform == "gpu":
            name = "CUDA_VISIBLE_DEVICES"
            # This process may itself be restricted to some devices.
            visible = [word for word in environment.get(name, "").split(",") if word]
            return {**environment, name: visible[slot] if visible else str(slot)}
        if self.platform == "tpu":
            port = str(_FIRST_PORT + slot)
            return {
                **environment,
                "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
                "TPU_PROCESS_BOUNDS": "1,1,1",
                "TPU_VISIBLE_DEVICES": str(slot),
                "TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{port}",
                "TPU_MESH_CONTROLLER_PORT": port,
            }
        return {**environment, "JAX_NUM_CPU_DEVICES": "1"}


def count_devices() -> Machine:
    """Returns this machine's devices, counted by a child process that exits at once.

    Raises:
      ConfigError: jax has no device.
    """
    child = subprocess.run(
        [sys.executable, "-c", _COUNT_DEVICES],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode:
        last_line = child.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"jax finds no device: {last_line}")
    # jax may print warnings before it.
    platform, slots = json.loads(child.stdout.splitlines()[-1])
    return Machine(platform, slots)


def run(
    command: list[str],
    machine: Machine,
    num_workers: int,
    folder: pathlib.Path,
    count_missing: Callable[[], int],
    stop: StopRequest,
) -> int:
    """Starts workers on a queue, and waits until all have ended.

    A signal is passed on to the workers, which save and end.

    Args:
      command: of each worker.
      machine: this machine.
      num_workers: at most its slots.
      folder: for the logs, `device-0.log` and so on.
      count_missing: counts the runs to do, for the progress bar.
      stop: records a signal.

    Returns:
      The number of workers that failed.
    """
    workers: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with signals.use_handler(pass_on), contextlib.ExitStack() as logs:
        for slot in range(num_workers):
            log = logs.enter_context(open(folder / f"device-{slot}.log", "a"))
            # A signal may arrive between two starts.
            if stop.signal is None:
                # The terminal sends Ctrl-C to all processes of a session. In a session
                # of its own, a worker gets it once, by `pass_on`.
                worker = subprocess.Popen(
                    command,
                    env=machine.environment(slot, os.environ),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                workers.append(worker)
        try:
            _wait(workers, folder, count_missing)
        except BaseException:
            # Otherwise they would continue without this process and keep the devices.
            for worker in workers:
                worker.terminate()
                worker.wait()
            raise
    # A worker that is between two runs has no handler, and is ended by the signal.
    expected = {0, STOPPED}
    if stop.signal is not None:
        expected.add(-stop.signal)
    return sum(worker.returncode not in expected for worker in workers)


def _wait(
    workers: list[subprocess.Popen],
    folder: pathlib.Path,
    count_missing: Callable[[], int],
) -> None:
    """Shows progress until all workers have ended."""
    total = count_missing()
    with tqdm.tqdm(
        total=total,
        desc=f"queue, {len(workers)} workers",
        unit="run",
        dynamic_ncols=True,
    ) as bar:
        bar.set_postfix_str(f"see {folder}/device-*.log")
        last_count = time.monotonic()
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.5)
            if time.monotonic() - last_count > _COUNT_SECONDS:
                bar.update(total - count_missing() - bar.n)
                last_count = time.monotonic()
        bar.update(total - count_missing() - bar.n)
