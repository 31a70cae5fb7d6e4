"""Restores a trained network from a teacher's folder or a run's work directory."""

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
from ltkd_jax.models import Model
from ltkd_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """Holds a network after its last step.

    Attributes:
      name: what the network is, in words.
      spec: of its run, executed on one device.
      data: the data set that it was trained on.
      model: a Linen module that is not split over devices.
      variables: what `model.apply` takes; host arrays.
    """

    name: str
    spec: RunSpec
    data: datasets.Dataset
    model: Model
    variables: dict

    @functools.cached_property
    def _apply(self):
        def apply(variables, images):
            return self.model.apply(
                variables, self.data.preprocess(images), train=False
            )

        return jax.jit(apply)

    def logits(self, images: Images | Records, label: str) -> Logits:
        """Returns the network's logits on a set of images, in memory.

        Args:
          images: the set.
          label: of the progress bar, which is shown if it takes long.
        """
        # All sets have one batch size, so that the network is compiled once.
        largest_set = max(len(self.data.train), len(self.data.test))
        batch_size = min(self.spec.execution.eval_batch_size, largest_set)
        variables = jax.device_put(self.variables)
        progress_bar = tqdm.tqdm(
            total=len(images), desc=label, unit="image", delay=3, dynamic_ncols=True
        )
        logits = []
        with progress_bar:
            for batch in padded_batches(images, batch_size, np.arange(batch_size)):
                logits.append(np.asarray(self._apply(variables, batch.images)))
                progress_bar.update(int(batch.mask.sum()))
        return from_arrays(
            # The last batch is padded.
            np.concatenate(logits)[: len(images)],
            images.labels,
            source=f"{self.name}, {label}",
        )


def restore(folder, *, data_dir: str = "", subset: str = "") -> Restored:
    """Returns the network of a finished teacher's folder or run's work directory.

    Args:
      folder: with `config.json`, `results.json` and `checkpoints`.
      data_dir: where its data set is.
      subset: the list of its training images, if it was trained on one.

    Raises:
      ConfigError: the folder has something missing, damaged or unfinished, or the data
        are not those of its training.
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", "results.json", "checkpoints"):
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: give the work directory of a finished run, "
                "or a finished teacher's folder such as runs/teachers/HASH"
            )
    recorded = identity.read_json(folder / "config.json")
    results = identity.read_json(folder / "results.json")
    is_student = "config_hash" in results
    try:
        spec = _resolve(recorded, data_dir, subset)
        # Data that are not prepared raise an error here, with the remedy.
        datasets.load(spec.data)
        _check_content(spec.content, recorded["content"])
        if is_student:
            # Where its teacher's outputs came from does not affect the variables.
            training = spec.student_training("none")
        else:
            training = spec.teacher_training()
        trainer = get_trainer(training)
        # Only the structure and the shapes of the state are needed, not its values.
        checkpoint = Checkpoints(folder / "checkpoints").restore(
            jax.eval_shape(trainer.init, 0)
        )
    except (KeyError, TypeError, ValueError) as error:
        modules = identity.custom_modules(recorded.get("content", {}))
        hint = f" (it was trained with --import={modules})" if modules else ""
        raise ConfigError(f"{folder} cannot be restored: {error}{hint}") from error
    if is_student:
        last_step = trainer.total_steps
        name = f"{spec.label} {spec.student_model}"
    else:
        last_step = identity.read_teacher_results(folder)["step"]
        name = f"teacher {spec.teacher.model}"
    remedy = "finish it with the command that started it"
    if checkpoint is None:
        raise ConfigError(f"{folder} has no intact checkpoint: {remedy}")
    step, state, _ = checkpoint
    if step != last_step:
        raise ConfigError(
            f"the last intact checkpoint in {folder} is of step {step}, and training "
            f"ends at step {last_step}: {remedy}"
        )
    return Restored(name, spec, trainer.data, trainer.model, state.variables)


def _resolve(recorded, data_dir, subset):
    """Returns the specification of a recorded config on this machine, on one device.

    The path of an external teacher is removed, since a student is audited without it.
    """
    config = recorded["config"]
    content = recorded["content"]
    data = config["data"] | {"dir": data_dir}
    if content["subset"]:
        if not subset:
            raise ValueError(
                f"its training images are those of the list {content['subset']}: pass "
                "that list with --subset"
            )
        data["subset"] = subset
    teacher = config["teacher"] | {"checkpoint": ""}
    changes = {"data": data, "teacher": teacher, "devices": 1, "platform": ""}
    return resolve(config | changes)


def _check_content(current, recorded):
    """Raises ValueError if the data set or the subset has changed since training."""
    for key in ("data", "subset"):
        if current[key] != recorded[key]:
            raise ValueError(
                f"the content of its {key} was {recorded[key]!r}, and now is "
                f"{current[key]!r}: use the data that it was trained with"
            )
