"""A trained network, from the folder that its training left: a teacher's, or a run's work directory."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import tqdm

from configs import common
from experiments.config import checks
from experiments.reporting import tables
from experiments.trainer import build, dataset
from ltkd_jax.data import streaming
from ltkd_jax.data.logits import Logits, from_arrays
from ltkd_jax.data.records import Images, Records
from ltkd_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """A network after its last step.

    Attributes:
      name: what it is, in words.
      config: as it was trained, on one device.
      data: its own.
      model: a Linen module in which there is no device axis.
      variables: what `model.apply` takes; host arrays.
    """

    name: str
    config: object
    data: dataset.Dataset
    model: object
    variables: dict

    @functools.cached_property
    def _apply(self):
        return jax.jit(lambda variables, images: self.model.apply(variables, self.data.preprocess(images), train=False))

    def logits(self, images: Images | Records, label: str) -> Logits:
        """Its logits of a set of images, in memory; with a bar of that label where it takes long."""
        size = min(self.config.eval_batch, max(len(self.data.train), len(self.data.test)))  # one shape for all sets
        rows = np.arange(-(-len(images) // size) * size).reshape(-1, size)
        variables, found = jax.device_put(self.variables), []
        with tqdm.tqdm(total=len(images), desc=label, unit="image", delay=3, dynamic_ncols=True) as bar:
            for batch in _in_order(images, np.minimum(rows, len(images) - 1)):
                found.append(np.asarray(self._apply(variables, batch)))
                bar.update(min(size, len(images) - bar.n))
        return from_arrays(np.concatenate(found)[: len(images)], images.labels, source=f"{self.name}, {label}")


def _in_order(images, rows):
    if isinstance(images, Records):
        return (batch for batch, _ in streaming.in_order(images, rows))
    return (images.images[row] for row in rows)


def restore(folder, *, data_dir: str = "", subset: str = "") -> Restored:
    """The network of a finished teacher's folder or of a finished run's work directory.

    The config is made again of the folder's `config.json`, and must have the same identity: of a data set of one's
    own that includes its content.

    Args:
      folder: with `config.json`, `results.json` and `checkpoints`.
      data_dir: where its data set is.
      subset: the list of its training images, where it was trained on one.

    Raises:
      checks.ConfigError: the folder holds no such thing, is damaged or unfinished, or the data are others.
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", "results.json", "checkpoints"):
        if not (folder / name).exists():
            raise checks.ConfigError(
                f"{folder} has no {name}: give the work directory of a finished run, or a finished teacher's folder "
                "such as runs/teachers/HASH"
            )
    recorded = checks.read_json(folder / "config.json")
    role = "student" if "method" in recorded else "teacher"
    try:
        config = _config(recorded, data_dir, subset)
        checks.validate(config)
        data = dataset.load(config)
        _compare(recorded, checks.identity(config) if role == "student" else checks.teacher_identity(config))
        program = {"student": _student_program, "teacher": build.teacher_program}[role](config)
        found = Checkpoints(folder / "checkpoints").restore(jax.eval_shape(program.init, 0))
    except (KeyError, TypeError, ValueError) as error:
        raise checks.ConfigError(f"{folder} cannot be restored: {error}") from error
    last = checks.teacher_results(folder)["step"] if role == "teacher" else program.total_steps
    if found is None or found[0] != last:
        at = f"step {found[0]}" if found else "none"
        raise checks.ConfigError(
            f"the last whole checkpoint in {folder} is of {at}, and training ends at step {last}: "
            "finish it by the command that began it"
        )
    name = f"teacher {config.teacher.model}"
    if role == "student":
        name = f"{tables.method_name(recorded)} {config.student.model}"
    return Restored(name, config, data, program.model, found[1].variables)


def _student_program(config):
    return build.student_program(config, "none")  # where its teacher's logits came from is no part of its variables


def _config(recorded, data_dir, subset):
    """The config of which this is the identity, see `checks.identity` and `checks.teacher_identity`."""
    tree = checks.without(recorded, ("data.content", "method", "weighting", *_given(recorded)))
    data, method = tree["data"], dict(recorded.get("method") or {"name": "ce"})
    if data.get("subset", "").startswith("list "):
        if not subset:
            raise ValueError(f"its training images are those of a {data['subset']}: give that file by --subset")
        data["subset"] = subset
    models = [tree[role]["model"] for role in ("teacher", "student") if tree.get(role)]
    teacher, student = models[0], models[-1]  # of a teacher's folder, and where there are logits alone, there is one
    config = common.base(data["name"], teacher=teacher, student=student, imbalance=1.0)
    common.set_method(config, method.pop("name"), weighting=recorded.get("weighting"), **method)
    tree = {key: value for key, value in tree.items() if value}  # of logits nothing is left of the teacher
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in tables.flatten(tree).items()}
    config.lock().update_from_flattened_dict({**values, "data.dir": data_dir, "devices": 1})
    return config


def _given(recorded, *more):
    """Keys that say of a teacher's file or folder, which need not be there; of logits they are all."""
    teacher = recorded["teacher"]
    if teacher["model"].startswith("logits "):
        return ("teacher.model", *(f"teacher.{key}" for key in more))
    return ("teacher.checkpoint", *(f"teacher.{key}" for key in ("variables", *more) if "variables" in teacher))


def _compare(recorded, mine):
    there, here = (tables.flatten(checks.without(tree, _given(recorded, "train"))) for tree in (recorded, mine))
    changed = [key for key in sorted({**there, **here}) if there.get(key) != here.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"its {key} is {there.get(key)!r}, here it is {here.get(key)!r}: use the data and the version of this "
            "program that it was trained with"
        )
