"""The file of a teacher's table: its logits of all views of a set of images.

It is in the teacher's folder, beside its checksum, and shared by all runs that have the
same teacher and the same images. An unfinished table is continued by the next run: its
`.tmp` file has the logits, its `.done` file the number of views that are done.
"""

import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec
from experiments.trainer import dataset as datasets
from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import StoppedError, StopRequest, wait_for_lock
from experiments.trainer.trainer import teacher_model
from ltkd_jax import files
from ltkd_jax.data import sampling
from ltkd_jax.data.records import Images
from ltkd_jax.training import hosts, steps, teacher_table

# Views in a batch when a table is built on an accelerator, and on a CPU, whose caches
# hold the activations of a small batch only.
TABLE_BATCH = 2048
_TABLE_BATCH_ON_CPU = 64
# A killed process loses what it has computed in this time, at most.
_SAVE_SECONDS = 60
_log = logging.getLogger(__name__)


def read_or_build(
    spec: RunSpec,
    variables: dict,
    folder: pathlib.Path,
    images: Images,
    stop: StopRequest,
) -> np.ndarray:
    """Returns a teacher's logits of all views of the images, `[N, V, C]`.

    The first call computes them and writes them to a file; later calls, also of other
    runs, read that file.

    Args:
      spec: of the run.
      variables: of the teacher's network, as arrays on the host.
      folder: of the teacher.
      images: a set of the run's data set.
      stop: checked while the table is built, or another process builds it.

    Raises:
      StoppedError: the table is incomplete; the next call continues it.
    """
    data = datasets.load(spec.data)
    shape = (len(images), data.source.views.num, data.num_classes)
    path = folder / _file_name(spec, data, images, shape)

    def read() -> np.ndarray:
        with wait_for_lock(path.with_suffix(".lock"), stop, "the teacher's table"):
            if not _is_intact(path):
                if path.exists():
                    _log.warning("%s is damaged: building it again", path)
                pixels: Any = images.images
                labels: Any = images.labels
                train_data = jax.device_put(steps.TrainData(pixels, labels, variables))
                logits_fn = functools.partial(table_logits_fn(spec, data), train_data)
                _build(path, shape, logits_fn, stop)
        # Mapped into memory: its pages are read when it is put on the device.
        return np.load(path, mmap_mode="r")

    return hosts.run_on_primary(read)


def _file_name(
    spec: RunSpec, data: Dataset, images: Images, shape: tuple[int, int, int]
) -> str:
    """Returns the file name of the table of these images."""
    # Runs that share the teacher may have different sets of images: the name has a hash
    # of their keys.
    key = {"data": data.source.name, "keys": images.keys.tolist()}
    if spec.content["data"]:
        key["content"] = spec.content["data"]
    sizes = "x".join(map(str, shape))
    return f"table-{identity.hash_tree(key)}-{sizes}-float32.npy"


def _checksum_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".sha256")


def _is_intact(path: pathlib.Path) -> bool:
    checksum_path = _checksum_path(path)
    if not path.exists() or not checksum_path.exists():
        return False
    return checksum_path.read_text() == files.sha256(path)


def _build(
    path: pathlib.Path,
    shape: tuple[int, int, int],
    logits_fn: Callable[[sampling.BatchIndices], jax.Array],
    stop: StopRequest,
) -> None:
    """Computes a table batch by batch, from where it was stopped, and writes it.

    Args:
      path: of the finished table.
      shape: of the table, `[N, V, C]`.
      logits_fn: from the indices of B views to their logits, `[B, C]`.
      stop: checked after each batch.
    """
    temporary = path.with_suffix(".tmp")
    progress_path = path.with_suffix(".done")
    start = _read_progress(progress_path) if temporary.exists() else 0
    table = np.lib.format.open_memmap(
        temporary, mode="r+" if start else "w+", dtype=np.float32, shape=shape
    )
    # Writing to a memory map on a full disk kills the process. Reserving the room
    # raises OSError instead.
    files.reserve(temporary, os.path.getsize(temporary))
    on_cpu = jax.default_backend() == "cpu"
    batch_size = _TABLE_BATCH_ON_CPU if on_cpu else TABLE_BATCH
    total = shape[0] * shape[1]
    with tqdm.tqdm(
        total=total,
        initial=start,
        desc="teacher's table",
        unit="view",
        unit_scale=True,
    ) as bar:
        progress = _Progress(progress_path, table, bar, stop)
        teacher_table.build(
            logits_fn,
            table,
            batch_size=min(batch_size, total),
            start=start,
            on_batch=progress.update,
        )
    progress.save(total)
    # The checksum comes before the final name: a table without one would count as
    # damaged.
    files.write_text(_checksum_path(path), files.sha256(temporary))
    os.replace(temporary, path)
    progress_path.unlink()


def _read_progress(path: pathlib.Path) -> int:
    """Returns the number of views that are done, 0 if the file is absent or damaged."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


class _Progress:
    """Shows and saves how many views of a table are done, and stops when asked to.

    Args:
      path: of the file with the number of views that are done.
      table: the memory map of the logits.
      bar: counts the views.
      stop: checked at each update.
    """

    def __init__(
        self, path: pathlib.Path, table: np.memmap, bar: Any, stop: StopRequest
    ):
        self._path = path
        self._table = table
        self._bar = bar
        self._stop = stop
        self._last_save = time.monotonic()

    def update(self, done: int) -> None:
        """Counts the views that are done, and saves them from time to time.

        Raises:
          StoppedError: `stop` asked for it; the views that are done have been saved.
        """
        self._bar.update(done - self._bar.n)
        reason = self._stop.reason
        if reason or time.monotonic() - self._last_save > _SAVE_SECONDS:
            self.save(done)
        if reason:
            raise StoppedError(
                f"teacher's table: stopped by {reason} at {done} of {self._bar.total}, "
                "and saved"
            )

    def save(self, done: int) -> None:
        """Saves the table and the number of its views that are done."""
        # The logits go first: the progress must not count any that are not there.
        self._table.flush()
        files.write_text(self._path, str(done))
        self._last_save = time.monotonic()


def table_logits_fn(
    spec: RunSpec, data: Dataset
) -> Callable[[steps.TrainData, sampling.BatchIndices], jax.Array]:
    """Returns the jitted function from indices of B views to the teacher's logits.

    It is `(training data with the teacher's variables, indices [B]) -> logits [B, C]`.
    """
    network = teacher_model(spec.teacher_training(), data)
    teacher_fn = steps.network_teacher(network)

    # The data is an argument: as a constant it would be compiled into the function.
    @jax.jit
    def logits_fn(
        train_data: steps.TrainData, indices: sampling.BatchIndices
    ) -> jax.Array:
        # The same function as in the training step, so that the views are the same.
        batch = steps.make_batch(
            train_data,
            indices,
            views=data.source.views,
            preprocess=data.preprocess,
            teacher_fn=teacher_fn,
        )
        assert batch.teacher.logits is not None
        return batch.teacher.logits

    return logits_fn
