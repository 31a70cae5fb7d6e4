"""Several runs of a queue at a time, each in a process that sees one device; and whether that is faster.

    python -m experiments.jobs.workers experiments/queues/gpu.json    # only measures, and prints what it found as JSON

What asks and starts the others touches no device: one that has been taken cannot be given to another.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import tqdm

from experiments import runtime
from experiments.benchmark import timing
from experiments.config import checks
from experiments.jobs.queue_entry import read_queue, resolve
from experiments.trainer import build, dataset
from ltkd_jax.training import steps

_LOOK = 30.0  # seconds between counts of what is left, which read every config of the queue
_FIRST_PORT = 8476  # of processes on one TPU host, one each


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the devices do with the queue's first student.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      slots: processes that can have a device each; on some TPUs two devices make a chip, which is one slot.
      together: seconds of a step by all devices; None where they do not divide its batch.
      alone: seconds of a step by one device.
    """

    platform: str
    slots: int
    together: float | None = None
    alone: float | None = None

    @property
    def at_once(self) -> int:
        """How many runs at a time get through a queue soonest."""
        if self.slots == 1 or self.alone is None:
            return 1
        return self.slots if self.together is None or self.alone / self.slots < self.together else 1

    def __str__(self):
        together = "cannot share a batch" if self.together is None else f"take {1e3 * self.together:.2f} ms a step"
        return (
            f"{self.slots} devices {together} together, {1e3 * self.alone:.2f} ms one alone: {self.at_once} at a time"
        )


def measure(config, timed: bool = True) -> Measured:
    """Counts the devices, and times the student of a config by cross-entropy alone, most of any method's step."""
    devices = jax.devices()
    slots = len({getattr(device, "coords", None) or device.id for device in devices})
    if slots == 1 or not timed:
        return Measured(devices[0].platform, slots)
    together = _seconds(config, len(devices)) if config.train.batch_size % len(devices) == 0 else None
    return Measured(devices[0].platform, slots, together, _seconds(config, 1))


def _seconds(config, devices):
    config = copy.deepcopy(config)
    config.devices = devices
    plain = dict(method={"name": "ce"}, weighting={"name": "static"}, teacher_fn=steps.no_teacher)
    program = build.Program(config, dataset.load(config), role="student", recipe=config.train, **plain)
    return timing.Running(program).best(steps=10, repeats=2)


def ask(queue: str, data_dir: str, timed: bool) -> Measured:
    """`measure` of a queue's first run, in a process that leaves the devices when it ends.

    Raises:
      checks.ConfigError: what that process said, where it failed.
    """
    command = [sys.executable, "-m", "experiments.jobs.workers", queue, f"--data_dir={data_dir}"]
    command += [] if timed else ["--count"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise checks.ConfigError("\n".join(done.stderr.strip().splitlines()[-3:]).removeprefix("error: "))
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def seeing(slot: int, platform: str, environment) -> dict[str, str]:
    """The environment of a process that sees one device of this machine alone."""
    if platform == "gpu":
        name = "CUDA_VISIBLE_DEVICES"
        visible = [word for word in environment.get(name, "").split(",") if word]
        return {**environment, name: visible[slot] if visible else str(slot)}
    if platform == "tpu":
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


def run(arguments: list[str], measured: Measured, at_once: int, folder: pathlib.Path, missing) -> int:
    """Starts that many of `reproduce`, which share the queue between them, and waits until all have ended.

    Args:
      arguments: of `reproduce`.
      measured: of this machine.
      at_once: processes.
      folder: gets `device-0.log` and so on.
      missing: `() -> number of runs to do`, for the progress bar.

    Returns:
      The number of processes that ended with an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.reproduce", *arguments, "--at_once=1"]
    with contextlib.ExitStack() as stack:
        workers = []
        for slot in range(at_once):
            log = stack.enter_context(open(folder / f"device-{slot}.log", "a"))
            environment = seeing(slot, measured.platform, os.environ)
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        stack.enter_context(_passing_on(workers))
        total = missing()
        with tqdm.tqdm(total=total, desc=f"queue, {at_once} at a time", unit="run", dynamic_ncols=True) as bar:
            bar.set_postfix_str(f"see {folder}/device-*.log")
            looked = time.monotonic()
            while any(worker.poll() is None for worker in workers):
                time.sleep(0.5)
                if time.monotonic() - looked > _LOOK:
                    bar.update(total - missing() - bar.n)
                    looked = time.monotonic()
            bar.update(total - missing() - bar.n)
    return sum(worker.returncode not in (0, 75) for worker in workers)  # 75: stopped, and saved


@contextlib.contextmanager
def _passing_on(workers):
    """SIGTERM and SIGINT go to the workers, which save; meanwhile this process goes on waiting for them."""

    def handle(number, frame):
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.jobs.workers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("queue", help="a queue file")
    parser.add_argument("--data_dir", default="", help="TFDS directory")
    parser.add_argument("--count", action="store_true", help="only count the devices")
    options = parser.parse_args(argv)
    runtime.initialize()
    try:
        first = next(entry for entry in read_queue(options.queue) if not entry.best_of)
        config = resolve(first, data_dir=options.data_dir)
        print(json.dumps(dataclasses.asdict(measure(config, timed=not options.count))))
    except (checks.ConfigError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
