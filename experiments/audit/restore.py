"""Restores a trained network from the folder that its training left: a teacher's, or a run's work directory."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec, resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer.evaluator import padded_batches
from experiments.trainer.trainer import get_trainer
from ltkd_jax.data.logits import Logits, from_arrays
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """A network after its last step.

    Attributes:
      name: what it is, in words.
      spec: of its run, on one device.
      data: its own.
      model: a Linen module without a device axis.
      variables: what `model.apply` takes; host arrays.
    """

    name: str
    spec: RunSpec
    data: datasets.Dataset
    model: object
    variables: dict

    @functools.cached_property
    def _apply(self):
        return jax.jit(
            lambda variables, images: self.model.apply(
                variables, self.data.preprocess(images), train=False
            )
        )

    def logits(self, images: Images | Records, label: str) -> Logits:
        """Returns its logits of a set of images, in memory; with a progress bar of that label where it takes long."""
        largest_set = max(len(self.data.train), len(self.data.test))
        batch_size = min(
            self.spec.execution.eval_batch_size, largest_set
        )  # one shape for all sets
        variables = jax.device_put(self.variables)
        logits = []
        with tqdm.tqdm(
            total=len(images), desc=label, unit="image", delay=3, dynamic_ncols=True
        ) as bar:
            for batch in padded_batches(images, batch_size, np.arange(batch_size)):
                logits.append(np.asarray(self._apply(variables, batch.images)))
                bar.update(int(batch.mask.sum()))
        return from_arrays(
            np.concatenate(logits)[: len(images)],
            images.labels,
            source=f"{self.name}, {label}",
        )


def restore(folder, *, data_dir: str = "", subset: str = "") -> Restored:
    """Returns the network of a finished teacher's folder or of a finished run's work directory.

    Args:
      folder: with `config.json`, `results.json` and `checkpoints`.
      data_dir: where its data set is.
      subset: the list of its training images, where it was trained on one.

    Raises:
      ConfigError: the folder holds no such thing, is damaged or unfinished, or the data are others.
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", "results.json", "checkpoints"):
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: give the work directory of a finished run, or a finished teacher's folder "
                "such as runs/teachers/HASH"
            )
    recorded = identity.read_json(folder / "config.json")
    results = identity.read_json(folder / "results.json")
    is_student = "config_hash" in results
    try:
        spec = _resolve(recorded, data_dir, subset)
        datasets.load(
            spec.data
        )  # data that are not prepared fail here, with the remedy
        _check_content(spec.content, recorded["content"])
        # Where a student's teacher outputs came from is no part of its variables.
        training = (
            spec.student_training("none") if is_student else spec.teacher_training()
        )
        trainer = get_trainer(training)
        restored = Checkpoints(folder / "checkpoints").restore(
            jax.eval_shape(trainer.init, 0)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be restored: {error}") from error
    last_step = (
        trainer.total_steps
        if is_student
        else identity.read_teacher_results(folder)["step"]
    )
    if restored is None or restored[0] != last_step:
        at = f"step {restored[0]}" if restored else "none"
        raise ConfigError(
            f"the last intact checkpoint in {folder} is of {at}, and training ends at step {last_step}: "
            "finish it by the command that began it"
        )
    name = (
        f"{spec.label} {spec.student_model}"
        if is_student
        else f"teacher {spec.teacher.model}"
    )
    return Restored(name, spec, trainer.data, trainer.model, restored[1].variables)


def _resolve(recorded, data_dir, subset):
    """Returns the specification of a recorded config on this machine, without the teacher's file or folder."""
    config = recorded["config"]
    content = recorded["content"]
    data = config["data"] | {"dir": data_dir}
    if content["subset"]:
        if not subset:
            raise ValueError(
                f"its training images are those of the list {content['subset']}: give that by --subset"
            )
        data["subset"] = subset
    teacher = config["teacher"] | {"checkpoint": ""}
    return resolve(
        config | {"data": data, "teacher": teacher, "devices": 1, "platform": ""}
    )


def _check_content(here, there):
    for key in ("data", "subset"):
        if here[key] != there[key]:
            raise ValueError(
                f"the content of its {key} is {there[key]!r}, here it is {here[key]!r}: use the data that it was "
                "trained with"
            )
