"""Teachers: trained once, kept in a folder, and shared by all methods and seeds.

Each trained teacher has a folder in `teacher.dir`, named by the hash of what it depends
on. Several processes may need the same teacher: the first one trains it under a lock,
and the others wait.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import external_teacher, loop, summaries
from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.trainer import Trainer, get_trainer, teacher_model
from ltkd_jax import files, inference, metrics
from ltkd_jax.data import sampling
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import convert
from ltkd_jax.training import hosts, steps, teacher_table
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.state import TrainState

# Views in a batch when a table is built on an accelerator, and on a CPU, whose caches
# hold the activations of a small batch only.
TABLE_BATCH = 2048
_TABLE_BATCH_ON_CPU = 64
_SAVE_SECONDS = 60  # between two saves of a table's progress
_log = logging.getLogger(__name__)


def choose_source(spec: RunSpec, data: Dataset) -> str:
    """Returns where a run's step reads the teacher's outputs.

    `teacher.table` decides between the table and the network. With "auto", a table is
    used if it fits into memory and costs fewer forward passes than it saves.

    Args:
      spec: of the run.
      data: its data set.

    Returns:
      See `TrainingSpec.teacher_source`.
    """
    if not spec.needs_teacher:
        return "none"
    if spec.method.needs_features:
        return "features"
    teacher = spec.teacher
    if teacher.table == "never" or not spec.can_use_table:
        return "network"
    # A file of logits has no network.
    if teacher.table == "always" or teacher.kind == "logits":
        return "table"

    steps_per_epoch = sampling.steps_per_epoch(len(data.train), spec.train.batch_size)
    epochs = spec.train.total_steps(steps_per_epoch) / steps_per_epoch
    if spec.loss_weighting is not None:
        # K lookahead steps read each image K times in an epoch.
        epochs *= spec.loss_weighting.lookahead
    num_views = data.source.views.num
    num_images = len(data.train)
    if spec.outer_loss_needs_teacher:
        num_images += len(data.outer)
    size = teacher_table.table_bytes(num_images, num_views, data.num_classes)
    fits = size <= teacher.table_memory * datasets.device_memory()
    worthwhile = teacher_table.is_worthwhile(
        num_views, epochs=epochs, runs=teacher.table_runs
    )
    return "table" if worthwhile and fits else "network"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Holds a trained network that teaches.

    Attributes:
      spec: of the run that uses it.
      folder: with its checkpoint, its results and its tables.
      variables: the argument of `model.apply`, as arrays on the host.
      results: its part of `results.json`.
    """

    spec: RunSpec
    folder: pathlib.Path
    variables: dict
    results: dict

    def table(self, images: Images | Records, stop: StopRequest) -> np.ndarray:
        """Returns the teacher's logits of all views of the images, `[N, V, C]`.

        The first call computes them and writes them to a file in the teacher's folder;
        later calls, also of other runs, read that file.

        Args:
          images: a set of the run's data set, in memory.
          stop: checked while the table is built.

        Raises:
          StoppedError: the table is incomplete; the next call continues it.
        """
        assert isinstance(images, Images)
        data = datasets.load(self.spec.data)
        shape = (len(images), data.source.views.num, data.num_classes)
        path = self.folder / self._table_name(data, images, shape)
        checksum_path = path.with_suffix(".sha256")

        def read() -> np.ndarray:
            lock_path = path.with_suffix(".lock")
            with _wait_for_lock(lock_path, stop, "the teacher's table"):
                if not _is_intact(path, checksum_path):
                    if path.exists():
                        _log.warning("%s is damaged: building it again", path)
                    self._build_table(path, checksum_path, data, images, shape, stop)
            # Mapped into memory: its pages are read when it is put on the device.
            return np.load(path, mmap_mode="r")

        return hosts.run_on_primary(read)

    def _table_name(
        self, data: Dataset, images: Images, shape: tuple[int, int, int]
    ) -> str:
        """Returns the file name of the table of these images."""
        # Runs that share the teacher may have different sets of images: the name has a
        # hash of their keys.
        key = {"data": data.source.name, "keys": images.keys.tolist()}
        if self.spec.content["data"]:
            key["content"] = self.spec.content["data"]
        sizes = "x".join(map(str, shape))
        return f"table-{identity.hash_tree(key)}-{sizes}-float32.npy"

    def _build_table(
        self,
        path: pathlib.Path,
        checksum_path: pathlib.Path,
        data: Dataset,
        images: Images,
        shape: tuple[int, int, int],
        stop: StopRequest,
    ) -> None:
        """Computes the logits of all views batch by batch, and writes them to `path`.

        They are written to a temporary file beside a file with the number of views that
        are done. If the process is stopped, the next call continues from that number; a
        killed process loses at most the last `_SAVE_SECONDS`.
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
        total = shape[0] * shape[1]
        last_save = time.monotonic()

        def save_progress(done: int) -> None:
            # The logits go first: the progress must not count any that are not there.
            table.flush()
            files.write_text(progress_path, str(done))

        with tqdm.tqdm(
            total=total,
            initial=start,
            desc="teacher's table",
            unit="view",
            unit_scale=True,
        ) as bar:

            def on_batch(done: int) -> None:
                nonlocal last_save
                bar.update(done - bar.n)
                if stop.reason or time.monotonic() - last_save > _SAVE_SECONDS:
                    save_progress(done)
                    last_save = time.monotonic()
                if stop.reason:
                    raise StoppedError(
                        f"teacher's table: stopped by {stop.reason} at {done} of "
                        f"{total}, and saved"
                    )

            pixels: Any = images.images
            labels: Any = images.labels
            train_data = jax.device_put(steps.TrainData(pixels, labels, self.variables))
            logits_fn = table_logits_fn(self.spec, data)
            on_cpu = jax.default_backend() == "cpu"
            batch_size = _TABLE_BATCH_ON_CPU if on_cpu else TABLE_BATCH
            teacher_table.build(
                functools.partial(logits_fn, train_data),
                table,
                batch_size=min(batch_size, total),
                start=start,
                on_batch=on_batch,
            )
        save_progress(total)
        # The checksum comes before the final name: a table without one would count as
        # damaged.
        files.write_text(checksum_path, files.sha256(temporary))
        os.replace(temporary, path)
        progress_path.unlink()


def _is_intact(path: pathlib.Path, checksum_path: pathlib.Path) -> bool:
    if not path.exists() or not checksum_path.exists():
        return False
    return checksum_path.read_text() == files.sha256(path)


def _read_progress(path: pathlib.Path) -> int:
    """Returns the number of views that are done, 0 if the file is absent or damaged."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


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


def obtain(
    spec: RunSpec, stop: StopRequest
) -> Teacher | external_teacher.LogitsTeacher:
    """Returns the teacher of a run.

    - If `teacher.checkpoint` is empty, it is the one in `teacher.dir` with the run's
      `teacher_hash`, which is trained if it does not exist yet.
    - If it is a folder of a trained teacher, that one is loaded.
    - If it is a file of variables, these are copied into `teacher.dir` and evaluated,
      once; then they are loaded like a trained teacher. So are the variables of the
      student if it is the work directory of a finished run.
    - If it is a file of logits, there is no network; see `LogitsTeacher`.

    Args:
      spec: of the run.
      stop: checked while the teacher is trained, or another process trains it.

    Raises:
      ConfigError: the checkpoint is absent or damaged, or has another model, data set
        or number of classes.
      StoppedError: the teacher is not finished; the next call resumes its training.
    """
    kind = spec.teacher.kind
    if kind == "logits":
        return _load_logits(spec)
    if kind in ("folder", "run"):
        hosts.run_on_primary(lambda: _check_folder(spec))
    if kind == "folder":
        return _load_teacher(spec, pathlib.Path(spec.teacher.checkpoint))
    folder = pathlib.Path(spec.teacher.dir) / spec.teacher_hash
    with contextlib.ExitStack() as locks:

        def claim() -> bool:
            try:
                files.make_folder(folder.parent, "give another config.teacher.dir")
            except OSError as error:
                raise ConfigError(str(error)) from None
            lock_path = folder.with_suffix(".lock")
            locks.enter_context(_wait_for_lock(lock_path, stop, "the teacher"))
            return folder.exists()

        is_finished = hosts.run_on_primary(claim)
        if not is_finished and kind in ("variables", "run"):
            _import_variables(spec, folder)
        elif not is_finished:
            _train_teacher(spec, folder, stop)
    return _load_teacher(spec, folder)


@contextlib.contextmanager
def _wait_for_lock(
    path: pathlib.Path, stop: StopRequest, description: str
) -> Iterator[None]:
    """Holds a lock, which another run may hold until it has finished a training.

    Raises:
      StoppedError: the run was asked to stop while it was waiting.
    """
    with contextlib.ExitStack() as stack:
        waiting = False
        while True:
            try:
                stack.enter_context(files.lock(path))
                break
            except BlockingIOError:
                if not waiting:
                    print(
                        f"waiting for {description}, which another run is making "
                        f"({path})",
                        file=sys.stderr,
                    )
                    waiting = True
            # Polling, since a blocking lock would not notice the time limit.
            if stop.reason:
                raise StoppedError(
                    f"stopped by {stop.reason} while waiting for {description} of "
                    "another run"
                )
            time.sleep(0.5)
        yield


def _train_teacher(spec: RunSpec, folder: pathlib.Path, stop: StopRequest) -> None:
    """Trains a teacher and puts it into a new folder."""
    trainer = get_trainer(spec.teacher_training())
    options = loop.LoopOptions(
        label=f"teacher {spec.teacher.model}",
        eval_every=spec.eval_every,
        checkpoint_every=spec.checkpoint_every,
    )
    unfinished = _make_unfinished_folder(folder)
    state, timing = loop.fit(
        trainer, trainer.device_data(None), spec.teacher_seed, unfinished, stop, options
    )
    results = _evaluate_teacher(spec, trainer, state, trainer.total_steps, timing)
    _finish_folder(spec, folder, unfinished, results, trainer.classifier(state))


def _check_folder(spec: RunSpec) -> None:
    """Raises ConfigError unless an external teacher fits the data set that it teaches.

    A run is checked every time: its student's variables may have been imported from
    their file before, which does not name the classes.
    """
    is_run = spec.teacher.kind == "run"
    check = external_teacher.check_run if is_run else external_teacher.check_data
    data = datasets.load(spec.data)
    try:
        check(spec.teacher.checkpoint, data, spec.content["data"])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _import_variables(spec: RunSpec, folder: pathlib.Path) -> None:
    """Evaluates the variables of a file and puts them into a new folder."""
    trainer = get_trainer(spec.teacher_training())
    unfinished = _make_unfinished_folder(folder)
    path = pathlib.Path(spec.teacher.checkpoint)
    if spec.teacher.kind == "run":
        path = path / inference.WEIGHTS_NAME

    def read() -> dict:
        try:
            return external_teacher.read_variables(
                path, spec.teacher.model, trainer.data
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    state = trainer.init(0)._replace(**hosts.run_on_primary(read))
    hosts.run_on_primary(
        lambda: Checkpoints(unfinished / "checkpoints").save(0, state, {})
    )
    replicated = trainer.parallel.replicate(state)
    results = _evaluate_teacher(spec, trainer, replicated, step=0, timing=None)
    _finish_folder(spec, folder, unfinished, results, trainer.classifier(replicated))


def _load_logits(spec: RunSpec) -> external_teacher.LogitsTeacher:
    try:
        return external_teacher.load_logits(
            spec.teacher.checkpoint, datasets.load(spec.data)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _make_unfinished_folder(folder: pathlib.Path) -> pathlib.Path:
    """Makes and returns the folder under its temporary name.

    It gets its final name in one step when the teacher is finished, so a folder of that
    name always holds a finished teacher.
    """
    unfinished = folder.with_suffix(".unfinished")
    hosts.run_on_primary(lambda: unfinished.mkdir(parents=True, exist_ok=True))
    return unfinished


def _evaluate_teacher(
    spec: RunSpec, trainer: Trainer, state: TrainState, step: int, timing: dict | None
) -> dict[str, Any]:
    """Returns the content of a teacher's `results.json`.

    Args:
      spec: of the run.
      trainer: of the teacher.
      state: final and replicated.
      step: of the checkpoint.
      timing: of its training, None if it was not trained here.
    """
    data = trainer.data
    test_sums = trainer.evaluate(state.variables, data.test)
    train_images = _evenly_spaced(data.train, spec.data.test_images)
    train_sums = trainer.evaluate(state.variables, train_images)
    return {
        "hash": spec.teacher_hash,
        "model": spec.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
        "step": step,
        "test": summaries.summarize(trainer, test_sums),
        "group_mass": {
            "long_tailed": metrics.group_mass(train_sums, data.groups),
            "balanced": metrics.group_mass(test_sums, data.groups),
        },
        "timing": timing,
    }


def _finish_folder(
    spec: RunSpec,
    folder: pathlib.Path,
    unfinished: pathlib.Path,
    results: dict[str, Any],
    classifier: inference.Classifier,
) -> None:
    """Writes a teacher's model and results, and gives its folder the final name."""

    def finish() -> None:
        classifier.save(unfinished)
        files.write_json(
            unfinished / "config.json", {"config": spec.config, "content": spec.content}
        )
        files.write_json(unfinished / "results.json", results)
        os.rename(unfinished, folder)

    hosts.run_on_primary(finish)


def _evenly_spaced(images: Images | Records, number: int) -> Images | Records:
    """Returns `number` images evenly spaced by key; 0 returns all images."""
    if not 0 < number < len(images):
        return images
    return images.subset(np.arange(number) * len(images) // number)


def _load_teacher(spec: RunSpec, folder: pathlib.Path) -> Teacher:
    template = jax.eval_shape(get_trainer(spec.teacher_training()).init, 0)
    results, variables = hosts.run_on_primary(
        lambda: _read_teacher(spec, folder, template)
    )
    return Teacher(spec, folder, variables, results)


def _read_teacher(
    spec: RunSpec, folder: pathlib.Path, template: TrainState
) -> tuple[dict[str, Any], dict]:
    """Returns the results and the variables of a finished teacher.

    Args:
      spec: of the run, which the teacher must fit.
      folder: of the teacher.
      template: a state of its shapes.
    """
    results = identity.read_teacher_results(folder)
    data = datasets.load(spec.data)
    expected = {
        "model": spec.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
    }
    for key, value in expected.items():
        if results.get(key) != value:
            raise ConfigError(
                f"the teacher in {folder} has {key}={results.get(key)!r}, but the "
                f"config needs {value!r}: change config.teacher.model or "
                "config.teacher.checkpoint"
            )
    try:
        checkpoint = Checkpoints(folder / "checkpoints").restore(template)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # `restore` returns an earlier checkpoint if the last one is damaged. That would be
    # another teacher than the one that the results describe.
    if checkpoint is None or checkpoint[0] != results["step"]:
        raise ConfigError(
            f"the teacher's last checkpoint in {folder} is damaged: remove the folder; "
            "if it is in config.teacher.dir, the teacher is then trained again"
        )
    _, state, _ = checkpoint
    try:
        convert.check_finite(state.variables, folder)
    except ValueError as error:
        raise ConfigError(
            f"the teacher of config.teacher cannot be used: {error}, and remove this "
            "folder"
        ) from None
    return results, state.variables
