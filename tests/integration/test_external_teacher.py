"""Teachers from files: the same runs as by the teacher that they were made of, and errors that say what is wrong."""

import json

import jax
import numpy as np
import pytest
from flax import serialization
from helpers.small_runs import run, tiny

from experiments.audit import restore
from experiments.config import checks
from experiments.trainer import build, dataset, loop
from experiments.trainer import run as runs
from experiments.trainer import teacher as teachers


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Variables that were drawn and not trained, and logits that know every label, as files."""
    folder = tmp_path_factory.mktemp("drawn")
    config = tiny(folder, "kd")
    data, state = dataset.load(config), build.teacher_program(config).init(0)
    (folder / "own.msgpack").write_bytes(serialization.msgpack_serialize(jax.device_get(state.variables)))
    named = {"train_logits": data.source.train, "logits": data.source.test}
    arrays = {name: 9 * np.eye(10, dtype=np.float16)[images.labels] for name, images in named.items()}
    arrays |= {"train_labels": data.source.train.labels, "labels": data.source.test.labels}
    np.savez(folder / "own.npz", **arrays)
    return folder, arrays


def test_logits_of_a_file_teach(drawn, tmp_path):
    folder, _ = drawn
    config = tiny(tmp_path, "kd", **{"teacher.checkpoint": str(folder / "own.npz"), "train.epochs": 1.0})
    results = run(config, tmp_path / "run")
    teacher, (record,) = results["teacher"], curves(tmp_path / "run")
    assert teacher["test"]["all"] == 100.0 and results["teacher_logits"] == "table" and np.isfinite(record).all()
    assert teacher["group_mass"]["balanced"]["head"] == pytest.approx(0.3, abs=1e-3)
    assert results["config"]["teacher"] == {"model": f"logits {checks.file_hash(config.teacher.checkpoint)}"}
    assert restore.restore(tmp_path / "run").name == "kd resnet8"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A run by a teacher of the cache, and that teacher as a file of variables and one of logits."""
    folder = tmp_path_factory.mktemp("known")
    config = tiny(folder, "kd", **{"teacher.table": "always"})
    results = run(config, folder / "run")
    teacher, source = teachers.obtain(config, loop.StopRequest()), dataset.load(config).source
    (folder / "own.msgpack").write_bytes(serialization.msgpack_serialize(teacher.variables))
    everything = source.train.take(np.arange(len(source.train)))
    table = teacher.table(everything, loop.StopRequest())
    arrays = {"train_logits": table, "train_labels": source.train.labels}
    np.savez(folder / "own.npz", **arrays)
    return folder, results, arrays


def curves(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["test"]["all"]) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["msgpack", "npz"])
def test_a_file_teaches_as_the_teacher_that_it_was_made_of(known, tmp_path, kind):
    folder, results, _ = known
    config = tiny(tmp_path, "kd", **{"teacher.table": "auto" if kind == "npz" else "always"})
    config.teacher.checkpoint = str(folder / f"own.{kind}")
    config.seed_teacher = 5  # of no consequence
    found = run(config, tmp_path / "run")
    assert curves(tmp_path / "run") == curves(folder / "run") and found["test"] == results["test"]
    assert found["config_hash"] != results["config_hash"] and found["seeds"]["teacher"] is None
    mass = {"msgpack": ("long_tailed", "balanced"), "npz": ("long_tailed",)}[kind]
    assert found["teacher"]["group_mass"].keys() == set(mass)
    if kind == "msgpack":
        assert found["teacher"]["group_mass"] == results["teacher"]["group_mass"]
    else:  # of all training images, where the network is evaluated on as many as the test set has
        assert sum(found["teacher"]["group_mass"]["long_tailed"].values()) == pytest.approx(1.0)
    assert runs.default_workdir(config).endswith("-own-resnet8-s0")
    folders = [tmp_path / "run", *(path.parent for path in (tmp_path / "teachers").glob("*/results.json"))]
    restored_names = [restore.restore(folder).name for folder in folders]
    assert restored_names == ["kd resnet8", "teacher resnet8"][: 2 if kind == "msgpack" else 1]
    assert (
        found["config"]["teacher"]
        .get("variables", found["config"]["teacher"]["model"])
        .endswith(checks.file_hash(config.teacher.checkpoint))
    )


@pytest.mark.slow
def test_logits_without_views_are_those_of_every_view(known, tmp_path):
    folder, _, arrays = known
    config = tiny(tmp_path, "kd", **{"teacher.checkpoint": str(tmp_path / "one.npz"), "train.epochs": 1.0})
    data = dataset.load(config)
    one = arrays["train_logits"][:, data.source.views.identity]
    test_logits = np.eye(10, dtype=np.float16)[data.source.test.labels]
    np.savez(
        config.teacher.checkpoint, **arrays | {"train_logits": one}, logits=test_logits, labels=data.source.test.labels
    )
    single = run(config, tmp_path / "one")
    assert single["teacher"]["test"]["all"] == 100.0 and single["teacher_logits"] == "table"
    config.teacher.checkpoint = str(tmp_path / "all.npz")
    np.savez(config.teacher.checkpoint, **arrays | {"train_logits": np.repeat(one[:, None], data.source.views.num, 1)})
    run(config, tmp_path / "all")
    assert curves(tmp_path / "one") == curves(tmp_path / "all")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_logits": None}, "lacks 'train_logits'; it holds labels, logits, train_labels"),
        ({"train_labels": None}, "lacks 'train_labels'"),
        ({"train_logits": lambda x: x[1:]}, r"train_logits is float16\[1096, 10\], but must be floats of \[1097, 10\]"),
        ({"train_logits": lambda x: x.astype(int)}, "train_logits is int64"),
        ({"train_logits": lambda x: np.where(np.arange(10) == 3, np.nan, x)}, "not finite"),
        ({"train_labels": lambda y: np.roll(y, 1)}, "are not those of the data set"),
        ({"train_keys": lambda _: np.array(["digits_0001"] * 1097)}, "its keys are not those of the data set"),
        ({"labels": None}, "lacks 'labels'"),
    ],
)
def test_logits_that_do_not_fit(drawn, tmp_path, change, message):
    _, arrays = drawn
    arrays = dict(arrays)
    for name, changed in change.items():
        arrays[name] = changed(arrays.get(name)) if changed else None
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    config = tiny(tmp_path, "kd", **{"teacher.checkpoint": str(tmp_path / "bad.npz")})
    with pytest.raises(checks.ConfigError, match=message):
        teachers.obtain(config, loop.StopRequest())


@pytest.mark.parametrize("name", ["bad.npz", "bad.msgpack"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a file of arrays", None])
def test_files_that_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(checks.ConfigError, match="cannot be read|cannot read|is not of"):
        teachers.obtain(tiny(tmp_path, "kd", **{"teacher.checkpoint": str(path)}), loop.StopRequest())


def test_an_array_is_no_archive(tmp_path):
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros((1097, 10)))
    with pytest.raises(checks.ConfigError, match="cannot be read as an npz file"):
        teachers.obtain(tiny(tmp_path, "kd", **{"teacher.checkpoint": str(tmp_path / "array.npz")}), loop.StopRequest())


def test_variables_of_another_model(drawn, tmp_path):
    folder, _ = drawn
    own = {"teacher.checkpoint": str(folder / "own.msgpack"), "teacher.model": "resnet14"}
    with pytest.raises(checks.ConfigError, match="is not of resnet14 with 10 classes"):
        teachers.obtain(tiny(tmp_path, "kd", **own), loop.StopRequest())
    assert not list((tmp_path / "teachers").glob("*/results.json"))


@pytest.mark.parametrize("argument, reason", [("kd,mixup=0.2", "no end"), ("reviewkd", "features"), ("kd", "never")])
def test_logits_where_nothing_is_looked_up(drawn, argument, reason, tmp_path):
    folder, _ = drawn
    table = {"teacher.table": "never"} if reason == "never" else {}
    config = tiny(tmp_path, argument, **{"teacher.checkpoint": str(folder / "own.npz")}, **table)
    with pytest.raises(checks.ConfigError, match=f"holds logits of images.*{reason}"):
        checks.validate(config)
