"""Processes that share a queue, each of which sees one device of this machine.

The process that starts them uses no device itself: one that is taken cannot be given to another process.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import tqdm

from experiments.config.validation import ConfigError
from experiments.runtime import STOPPED
from experiments.trainer.interrupts import StopRequest
from ltkd_jax import signals

_FIRST_PORT = 8476  # of processes on one TPU host, one each
_COUNT_SECONDS = 30.0  # between counts of the runs that are left, for the progress bar
# On some TPUs two devices make a chip, which one process has as a whole.
_COUNT_DEVICES = """
import jax, json
devices = jax.devices()
slots = {tuple(getattr(device, "coords", None) or [device.id]) for device in devices}
print(json.dumps([devices[0].platform, len(slots)]))
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of this machine.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      slots: how many processes can have a device of their own.
    """

    platform: str
    slots: int

    def environment(self, slot: int, environment) -> dict[str, str]:
        """Returns the environment of a process that sees the device of one slot alone."""
        if self.platform == "gpu":
            name = "CUDA_VISIBLE_DEVICES"
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
    """Returns this machine's devices, which a short child process counts.

    Raises:
      ConfigError: jax finds none.
    """
    child = subprocess.run(
        [sys.executable, "-c", _COUNT_DEVICES], capture_output=True, text=True
    )
    if child.returncode:
        raise ConfigError(
            f"jax finds no device: {child.stderr.strip().rpartition(chr(10))[2]}"
        )
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
    """Starts workers on a queue and waits until all have ended; a signal is passed on to them, and they save.

    Args:
      command: of one worker.
      machine: this machine.
      num_workers: at most its slots.
      folder: gets `device-0.log` and so on.
      count_missing: counts the runs to do, for the progress bar.
      stop: gets the signal, if one comes.

    Returns:
      The number of workers that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workers = []

    def pass_on(number, frame):
        stop.signal = number
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with signals.use_handler(pass_on), contextlib.ExitStack() as logs:
        for slot in range(num_workers):
            log = logs.enter_context(open(folder / f"device-{slot}.log", "a"))
            environment = machine.environment(slot, os.environ)
            if stop.signal is None:
                # In a session of its own a worker gets Ctrl-C from here, and once.
                options = dict(
                    env=environment, stdout=log, stderr=log, start_new_session=True
                )
                workers.append(subprocess.Popen(command, **options))
        try:
            _wait(workers, folder, count_missing)
        except BaseException:
            # Left alone they would go on, and keep the devices.
            for worker in workers:
                worker.terminate()
                worker.wait()
            raise
    # A worker that is not yet, or no longer, in a run ends by the signal itself.
    expected = {0, STOPPED, -(stop.signal or 0)}
    return sum(worker.returncode not in expected for worker in workers)


def _wait(workers, folder, count_missing):
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
