"""A teacher from a file teaches as the teacher that the file was made of."""

import json

import numpy as np
import pytest
from flax import serialization
from helpers.small_runs import run, tiny

from experiments.audit import inputs
from experiments.config.spec import resolve
from experiments.trainer import dataset
from experiments.trainer import teacher as teachers
from experiments.trainer.interrupts import StopRequest


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Returns a folder with a run and its teacher's files, the results and the logits.

    The files hold the variables of the teacher that the run trained, and its logits.
    """
    folder = tmp_path_factory.mktemp("original")
    config = tiny(folder, "kd", **{"teacher.table": "always", "train.epochs": 2.0})
    results = run(config, folder / "run")
    spec = resolve(config)
    train = dataset.load(spec.data).source.train
    teacher = teachers.obtain(spec, StopRequest())
    variables = serialization.msgpack_serialize(teacher.variables)
    (folder / "own.msgpack").write_bytes(variables)
    images = train.take(np.arange(len(train)))
    arrays = {
        "train_logits": teacher.table(images, StopRequest()),
        "train_labels": train.labels,
        "train_keys": train.keys,
    }
    np.savez(folder / "own.npz", **arrays)
    return folder, results, arrays


def curves(workdir):
    """Returns the training loss and the test accuracy of every record."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["loss"], record["test"]["all"]) for record in records]


@pytest.mark.parametrize("kind", ["msgpack", "npz"])
def test_same_run_from_file(original, tmp_path, kind):
    folder, expected, _ = original
    # Logits from a file are a table; with variables it has to be asked for.
    table = "auto" if kind == "npz" else "always"
    config = tiny(tmp_path, "kd", **{"teacher.table": table, "train.epochs": 2.0})
    config.teacher.checkpoint = str(folder / f"own.{kind}")
    config.teacher_seed = 5  # It has no effect on a teacher from a file.
    results = run(config, tmp_path / "run")
    assert curves(tmp_path / "run") == curves(folder / "run")
    assert results["test"] == expected["test"]
    assert results["config_hash"] != expected["config_hash"]
    assert results["seeds"]["teacher"] is None
    group_mass = results["teacher"]["group_mass"]
    if kind == "msgpack":
        assert group_mass == expected["teacher"]["group_mass"]
    else:
        # Without a network there are no logits of balanced images.
        assert group_mass.keys() == {"long_tailed"}
    assert resolve(config).name.endswith("-own-resnet8-s0")
    assert inputs.read(tmp_path / "run").name == "kd resnet8"


def test_run_from_run(original, tmp_path):
    """The student of a run teaches the next one."""
    folder, first, _ = original
    config = tiny(tmp_path, "kd", **{"teacher.checkpoint": str(folder / "run")})
    results = run(config, tmp_path / "second")
    assert results["teacher"]["test"] == first["test"]
    assert results["seeds"]["teacher"] is None
    assert run(config, tmp_path / "second") == json.loads(json.dumps(results))


def test_logits_without_views_are_repeated(original, tmp_path):
    _, _, arrays = original
    config = tiny(tmp_path, "kd", **{"train.epochs": 1.0})
    views = dataset.load(resolve(config).data).source.views
    logits = arrays["train_logits"][:, views.identity]
    others = {name: arrays[name] for name in ("train_labels", "train_keys")}

    config.teacher.checkpoint = str(tmp_path / "one.npz")
    np.savez(tmp_path / "one.npz", train_logits=logits, **others)
    results = run(config, tmp_path / "one")
    assert results["teacher_logits"] == "table"

    repeated = np.repeat(logits[:, None], views.num, axis=1)
    config.teacher.checkpoint = str(tmp_path / "all.npz")
    np.savez(tmp_path / "all.npz", train_logits=repeated, **others)
    run(config, tmp_path / "all")
    assert curves(tmp_path / "one") == curves(tmp_path / "all")
