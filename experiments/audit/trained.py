"""Loads a trained network with its data, from a run's or a teacher's folder."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tqdm

from experiments.config import identity
from experiments.config.spec import RunSpec, resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset as datasets
from experiments.trainer.evaluator import padded_batches
from ltkd_jax import inference
from ltkd_jax.data.logits import Logits, from_arrays
from ltkd_jax.data.records import Images, Records

_FILES = ("config.json", "results.json", inference.FILE_NAME)
# Small, since the last batch is padded.
_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Trained:
    """Holds a trained network and its data.

    Attributes:
      name: what the network is, in words.
      spec: of its run.
      data: the data set that it was trained on.
      classifier: the network.
    """

    name: str
    spec: RunSpec
    data: datasets.Dataset
    classifier: inference.Classifier

    def logits(self, images: Images | Records, label: str) -> Logits:
        """Returns the network's logits on a set of images.

        Args:
          images: the set.
          label: of the progress bar, which is shown if it takes long.
        """
        progress_bar = tqdm.tqdm(
            total=len(images), desc=label, unit="image", delay=3, dynamic_ncols=True
        )
        logits = []
        with progress_bar:
            for batch in padded_batches(images, _BATCH_SIZE, np.arange(_BATCH_SIZE)):
                # A NumPy array, which the type of the batch does not say.
                batch_images: Any = batch.images
                logits.append(self.classifier(batch_images).logits)
                progress_bar.update(int(batch.mask.sum()))
        return from_arrays(
            # The last batch is padded.
            np.concatenate(logits)[: len(images)],
            images.labels,
            source=f"{self.name}, {label}",
        )


def load(folder, *, data_dir: str = "", subset: str = "") -> Trained:
    """Loads the network of a finished teacher's folder or run's work directory.

    Args:
      folder: with `config.json`, `results.json`, `model.json` and `model.msgpack`.
      data_dir: where its data set is.
      subset: the list of its training images, if it was trained on one.

    Raises:
      ValueError: the folder has something missing, damaged or unfinished, or the data
        are not those of its training.
    """
    folder = pathlib.Path(folder)
    for name in _FILES:
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: give the work directory of a finished run, "
                "or a finished teacher's folder such as runs/teachers/HASH; repeat a "
                f"run of an earlier version, which wrote no {inference.FILE_NAME}"
            )
    recorded = identity.read_json(folder / "config.json")
    try:
        classifier = inference.load(folder)
        spec = _resolve(recorded, data_dir, subset)
        # Data that are not prepared raise an error here, with the remedy.
        data = datasets.load(spec.data)
        _check_content(spec.content, recorded["content"])
    except (KeyError, TypeError, ValueError) as error:
        modules = identity.custom_modules(recorded.get("content") or {})
        hint = f" (it was trained with --import={modules})" if modules else ""
        raise ConfigError(f"{folder} cannot be audited: {error}{hint}") from error
    # A teacher's config.json has no hash.
    role = spec.label if "config_hash" in recorded else "teacher"
    return Trained(f"{role} {classifier.model}", spec, data, classifier)


def _resolve(recorded, data_dir, subset):
    """Returns the specification of a recorded config on this machine.

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
    return resolve(config | {"data": data, "teacher": teacher})


def _check_content(current, recorded):
    """Raises ValueError if the data set or the subset has changed since training."""
    for key in ("data", "subset"):
        if current[key] != recorded[key]:
            raise ValueError(
                f"the content of its {key} was {recorded[key]!r}, and now is "
                f"{current[key]!r}: use the data that it was trained with"
            )
