"""Teachers: trained once for all methods and seeds, kept in a folder, shared between processes."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import external_teacher, loop
from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import Stopped, StopRequest
from experiments.trainer.trainer import teacher_model
from experiments.trainer.trainer import trainer as make_trainer
from ltkd_jax import files, metrics
from ltkd_jax.data import sampling
from ltkd_jax.training import hosts, steps, teacher_table
from ltkd_jax.training.checkpoint import Checkpoints

_TABLE_BATCH = 2048
_log = logging.getLogger(__name__)


def choose_source(spec: RunSpec, data: Dataset) -> str:
    """Returns where a run's teacher outputs come from, see `TrainingSpec.teacher_source`.

    It is `teacher.table`, or for "auto" the rule of `teacher_table`.
    """
    if not spec.needs_teacher:
        return "none"
    if spec.method.needs_features:
        return "features"
    teacher = spec.teacher
    if teacher.table == "never" or not spec.can_use_table:
        return "network"
    if teacher.table == "always" or teacher.kind == "logits":
        return "table"
    steps_per_epoch = sampling.steps_per_epoch(len(data.train), spec.train.batch_size)
    epochs = spec.train.total_steps(steps_per_epoch) / steps_per_epoch
    if spec.loss_weighting is not None:
        epochs *= spec.loss_weighting.lookahead  # each image is met K times in an epoch
    num_views = data.source.views.num
    num_images = len(data.train) + (
        len(data.outer) if spec.outer_loss_needs_teacher else 0
    )
    size = teacher_table.table_bytes(num_images, num_views, data.num_classes)
    fits = size <= teacher.table_memory * datasets.device_memory()
    worthwhile = teacher_table.is_worthwhile(
        num_views, epochs=epochs, runs=teacher.table_runs
    )
    return "table" if worthwhile and fits else "network"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained teacher.

    Attributes:
      spec: of the run that uses it.
      folder: its checkpoint, results and tables.
      variables: what `model.apply` takes; host arrays.
      results: its part of `results.json`.
    """

    spec: RunSpec
    folder: pathlib.Path
    variables: dict
    results: dict

    def table(self, images, stop: StopRequest) -> np.ndarray:
        """Returns its logits of every view of these images, `[N, views, C]`, from disk or built now.

        Args:
          images: `records.Images` of the run's data set.
          stop: asked meanwhile.

        Raises:
          Stopped: while it was built; the next call resumes there.
        """
        data = datasets.load(self.spec.data)
        shape = (len(images), data.source.views.num, data.num_classes)
        # A teacher may be used with several sets of images: the table's name says which.
        of_images = {"data": data.source.name, "keys": images.keys.tolist()}
        if self.spec.content["data"]:
            of_images["content"] = self.spec.content["data"]
        name = f"table-{identity.hash_tree(of_images)}-{'x'.join(map(str, shape))}-float32.npy"
        path = self.folder / name
        checksum = path.with_suffix(".sha256")

        def read():
            with _locked(path.with_suffix(".lock"), stop, "the teacher's table"):
                intact = (
                    path.exists()
                    and checksum.exists()
                    and checksum.read_text() == files.sha256(path)
                )
                if not intact:
                    if path.exists():
                        _log.warning("%s is damaged: building it again", path)
                    self._build_table(path, checksum, data, images, shape, stop)
            return np.load(path, mmap_mode="r")

        return hosts.run_on_primary(read)

    def _build_table(self, path, checksum, data, images, shape, stop):
        """Builds under a temporary name; progress is noted, so that a stop or a kill loses minutes at most."""
        logits_fn = _table_logits(self.spec, data, images, self.variables)
        temporary = path.with_suffix(".tmp")
        note = path.with_suffix(".done")
        done = _noted_progress(note) if temporary.exists() else 0
        table = np.lib.format.open_memmap(
            temporary, mode="r+" if done else "w+", dtype=np.float32, shape=shape
        )
        files.reserve(
            temporary, os.path.getsize(temporary)
        )  # a full disk, met in the memory map, would kill
        total = shape[0] * shape[1]
        noted = time.monotonic()

        def note_progress(done):
            table.flush()
            files.write_text(note, str(done))

        with tqdm.tqdm(
            total=total,
            initial=done,
            desc="teacher's table",
            unit="view",
            unit_scale=True,
        ) as bar:

            def on_batch(done):
                nonlocal noted
                bar.update(done - bar.n)
                if stop.reason or time.monotonic() - noted > 60:
                    note_progress(done)
                    noted = time.monotonic()
                if stop.reason:
                    raise Stopped(
                        f"teacher's table: stopped by {stop.reason} at {done} of {total}, and saved"
                    )

            batch_size = min(_TABLE_BATCH, total)
            teacher_table.build(
                logits_fn, table, batch_size=batch_size, start=done, on_batch=on_batch
            )
        note_progress(total)
        files.write_text(checksum, files.sha256(temporary))
        os.replace(temporary, path)
        note.unlink()


def _noted_progress(note):
    """Returns how many views are done; 0 without a note or with a damaged one."""
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        return 0


def _table_logits(spec, data, images, variables):
    """Returns `indices -> logits [B, C]` of these images, compiled."""
    teacher_fn = steps.network_teacher(teacher_model(spec.teacher_training(), data))
    train_data = jax.device_put(
        steps.TrainData(images.images, images.labels, variables)
    )

    @jax.jit
    def logits_fn(train_data, indices):
        batch = steps.make_batch(
            train_data,
            indices,
            views=data.source.views,
            preprocess=data.preprocess,
            teacher_fn=teacher_fn,
        )
        return batch.teacher.logits

    return lambda indices: logits_fn(train_data, indices)


def obtain(
    spec: RunSpec, stop: StopRequest
) -> "Teacher | external_teacher.LogitsTeacher":
    """Returns the teacher of a run: `teacher.checkpoint` if given, else from `teacher.dir`, trained now if need be.

    Variables of a file are put into `teacher.dir`, evaluated once, and then are a teacher like the others.

    Raises:
      ConfigError: a checkpoint that is not there, damaged, or of another architecture or class count.
      Stopped: while it was trained; the next call resumes there.
    """
    kind = spec.teacher.kind
    if kind == "folder":
        return _load(spec, pathlib.Path(spec.teacher.checkpoint))
    if kind == "logits":
        return _load_logits(spec)
    folder = pathlib.Path(spec.teacher.dir) / spec.teacher_hash
    with contextlib.ExitStack() as held:

        def claim():
            held.enter_context(
                _locked(folder.with_suffix(".lock"), stop, "the teacher")
            )
            return folder.exists()

        if not hosts.run_on_primary(claim):
            if kind == "variables":
                _import(spec, folder)
            else:
                _train(spec, folder, stop)
    return _load(spec, folder)


@contextlib.contextmanager
def _locked(path, stop, what):
    """Holds a lock that another run may hold for as long as it trains; a stop ends the waiting."""
    with contextlib.ExitStack() as stack:
        waiting = False
        while True:
            try:
                stack.enter_context(files.lock(path))
                break
            except BlockingIOError:
                if not waiting:
                    print(
                        f"waiting for {what}, which another run is making ({path})",
                        file=sys.stderr,
                    )
                    waiting = True
            if stop.reason:
                raise Stopped(
                    f"stopped by {stop.reason} while waiting for {what} of another run"
                )
            time.sleep(0.5)
        yield


def _train(spec, folder, stop):
    """Trains under a temporary name, so that a folder of the final name is always a finished teacher."""
    trainer = make_trainer(spec.teacher_training())
    options = loop.LoopOptions(
        f"teacher {spec.teacher.model}", spec.eval_every, spec.checkpoint_every
    )
    unfinished = _unfinished(folder)
    state, timing = loop.fit(
        trainer, trainer.device_data(None), spec.teacher_seed, unfinished, stop, options
    )
    _finish(spec, folder, trainer, state, trainer.total_steps, timing)


def _import(spec, folder):
    """Puts variables of a file into `teacher.dir`."""
    trainer = make_trainer(spec.teacher_training())
    unfinished = _unfinished(folder)

    def read():
        try:
            return external_teacher.read_variables(
                spec.teacher.checkpoint, spec.teacher.model, trainer.data
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    state = trainer.init(0)._replace(**hosts.run_on_primary(read))
    hosts.run_on_primary(
        lambda: Checkpoints(unfinished / "checkpoints").save(0, state, {})
    )
    _finish(spec, folder, trainer, trainer.parallel.replicate(state), 0, None)


def _load_logits(spec):
    try:
        return external_teacher.load_logits(
            spec.teacher.checkpoint, datasets.load(spec.data)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _unfinished(folder):
    """Returns the folder under its temporary name, and makes it."""
    unfinished = folder.with_suffix(".unfinished")
    hosts.run_on_primary(lambda: unfinished.mkdir(parents=True, exist_ok=True))
    return unfinished


def _finish(spec, folder, trainer, state, step, timing):
    """Evaluates a teacher, writes its results, and gives its folder the final name."""
    data = trainer.data
    unfinished = _unfinished(folder)
    test_sums = trainer.evaluate(state.variables, data.test)
    train_sums = trainer.evaluate(
        state.variables, _evenly_spaced(data.train, spec.data.test_images)
    )
    results = {
        "hash": spec.teacher_hash,
        "model": spec.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
        "step": step,
        "test": loop.summarize(trainer, test_sums),
        "group_mass": {
            "long_tailed": metrics.group_mass(train_sums, data.groups),
            "balanced": metrics.group_mass(test_sums, data.groups),
        },
        "timing": timing,
    }

    def finish():
        files.write_json(
            unfinished / "config.json", {"config": spec.config, "content": spec.content}
        )
        files.write_json(unfinished / "results.json", results)
        os.rename(unfinished, folder)

    hosts.run_on_primary(finish)


def _evenly_spaced(images, number):
    """Returns `number` images evenly spaced by key; all of them if it is 0 or at least as many."""
    if not 0 < number < len(images):
        return images
    return images.subset(np.arange(number) * len(images) // number)


def _load(spec, folder):
    like = jax.eval_shape(make_trainer(spec.teacher_training()).init, 0)
    results, variables = hosts.run_on_primary(lambda: _read(spec, folder, like))
    return Teacher(spec, folder, variables, results)


def _read(spec, folder, like):
    """Returns the results and the variables of a finished teacher, which must fit the run."""
    results = identity.read_teacher_results(folder)
    data = datasets.load(spec.data)
    wanted = {
        "model": spec.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
    }
    for key, value in wanted.items():
        if results.get(key) != value:
            raise ConfigError(
                f"the teacher in {folder} has {key}={results.get(key)!r}, the config wants {value!r}: "
                "change config.teacher.model or config.teacher.checkpoint"
            )
    try:
        restored = Checkpoints(folder / "checkpoints").restore(like)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # An earlier checkpoint is another teacher than the one that the results are of.
    if restored is None or restored[0] != results["step"]:
        raise ConfigError(
            f"the teacher's last checkpoint in {folder} is damaged: remove the folder; "
            "one in config.teacher.dir is then trained again"
        )
    return results, restored[1].variables
