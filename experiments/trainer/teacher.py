"""Teachers: trained once for all methods and seeds, kept in a cache, shared between processes."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

from experiments.config import checks
from experiments.trainer import build, dataset, external_teacher, loop
from ltkd_jax import files, metrics
from ltkd_jax.training import hosts, steps, teacher_table
from ltkd_jax.training.checkpoint import Checkpoints

_TABLE_BATCH = 2048
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained teacher.

    Attributes:
      config: of the run that uses it.
      folder: its checkpoint, results and tables.
      variables: what `model.apply` takes; host arrays.
      results: its part of `results.json`.
    """

    config: object
    folder: pathlib.Path
    variables: dict
    results: dict

    def table(self, images, stop) -> np.ndarray:
        """Its logits of every view of these images, `[N, views, C]`, from disk or built now.

        Args:
          images: `sources.Images` of the config's data set.
          stop: asked meanwhile.

        Raises:
          train.Stopped: while it was built; the next call goes on from there.
        """
        data = dataset.load(self.config)
        shape = (len(images), data.source.views.num, data.num_classes)
        # A teacher may be used with several sets of images: the table's name says which.
        named = {"data": data.source.name, "keys": images.keys.tolist()}
        content = checks.identity(self.config)["data"].get("content")
        of = checks.identity_hash(named | ({"content": content} if content else {}))
        path = self.folder / f"table-{of}-{'x'.join(map(str, shape))}-float32.npy"
        checksum = path.with_suffix(".sha256")

        def read():
            with _locked(path.with_suffix(".lock"), stop, "the teacher's table"):
                if not (path.exists() and checksum.exists() and checksum.read_text() == _sha256(path)):
                    if path.exists():
                        _log.warning("%s is damaged: building it again", path)
                    self._build_table(path, data, images, shape, stop)
                    files.write_text(checksum, _sha256(path))
            return np.load(path, mmap_mode="r")

        return hosts.first(read)

    def _build_table(self, path, data, images, shape, stop):
        """Builds under a temporary name; what is done is noted, so that a stop or a kill loses minutes at most."""
        logits = build.table_logits(self.config, data)
        train_data = jax.device_put(steps.TrainData(images.images, images.labels, self.variables))
        temporary, note = path.with_suffix(".tmp"), path.with_suffix(".done")
        done = int(note.read_text()) if note.exists() and temporary.exists() else 0
        out = np.lib.format.open_memmap(temporary, mode="r+" if done else "w+", dtype=np.float32, shape=shape)
        files.reserve(temporary, os.path.getsize(temporary))  # a full disk, met in the memory map, would kill
        total, noted = shape[0] * shape[1], time.monotonic()

        def keep(done):
            out.flush()
            files.write_text(note, str(done))

        with tqdm.tqdm(total=total, initial=done, desc="teacher's table", unit="view", unit_scale=True) as bar:

            def on_batch(done):
                nonlocal noted
                bar.update(done - bar.n)
                if stop.reason or time.monotonic() - noted > 60:
                    keep(done)
                    noted = time.monotonic()
                if stop.reason:
                    raise loop.Stopped(f"teacher's table: stopped by {stop.reason} at {done} of {total}, and saved")

            batch_size = min(_TABLE_BATCH, total)
            run = lambda rows: logits(train_data, rows)  # noqa: E731
            teacher_table.build(run, out, batch_size=batch_size, start=done, on_batch=on_batch)
        keep(total)
        os.replace(temporary, path)
        note.unlink()


def obtain(config, stop) -> Teacher | external_teacher.LogitsTeacher:
    """The teacher of a config: `teacher.checkpoint` if given, else from the cache, trained now if need be.

    Variables of a file are put into the cache, evaluated once, and then are a teacher like the others.

    Raises:
      checks.ConfigError: a checkpoint that is not there, damaged, or of another architecture or class count.
      train.Stopped: while it was trained; the next call goes on from there.
    """
    given = checks.given_teacher(config)
    if given == "folder":
        return _load(config, pathlib.Path(config.teacher.checkpoint))
    if given == "logits":
        try:
            return external_teacher.load_logits(config.teacher.checkpoint, dataset.load(config))
        except ValueError as error:
            raise checks.ConfigError(f"config.{error}") from error
    folder = pathlib.Path(config.teacher.cache) / checks.teacher_hash(config)
    with contextlib.ExitStack() as held:

        def claim():
            held.enter_context(_locked(folder.with_suffix(".lock"), stop, "the teacher"))
            return folder.exists()

        if not hosts.first(claim):
            _import(config, folder) if given == "variables" else _train(config, folder, stop)
    return _load(config, folder)


@contextlib.contextmanager
def _locked(path, stop, what):
    """Holds a lock that another run may hold for as long as it trains; a stop is heard meanwhile."""
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            try:
                stack.enter_context(files.lock(path))
                break
            except BlockingIOError:
                if not told:
                    print(f"waiting for {what}, which another run is making ({path})", file=sys.stderr)
                    told = True
            if stop.reason:
                raise loop.Stopped(f"stopped by {stop.reason} while waiting for {what} of another run")
            time.sleep(0.5)
        yield


def _train(config, folder, stop):
    """Trains under a temporary name, so that a folder of the final name is always a finished teacher."""
    unfinished = _unfinished(folder)
    program = build.teacher_program(config)
    state, timing = loop.fit(
        program,
        program.train_data(None),
        config.seed_teacher,
        unfinished,
        stop,
        config=config,
        label=f"teacher {config.teacher.model}",
    )
    _finish(config, folder, program, state, program.total_steps, timing)


def _import(config, folder):
    """A teacher of the cache from a file of variables."""
    program, unfinished = build.teacher_program(config), _unfinished(folder)
    path, model, data = config.teacher.checkpoint, config.teacher.model, program.data
    try:
        variables = hosts.first(lambda: external_teacher.read_variables(path, model, data))
    except ValueError as error:
        raise checks.ConfigError(f"config.{error}") from error
    state = program.init(0)._replace(**variables)
    hosts.first(lambda: Checkpoints(unfinished / "checkpoints").save(0, state, {}))
    _finish(config, folder, program, program.parallel.replicate(state), 0, None)


def _unfinished(folder):
    """The folder under its temporary name."""
    unfinished = folder.with_suffix(".unfinished")
    hosts.first(lambda: unfinished.mkdir(parents=True, exist_ok=True))
    return unfinished


def _finish(config, folder, program, state, step, timing):
    """Evaluates a teacher, writes its results, and gives its folder the final name."""
    data, unfinished = program.data, _unfinished(folder)
    on_test = program.evaluate(state.variables, data.test)
    on_train = program.evaluate(state.variables, _evenly(data.train, config.data.test_images))
    results = {
        "hash": checks.teacher_hash(config),
        "model": config.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
        "step": step,
        "test": loop.summarize(program, on_test),
        "group_mass": {
            "long_tailed": metrics.group_mass(on_train, data.groups),
            "balanced": metrics.group_mass(on_test, data.groups),
        },
        "timing": timing,
    }

    def finish():
        files.write_text(unfinished / "config.json", json.dumps(checks.teacher_identity(config), indent=1))
        files.write_text(unfinished / "results.json", json.dumps(results, indent=1))
        os.rename(unfinished, folder)

    hosts.first(finish)


def _evenly(images, number):
    """So many of the images, evenly over their keys; all of them if 0 or at least as many are asked for."""
    if not 0 < number < len(images):
        return images
    return images.subset(np.arange(number) * len(images) // number)


def _load(config, folder):
    like = jax.eval_shape(build.teacher_program(config).init, 0)
    results, variables = hosts.first(lambda: _read(config, folder, like))
    return Teacher(config, folder, variables, results)


def _read(config, folder, like):
    """The results and the variables of a finished teacher, which must be one of this config's."""
    results = checks.teacher_results(folder)
    data = dataset.load(config)
    wanted = {
        "model": config.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
    }
    for key, want in wanted.items():
        if results.get(key) != want:
            raise checks.ConfigError(
                f"the teacher in {folder} has {key}={results.get(key)!r}, the config wants {want!r}: "
                "change config.teacher.model or config.teacher.checkpoint"
            )
    try:
        found = Checkpoints(folder / "checkpoints").restore(like)
    except ValueError as error:
        raise checks.ConfigError(str(error)) from error
    # An earlier checkpoint is another teacher than the one whose results stand there.
    if found is None or found[0] != results["step"]:
        raise checks.ConfigError(
            f"the teacher's last checkpoint in {folder} is damaged: remove the folder; "
            "one of the cache is then trained again"
        )
    return results, found[1].variables


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
