"""A file teaches as the teacher that it was made of."""

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
    """A run by a teacher that it trained, and that teacher as a file of variables and one of logits."""
    folder = tmp_path_factory.mktemp("original")
    config = tiny(folder, "kd", **{"teacher.table": "always", "train.epochs": 2.0})
    results = run(config, folder / "run")
    spec = resolve(config)
    source = dataset.load(spec.data).source
    teacher = teachers.obtain(spec, StopRequest())
    (folder / "own.msgpack").write_bytes(
        serialization.msgpack_serialize(teacher.variables)
    )
    everything = source.train.take(np.arange(len(source.train)))
    arrays = {
        "train_logits": teacher.table(everything, StopRequest()),
        "train_labels": source.train.labels,
    }
    np.savez(folder / "own.npz", **arrays)
    return folder, results, arrays


def curves(workdir):
    records = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    return [(record["loss"], record["test"]["all"]) for record in records]


@pytest.mark.parametrize("kind", ["msgpack", "npz"])
def test_file_teaches_as_its_teacher(original, tmp_path, kind):
    folder, results, _ = original
    table = "auto" if kind == "npz" else "always"
    config = tiny(tmp_path, "kd", **{"teacher.table": table, "train.epochs": 2.0})
    config.teacher.checkpoint = str(folder / f"own.{kind}")
    config.teacher_seed = 5  # has no effect
    by_file = run(config, tmp_path / "run")
    assert (
        curves(tmp_path / "run") == curves(folder / "run")
        and by_file["test"] == results["test"]
    )
    assert (
        by_file["config_hash"] != results["config_hash"]
        and by_file["seeds"]["teacher"] is None
    )
    if kind == "msgpack":
        assert by_file["teacher"]["group_mass"] == results["teacher"]["group_mass"]
    else:
        assert by_file["teacher"]["group_mass"].keys() == {"long_tailed"}
    assert resolve(config).name.endswith("-own-resnet8-s0")
    assert inputs.read(tmp_path / "run").name == "kd resnet8"


def test_logits_without_views_are_those_of_every_view(original, tmp_path):
    _, _, arrays = original
    config = tiny(tmp_path, "kd", **{"train.epochs": 1.0})
    views = dataset.load(resolve(config).data).source.views
    one = arrays["train_logits"][:, views.identity]
    config.teacher.checkpoint = str(tmp_path / "one.npz")
    np.savez(
        tmp_path / "one.npz", train_logits=one, train_labels=arrays["train_labels"]
    )
    results = run(config, tmp_path / "one")
    assert results["teacher_logits"] == "table"
    config.teacher.checkpoint = str(tmp_path / "all.npz")
    np.savez(
        tmp_path / "all.npz",
        **arrays | {"train_logits": np.repeat(one[:, None], views.num, 1)},
    )
    run(config, tmp_path / "all")
    assert curves(tmp_path / "one") == curves(tmp_path / "all")
