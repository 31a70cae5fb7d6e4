"""One run, from its specification to `results.json` in a work directory."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import provenance
from experiments.config import identity, validation
from experiments.config.spec import RunSpec
from experiments.config.trees import flatten, without
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import loop, summaries
from experiments.trainer import teacher as teachers
from experiments.trainer.dataset import Dataset
from experiments.trainer.interrupts import StopRequest
from experiments.trainer.trainer import Trainer, get_trainer
from ltkd_jax import files
from ltkd_jax.data import records, streaming
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training import hosts
from ltkd_jax.training.state import TrainState

# Keys that may differ between the processes of one run.
_HOST_KEYS = ("data.dir", "data.num_workers", "teacher.dir", "teacher.checkpoint")


class InUseError(ConfigError):
    """Reports a work directory that another process is using."""


def run(
    spec: RunSpec,
    workdir: str | pathlib.Path,
    *,
    command: str,
    stop: StopRequest | None = None,
    on_record: Callable[[dict], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains the teacher if the method needs one, then the student.

    If there are several processes, all call this function, and only the primary one
    writes files.

    Args:
      spec: of the run.
      workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, the student by
        itself (`model.json` and `model.msgpack`) and `results.json`.
        If it holds a finished run of the same config, its results are returned.
      command: that repeats the run, for the results.
      stop: checked between steps, and set by signals. By default only signals stop the
        run.
      on_record: called with each record of the student's `metrics.jsonl` when it is
        written, on the primary process only. A run that resumes from a checkpoint
        repeats the records after it.

    Returns:
      The content of `results.json`.

    Raises:
      ConfigError: a bad config or bad data, a work directory that holds another config
        or is in use (`InUseError`), or a stream's worker that was killed.
      StoppedError: see `loop.fit`.
      DivergedError: see `loop.fit`.
    """
    streaming.exit_from_worker()
    hosts.run_on_all(lambda: validation.validate_devices(spec.config))
    _check_same_everywhere(spec)
    workdir = pathlib.Path(files.expand_user(workdir))
    stop = stop or StopRequest()
    with contextlib.ExitStack() as locks, stop.listening():
        results = hosts.run_on_primary(lambda: _claim_workdir(workdir, spec, locks))
        if results is not None:
            return results
        try:
            results = _distil(spec, workdir, stop, command, on_record)
        except (records.DamagedRecordError, streaming.WorkerError) as error:
            raise ConfigError(str(error)) from error
        path = workdir / "results.json"
        hosts.run_on_primary(functools.partial(files.write_json, path, results))
        return results


def _check_same_everywhere(spec: RunSpec) -> None:
    """Raises ConfigError in all processes unless they have the same config and data."""
    own_hash = identity.hash_tree(
        {"identity": spec.identity, "config": without(spec.config, _HOST_KEYS)}
    )
    hashes = hosts.all_gather(own_hash)
    for process, process_hash in enumerate(hashes):
        if process_hash != hashes[0]:
            raise ConfigError(
                f"process {process} of {len(hashes)} has another config, or other "
                "data, than the first: start all processes by the same command, from "
                "the same checkout, over the same data set"
            )


def _claim_workdir(
    workdir: pathlib.Path, spec: RunSpec, locks: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Locks a work directory until `locks` closes, and writes `config.json`.

    Returns:
      The results if the directory holds the finished run, else None.

    Raises:
      ConfigError: the directory is in use, or holds another run.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file: give --workdir a folder")
    try:
        files.make_folder(workdir, "give another --workdir")
    except OSError as error:
        raise ConfigError(str(error)) from None
    try:
        locks.enter_context(files.lock(workdir / ".lock"))
    except BlockingIOError:
        raise InUseError(
            f"{workdir} is in use by another run: wait for it, or give --workdir"
        ) from None
    path = workdir / "config.json"
    # If neither exists, a run failed before its first checkpoint: nothing is lost if
    # another run uses the directory.
    if any((workdir / name).exists() for name in ("results.json", "checkpoints")):
        _check_same_run(
            path, spec, remedy=f"give another --workdir, or remove {workdir}"
        )
    files.write_json(
        path, {"config_hash": spec.hash, "config": spec.config, "content": spec.content}
    )
    return _finished_results(workdir / "results.json", spec)


def _check_same_run(path: pathlib.Path, spec: RunSpec, remedy: str) -> None:
    """Raises ConfigError unless a work directory's `config.json` is of this run."""
    if not path.exists():
        raise ConfigError(
            f"{path.parent} holds a run, but no config.json that says which one: "
            f"{remedy}"
        )
    recorded = identity.read_json(path, remedy)
    if recorded.get("config_hash") == spec.hash:
        return
    try:
        recorded_values = flatten(identity.recorded_identity(recorded))
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is of another version of this program: {remedy}"
        ) from None
    values = flatten(spec.identity)
    differences = []
    for key in sorted(recorded_values.keys() | values.keys()):
        recorded_value = recorded_values.get(key)
        value = values.get(key)
        if recorded_value != value:
            differences.append(f"{key}: {recorded_value!r} recorded, {value!r} now")
    # The recorded hash may be that of another version, with the same values.
    if not differences:
        return
    if len(differences) > 4:
        differences[4:] = [f"and {len(differences) - 4} more"]
    raise ConfigError(
        f"{path.parent} holds a run of another config ({'; '.join(differences)}): "
        f"{remedy}"
    )


def _finished_results(path: pathlib.Path, spec: RunSpec) -> dict[str, Any] | None:
    """Returns the results of a finished run, None if it is not finished."""
    if not path.exists():
        return None
    results = identity.read_json(path)
    if results.get("config_hash") != spec.hash:
        raise ConfigError(f"{path} is damaged (no result of this config): remove it")
    return results


def _distil(
    spec: RunSpec,
    workdir: pathlib.Path,
    stop: StopRequest,
    command: str,
    on_record: Callable[[dict], None],
) -> dict[str, Any]:
    """Gets the teacher, trains the student and evaluates it; returns the results."""
    # Before a teacher is trained, so that an error in the student's config is raised
    # early.
    trainer = _make_trainer(spec)
    data = trainer.data
    teacher_source = trainer.spec.teacher_source
    teacher = None if teacher_source == "none" else teachers.obtain(spec, stop)

    def teacher_data(images: Images | Records) -> Any:
        """Returns what the step reads of the teacher for a set of images."""
        if teacher is None:
            return None
        if teacher_source == "table":
            return teacher.table(images, stop)
        return teacher.variables

    outer_teacher = teacher_data(data.outer) if spec.outer_loss_needs_teacher else None
    device_data = trainer.device_data(teacher_data(data.train), outer_teacher)
    options = loop.LoopOptions(
        label=f"{spec.label} s{spec.seed}",
        eval_every=spec.eval_every,
        checkpoint_every=spec.checkpoint_every,
        on_record=on_record,
    )
    state, timing = loop.fit(trainer, device_data, spec.seed, workdir, stop, options)
    classifier = trainer.classifier(state)
    hosts.run_on_primary(lambda: classifier.save(workdir))
    return {
        **_describe_training(spec, data, trainer),
        **_evaluate(spec, trainer, state),
        "teacher": teacher.results if teacher else None,
        "teacher_logits": teacher_source,
        "timing": timing,
        **provenance.describe(spec.execution.precision, trainer.parallel.num_devices),
        "command": command,
    }


def _make_trainer(spec: RunSpec) -> Trainer:
    """Returns the student's trainer.

    Raises:
      ConfigError: the data do not allow the draw, or do not fit student or teacher.
    """
    data = hosts.run_on_all(lambda: datasets.load(spec.data))
    teacher_source = hosts.run_on_primary(lambda: teachers.choose_source(spec, data))
    if spec.needs_teacher and spec.teacher.kind != "logits":
        hosts.run_on_all(lambda: get_trainer(spec.teacher_training()))
    training = spec.student_training(teacher_source)
    return hosts.run_on_all(lambda: get_trainer(training))


def check(spec: RunSpec, *, devices: bool = True) -> None:
    """Checks a run against its data without training, as `run` does it at its start.

    Args:
      spec: of the run.
      devices: whether it will run on the devices of this process, which are then
        checked, too.

    Raises:
      ConfigError: it cannot run.
    """
    if devices:
        validation.validate_devices(spec.config)
    _make_trainer(spec)


def _describe_training(
    spec: RunSpec, data: Dataset, trainer: Trainer
) -> dict[str, Any]:
    """Returns config, seeds and training set, for `results.json`."""
    return {
        "config_hash": spec.hash,
        "config": spec.config,
        "content": spec.content,
        "seeds": {
            "split": spec.data.split_seed,
            # An external teacher was not trained with this seed.
            "teacher": None if spec.teacher.checkpoint else spec.teacher_seed,
            "student": spec.seed,
        },
        "train_images": len(data.train),
        "class_counts": data.class_counts.tolist(),
        "class_names": list(data.source.class_names),
        "group_assignment": np.asarray(data.groups.assignment).tolist(),
        "epochs": round(trainer.total_steps / trainer.steps_per_epoch, 4),
    }


def _evaluate(spec: RunSpec, trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """Returns a student's accuracies and learned weights, for `results.json`."""
    results = summaries.evaluate_held_out(trainer, state.variables)
    if spec.loss_weighting is not None:
        results["outer_images"] = len(trainer.data.outer)
        results["loss_weighting"] = summaries.learned_weights(trainer, state)
    return results
