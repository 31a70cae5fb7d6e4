"""Teachers: trained once for all methods and seeds, kept in a cache, shared between processes."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import tqdm

from experiments import build, train
from ltkd_jax import files, metrics
from ltkd_jax.training import teacher_table
from ltkd_jax.training.checkpoint import Checkpoints

_TABLE_BATCH = 2048


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

    def table(self, stop) -> np.ndarray:
        """Its logits of every view of every training image, `[N, views, C]`, from disk or built now."""
        data = build.dataset(self.config)
        shape = (len(data.train), data.source.views.num, data.num_classes)
        # A teacher from elsewhere may be used with several splits: the table's name says which.
        path = self.folder / f"table-{build.teacher_hash(self.config)}-{'x'.join(map(str, shape))}-float32.npy"
        with files.lock(path.with_suffix(".lock"), wait=True):
            if not path.exists():
                self._build_table(path, data, shape, stop)
        return np.load(path, mmap_mode="r")

    def _build_table(self, path, data, shape, stop):
        logits = build.table_logits(self.config, data)
        train_data = jax.device_put(build.steps.TrainData(data.train.images, data.train.labels, self.variables))
        temporary = path.with_suffix(".tmp")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        with tqdm.tqdm(total=shape[0] * shape[1], desc="teacher's table", unit="view", unit_scale=True) as bar:

            def on_batch(done):
                bar.update(done - bar.n)
                if stop.reason:
                    raise train.Stopped(f"stopped by {stop.reason} while the teacher's table was built")

            try:
                batch_size = min(_TABLE_BATCH, shape[0] * shape[1])
                teacher_table.build(
                    lambda rows: logits(train_data, rows), out, batch_size=batch_size, on_batch=on_batch
                )
                out.flush()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def obtain(config, stop) -> Teacher:
    """The teacher of a config: `teacher.checkpoint` if given, else from the cache, trained now if need be.

    Raises:
      build.ConfigError: a checkpoint that is not there, or of another architecture or class count.
      train.Stopped: while it was trained; the next call goes on from there.
    """
    if config.teacher.checkpoint:
        folder = pathlib.Path(config.teacher.checkpoint)
        if not (folder / "results.json").exists():
            raise build.ConfigError(
                f"config.teacher.checkpoint={str(folder)!r} holds no finished teacher: give a folder "
                "of config.teacher.cache, with results.json and checkpoints/ in it"
            )
        return _load(config, folder)
    folder = pathlib.Path(config.teacher.cache) / build.teacher_hash(config)
    with files.lock(folder.with_suffix(".lock"), wait=True):
        if not folder.exists():
            _train(config, folder, stop)
    return _load(config, folder)


def _train(config, folder, stop):
    """Trains under a temporary name, so that a folder of the final name is always a finished teacher."""
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    program = build.teacher_program(config)
    data = program.data
    state, timing = train.fit(
        program,
        program.train_data(None),
        config.seed_teacher,
        unfinished,
        stop,
        config=config,
        label=f"teacher {config.teacher.model}",
    )
    on_test = program.evaluate(state.variables, data.test)
    on_train = program.evaluate(state.variables, data.train)
    results = {
        "hash": build.teacher_hash(config),
        "model": config.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
        "test": train.summarize(program, on_test),
        "group_mass": {
            "long_tailed": metrics.group_mass(on_train, data.groups),
            "balanced": metrics.group_mass(on_test, data.groups),
        },
        "timing": timing,
    }
    files.write_text(unfinished / "config.json", json.dumps(build.teacher_identity(config), indent=1))
    files.write_text(unfinished / "results.json", json.dumps(results, indent=1))
    os.rename(unfinished, folder)


def _load(config, folder):
    results = json.loads((folder / "results.json").read_text())
    data = build.dataset(config)
    wanted = {
        "model": config.teacher.model,
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
    }
    for key, want in wanted.items():
        if results[key] != want:
            raise build.ConfigError(
                f"the teacher in {folder} has {key}={results[key]!r}, the config wants {want!r}: "
                "change config.teacher.model or config.teacher.checkpoint"
            )
    program = build.teacher_program(config)
    try:
        found = Checkpoints(folder / "checkpoints").restore(jax.eval_shape(program.init, 0))
    except ValueError as error:
        raise build.ConfigError(str(error)) from error
    if found is None:
        raise build.ConfigError(f"{folder} holds no whole checkpoint: remove it, and the teacher is trained again")
    _, state, _ = found
    return Teacher(config, folder, state.variables, results)
