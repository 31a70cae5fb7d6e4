"""A run: from config to `results.json`, in a work directory."""

import contextlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from experiments import provenance
from experiments.config import checks
from experiments.reporting import tables
from experiments.trainer import build, dataset, loop
from experiments.trainer import teacher as teachers
from ltkd_jax import files
from ltkd_jax.data import records
from ltkd_jax.training import hosts


def default_workdir(config) -> str:
    """runs/<dataset>-<imbalance>-<method>-<teacher>-<student>-s<seed>, for a smoke run with -smoke behind it.

    Of a set that was not drawn by imbalance: "all" or the list's name in its place.
    """
    method = tables.method_name(config.to_dict()).replace(" over ", "-")
    subset = config.data.subset
    drawn = f"{config.data.imbalance:g}" if subset == "exponential" else pathlib.Path(subset).stem
    teacher = config.teacher.model
    if checks.given_teacher(config) in ("variables", "logits"):
        teacher = pathlib.Path(config.teacher.checkpoint).stem
    parts = (config.data.name, drawn, method, teacher)
    return f"runs/{'-'.join(parts)}-{config.student.model}-s{config.seed}" + ("-smoke" if config.smoke else "")


def run(
    config, workdir, *, command: str, deadline: float | None = None, on_record: Callable[[dict], None] = lambda _: None
) -> dict:
    """One row of a table: the teacher if the method needs one, the student, and `results.json`.

    Of several processes all call this, and the first one alone writes.

    Args:
      config: a validated config.
      workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/` and `results.json`. Where it holds a finished
        run of the same config, that run's results are returned.
      command: for the results.
      deadline: of `time.monotonic()`, at which to save and stop.
      on_record: called with each record of the student's `metrics.jsonl`, as it is written; in the first process only.
        A run that goes on from a checkpoint repeats the records since.

    Raises:
      checks.ConfigError: bad config or data, or a work directory that is in use (`checks.InUse`) or holds another
        config.
      Stopped, Diverged: as `fit`.
    """
    hosts.each(lambda: (checks.validate(config), checks.validate_devices(config)))
    checks.validate_alike(config)
    workdir = pathlib.Path(workdir)
    stop = loop.StopRequest(deadline)
    with contextlib.ExitStack() as held, stop.listening():
        results = hosts.first(lambda: _claim(held, workdir, config))
        if results is None:
            try:
                results = _distil(config, workdir, stop, command, on_record)
            except records.DamagedRecord as error:
                raise checks.ConfigError(str(error)) from error
            hosts.first(lambda: files.write_text(workdir / "results.json", json.dumps(results, indent=1)))
        return results


def _claim(held, workdir, config):
    """Takes the work directory for this config as long as `held`, and writes `config.json`; finished results if any."""
    if workdir.exists() and not workdir.is_dir():
        raise checks.ConfigError(f"{workdir} is a file: give --workdir a folder")
    try:
        held.enter_context(files.lock(workdir / ".lock"))
    except BlockingIOError:
        raise checks.InUse(f"{workdir} is in use by another run: wait for it, or give --workdir") from None
    path, mine = workdir / "config.json", checks.identity(config)
    # A run that failed before its first step has claimed nothing.
    if any((workdir / name).exists() for name in ("results.json", "checkpoints")):
        remedy = f"give another --workdir, or remove {workdir}"
        if not path.exists():
            raise checks.ConfigError(f"{workdir} holds a run, and no config.json that says of what: {remedy}")
        changed = _differences(checks.read_json(path, remedy), mine)
        if changed:
            raise checks.ConfigError(f"{workdir} holds a run of another config ({'; '.join(changed[:4])}): {remedy}")
    files.write_text(path, json.dumps(mine, indent=1))
    return _finished(workdir / "results.json", checks.identity_hash(mine))


def _finished(path, config_hash):
    """The results of a finished run; None if it is not."""
    if not path.exists():
        return None
    results = checks.read_json(path)
    if results.get("config_hash") != config_hash:
        raise checks.ConfigError(f"{path} is damaged (no result of this config): remove it")
    return results


def _differences(old, new, prefix=""):
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found


def _distil(config, workdir, stop, command, on_record):
    data = hosts.each(lambda: dataset.load(config))
    kind = hosts.first(lambda: build.teacher_kind(config, data))
    # First: what it refuses, it refuses before a teacher is trained.
    program = hosts.each(lambda: build.student_program(config, kind))
    teacher = None if kind == "none" else teachers.obtain(config, stop)
    read = {
        "none": lambda images: None,
        "table": lambda images: teacher.table(*((images, stop) if teacher.variables else (images,))),
    }.get(kind, lambda images: teacher.variables)
    train_data = program.train_data(
        read(data.train), read(data.meta) if build.outer_needs_teacher(config.weighting) else None
    )
    state, timing = loop.fit(
        program,
        train_data,
        config.seed,
        workdir,
        stop,
        config=config,
        label=f"{tables.method_name(config.to_dict())} s{config.seed}",
        on_record=on_record,
    )
    learned = loop.learned_weights(program, state, config.weighting.features) if program.weighting else None
    summaries = {
        name: loop.summarize(program, program.evaluate(state.variables, images)) if len(images) else None
        for name, images in (("test", data.test), ("validation", data.validation))
    }
    return {
        "config_hash": checks.config_hash(config),
        "config": checks.identity(config),
        "seeds": {
            "split": config.seed_split,
            "teacher": None if config.teacher.checkpoint else config.seed_teacher,
            "student": config.seed,
        },
        "train_images": len(data.train),
        "class_counts": data.class_counts.tolist(),
        "class_names": list(data.source.class_names),
        "group_assignment": np.asarray(data.groups.assignment).tolist(),
        "epochs": round(program.total_steps / program.steps_per_epoch, 4),
        **summaries,
        **({"meta_images": len(data.meta), "weighting": learned} if program.weighting else {}),
        "teacher": teacher.results if teacher else None,
        "teacher_logits": kind,
        "timing": timing,
        **provenance.describe(config.precision, program.parallel.num_devices),
        "command": command,
    }
