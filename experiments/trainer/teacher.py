"""Teachers: trained once, kept in a folder, and shared by all methods and seeds.

Each trained teacher has a folder in `teacher.dir`, named by the hash of what it depends
on. Several processes may need the same teacher: the first one trains it under a lock,
and the others wait.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.config import identity
from experiments.config.spec import RunSpec
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import external_teacher, loop, summaries
from experiments.trainer import table as tables
from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import StopRequest, wait_for_lock
from experiments.trainer.trainer import Trainer, get_trainer
from ltkd_jax import files, inference, metrics
from ltkd_jax.data import sampling
from ltkd_jax.data.records import Images, Records
from ltkd_jax.models import convert
from ltkd_jax.training import hosts, teacher_table
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.state import TrainState


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

        They are read from the teacher's folder, see `table.read_or_build`.

        Args:
          images: a set of the run's data set, in memory.
          stop: checked while the table is built.

        Raises:
          StoppedError: the table is incomplete; the next call continues it.
        """
        assert isinstance(images, Images)
        return tables.read_or_build(
            self.spec, self.variables, self.folder, images, stop
        )


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
            locks.enter_context(wait_for_lock(lock_path, stop, "the teacher"))
            return folder.exists()

        is_finished = hosts.run_on_primary(claim)
        if not is_finished and kind in ("variables", "run"):
            _import_variables(spec, folder)
        elif not is_finished:
            _train_teacher(spec, folder, stop)
    return _load_teacher(spec, folder)


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
