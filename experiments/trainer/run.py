"""One run: from its specification to `results.json`, in a work directory."""

import contextlib
import pathlib
from collections.abc import Callable

import numpy as np

from experiments import provenance
from experiments.config import identity, validation
from experiments.config.spec import RunSpec
from experiments.config.trees import flatten, without
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer import loop
from experiments.trainer import teacher as teachers
from experiments.trainer.interrupts import StopRequest
from experiments.trainer.trainer import trainer as make_trainer
from ltkd_jax import files
from ltkd_jax.data import records
from ltkd_jax.training import hosts


class InUseError(ConfigError):
    """A work directory in which another process is at work."""


def run(
    spec: RunSpec,
    workdir: str | pathlib.Path,
    *,
    command: str,
    stop: StopRequest | None = None,
    on_record: Callable[[dict], None] = lambda _: None,
) -> dict:
    """Trains the teacher if the method needs one, then the student, and writes `results.json`.

    Of several processes all call this, and the primary one alone writes.

    Args:
      spec: of the run.
      workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/` and `results.json`. Where it holds a finished
        run of the same config, that run's results are returned.
      command: for the results.
      stop: asked between steps; a signal sets it too. By default only a signal stops the run.
      on_record: called with each record of the student's `metrics.jsonl` as it is written; on the primary process
        only. A run that resumes from a checkpoint repeats the records since.

    Raises:
      ConfigError: bad config or data, or a work directory that is in use (`InUseError`) or holds another config.
      Stopped, DivergedError: as `loop.fit`.
    """
    hosts.run_on_all(lambda: validation.validate_devices(spec.config))
    _check_same_everywhere(spec)
    workdir = pathlib.Path(workdir)
    stop = stop or StopRequest()
    with contextlib.ExitStack() as held, stop.listening():
        results = hosts.run_on_primary(lambda: _claim(held, workdir, spec))
        if results is None:
            try:
                results = _distil(spec, workdir, stop, command, on_record)
            except records.DamagedRecordError as error:
                raise ConfigError(str(error)) from error
            hosts.run_on_primary(
                lambda: files.write_json(workdir / "results.json", results)
            )
        return results


def _check_same_everywhere(spec):
    """Raises ConfigError, in every process, unless all were started with the same config, folders apart."""
    folders = ("data.dir", "data.num_workers", "teacher.dir", "teacher.checkpoint")
    own_hash = identity.hash_tree(
        {"identity": spec.identity, "config": without(spec.config, folders)}
    )
    hashes = hosts.all_gather(own_hash)
    for index, other in enumerate(hashes):
        if other != hashes[0]:
            raise ConfigError(
                f"process {index} of {len(hashes)} has another config, or other data, than the first: start all "
                "processes by the same command, from the same checkout, over the same data set"
            )


def _claim(held, workdir, spec):
    """Locks the work directory as long as `held`, and writes `config.json`; returns the results of a finished run."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file: give --workdir a folder")
    try:
        held.enter_context(files.lock(workdir / ".lock"))
    except BlockingIOError:
        raise InUseError(
            f"{workdir} is in use by another run: wait for it, or give --workdir"
        ) from None
    path = workdir / "config.json"
    # A run that failed before its first step has claimed nothing.
    if any((workdir / name).exists() for name in ("results.json", "checkpoints")):
        _check_same_run(
            path, spec, remedy=f"give another --workdir, or remove {workdir}"
        )
    files.write_json(
        path, {"config_hash": spec.hash, "config": spec.config, "content": spec.content}
    )
    return _finished_results(workdir / "results.json", spec)


def _check_same_run(path, spec, remedy):
    """Raises ConfigError unless the `config.json` of a work directory is of this run."""
    if not path.exists():
        raise ConfigError(
            f"{path.parent} holds a run, but no config.json that says which one: {remedy}"
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
    keys = sorted(recorded_values.keys() | values.keys())
    changed = [key for key in keys if recorded_values.get(key) != values.get(key)]
    if not changed:
        return
    listed = [
        f"{key}: {recorded_values.get(key)!r} there, {values.get(key)!r} here"
        for key in changed[:4]
    ]
    listed += [f"and {len(changed) - 4} more"] if len(changed) > 4 else []
    raise ConfigError(
        f"{path.parent} holds a run of another config ({'; '.join(listed)}): {remedy}"
    )


def _finished_results(path, spec):
    """Returns the results of a finished run; None if it is not finished."""
    if not path.exists():
        return None
    results = identity.read_json(path)
    if results.get("config_hash") != spec.hash:
        raise ConfigError(f"{path} is damaged (no result of this config): remove it")
    return results


def _distil(spec, workdir, stop, command, on_record):
    data = hosts.run_on_all(lambda: datasets.load(spec.data))
    source = hosts.run_on_primary(lambda: teachers.choose_source(spec, data))
    # Before a teacher is trained: parts of the student that do not fit each other fail here.
    trainer = hosts.run_on_all(lambda: make_trainer(spec.student_training(source)))
    teacher = None if source == "none" else teachers.obtain(spec, stop)

    def teacher_data(images):
        """Returns what the step reads of the teacher for a set of images."""
        if source == "none":
            return None
        return teacher.table(images, stop) if source == "table" else teacher.variables

    outer_teacher = teacher_data(data.outer) if spec.outer_loss_needs_teacher else None
    options = loop.LoopOptions(
        label=f"{spec.label} s{spec.seed}",
        eval_every=spec.eval_every,
        checkpoint_every=spec.checkpoint_every,
        on_record=on_record,
    )
    device_data = trainer.device_data(teacher_data(data.train), outer_teacher)
    state, timing = loop.fit(trainer, device_data, spec.seed, workdir, stop, options)

    def evaluate(images):
        return (
            loop.summarize(trainer, trainer.evaluate(state.variables, images))
            if len(images)
            else None
        )

    results = {
        "config_hash": spec.hash,
        "config": spec.config,
        "content": spec.content,
        "seeds": {
            "split": spec.data.split_seed,
            "teacher": None if spec.teacher.checkpoint else spec.teacher_seed,
            "student": spec.seed,
        },
        "train_images": len(data.train),
        "class_counts": data.class_counts.tolist(),
        "class_names": list(data.source.class_names),
        "group_assignment": np.asarray(data.groups.assignment).tolist(),
        "epochs": round(trainer.total_steps / trainer.steps_per_epoch, 4),
        "test": evaluate(data.test),
        "validation": evaluate(data.validation),
    }
    if spec.loss_weighting is not None:
        results["outer_images"] = len(data.outer)
        results["loss_weighting"] = loop.learned_weights(trainer, state)
    return {
        **results,
        "teacher": teacher.results if teacher else None,
        "teacher_logits": source,
        "timing": timing,
        **provenance.describe(spec.execution.precision, trainer.parallel.num_devices),
        "command": command,
    }
