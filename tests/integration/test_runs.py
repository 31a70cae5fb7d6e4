"""Whole small runs in this process, spread over the eight devices of the tests."""

import json
import resource
import shutil

import numpy as np
import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, run, tiny

from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset
from experiments.trainer import run as runs
from experiments.trainer import teacher as teachers
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.metrics_log import MetricsLog
from experiments.trainer.trainer import get_trainer
from ltkd_jax import files
from ltkd_jax.training import teacher_table
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def heard():
    """What `on_record` of the finished run was called with."""
    return []


@pytest.fixture(scope="module")
def done(tmp_path_factory, heard):
    """A finished LTKD run: its folder and its results."""
    folder = tmp_path_factory.mktemp("done")
    return folder, run(tiny(folder), folder / "run", on_record=heard.append)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished run's work directory."""
    return shutil.copytree(done[0] / "run", tmp_path / "run")


@pytest.fixture
def copied_teacher(done, tmp_path):
    """A copy of the finished run's teacher."""
    return shutil.copytree(
        done[0] / "teachers" / resolve(tiny(tmp_path)).teacher_hash,
        tmp_path / "teacher",
    )


def with_teacher(folder, checkpoint, **values):
    """Returns the specification of a run with a teacher's folder."""
    return resolve(
        tiny(folder, "kd", **{"teacher.checkpoint": str(checkpoint), **values})
    )


# What a run leaves.


def test_results(done):
    folder, results = done
    spec = resolve(tiny(folder))
    as_json = json.loads(json.dumps(results))
    assert json.loads((folder / "run" / "results.json").read_text()) == as_json
    assert resolve({**as_json["config"]}).hash == results["config_hash"] == spec.hash
    assert results["content"] == {"teacher": None, "subset": None, "data": None}
    assert results["seeds"] == {"split": 0, "teacher": 0, "student": 0}
    assert (
        results["train_images"] == sum(results["class_counts"])
        and results["class_counts"][0] == 12
    )
    assert results["epochs"] == 3.0
    for part in (results["test"], results["validation"], results["teacher"]["test"]):
        assert set(part) == {"all", "per_class", "groups", "shots", "ece", "confusion"}
        assert len(part["per_class"]) == 10 and set(part["groups"]) == {
            "head",
            "medium",
            "tail",
        }
        # The sets are balanced: each image was counted once, on eight devices with a padded batch.
        assert part["all"] == pytest.approx(np.mean(part["per_class"]))
    mass = results["teacher"]["group_mass"]
    assert all(
        sum(mass[kind].values()) == pytest.approx(1)
        for kind in ("long_tailed", "balanced")
    )
    assert results["teacher"]["hash"] == spec.teacher_hash
    assert {"device", "precision", "versions", "commit", "timing", "command"} <= set(
        results
    )


def test_records(done, heard):
    folder, results = done
    lines = small_runs.records(folder / "run")
    assert heard == lines and [line["epoch"] for line in lines] == [1.0, 2.0, 3.0]
    assert set(lines[0]["terms"]) == {"ce", "inter", "intra"}
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["terms"].values()), rel=1e-4)
    assert lines[-1]["test"]["all"] == results["test"]["all"]


def test_records_that_are_damaged(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\nwhat\n[3]\n\xff\xfe\n{"step": "a"}\n{"step": 2}\n{"step": 3}\n{"ste'
    )
    MetricsLog(path).truncate(2, epochs=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not caplog.text
    MetricsLog(path).truncate(2, epochs=3)
    assert "metrics.jsonl has 2 of the 3 epochs" in caplog.text


def test_finished_run_is_not_repeated(done):
    folder, results = done
    before = (folder / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert run(tiny(folder), folder / "run") == json.loads(json.dumps(results))
    assert (folder / "run" / "metrics.jsonl").stat().st_mtime_ns == before


# Whose work directory it is.


def test_workdir_of_another_config(done):
    folder, _ = done
    with pytest.raises(
        ConfigError, match="another config .*method.*'ltkd' recorded, 'kd' now.*--workdir"
    ):
        run(tiny(folder, "kd"), folder / "run")


def test_workdir_in_use(done):
    folder, _ = done
    with (
        files.lock(folder / "run" / ".lock"),
        pytest.raises(runs.InUseError, match="in use.*--workdir"),
    ):
        run(tiny(folder), folder / "run")


def write_old_config(folder):
    """Writes `config.json` as version 0.1 did."""
    (folder / "config.json").write_text(
        json.dumps({"config_hash": "x", "config": {"seed_split": 0, "method": {}}})
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda d: (d / "config.json").write_text("{"),
            "config.json is damaged.*--workdir, or remove ",
        ),
        (lambda d: (d / "config.json").unlink(), "no config.json.*--workdir"),
        (write_old_config, "config.json is of another version.*--workdir"),
        (
            lambda d: (d / "results.json").write_text('{"config_ha'),
            "results.json is damaged.*remove it",
        ),
        (
            lambda d: (d / "results.json").write_bytes(b"\xff\xfe"),
            "results.json is damaged.*remove it",
        ),
        (
            lambda d: (d / "results.json").write_text("{}"),
            "results.json is damaged.*remove it",
        ),
        (lambda d: (shutil.rmtree(d), d.write_text("")), "is a file: give --workdir"),
    ],
)
def test_workdir_that_is_damaged(done, copied, damage, message):
    """It is refused, rather than another run's result returned as this one's."""
    damage(copied)
    with pytest.raises(ConfigError, match=message):
        run(tiny(done[0]), copied)


def test_run_that_cannot_start_claims_nothing(tmp_path):
    with pytest.raises(ConfigError, match="devices=9"):
        run(tiny(tmp_path, "ce", devices=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="cutout"):  # before the teacher is trained
        run(tiny(tmp_path, "ltkd", **{"augment.cutout": 8}), tmp_path / "run")
    assert not (tmp_path / "teachers").exists()
    small_runs.run_one_call(tiny(tmp_path, "ce"), tmp_path / "run")


# Interruptions.


def test_resume_is_bit_for_bit(done, tmp_path):
    """Stopped after every step."""
    folder, results = done
    resumed, stops = small_runs.run_with_stops(
        tiny(folder, checkpoint_every=100), tmp_path / "run"
    )
    assert stops >= 11 and resumed["test"] == results["test"]
    assert_same_bits(tiny(folder), tmp_path / "run", folder / "run")


def test_resume_from_a_damaged_checkpoint(done, copied, caplog):
    """The one before it is taken; the run ends with the same bits."""
    folder, results = done
    (copied / "results.json").unlink()
    newest, _ = Checkpoints(copied / "checkpoints").steps()
    flip_a_byte(copied / "checkpoints" / f"step_{newest}")
    with caplog.at_level("WARNING"):
        resumed = run(tiny(folder), copied)
    assert (
        f"step_{newest} is damaged" in caplog.text
        and resumed["test"] == results["test"]
    )
    assert_same_bits(tiny(folder), copied, folder / "run")


def flip_a_byte(folder):
    """Damages the largest file."""
    path = max(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "part, at_step, message",
    [
        ("params", 1, "the loss of step 2 .*not finite .*ce"),
        ("params", None, "params.* not finite"),
        ("batch_stats", None, "batch_stats.* not finite"),
        ("opt_state", None, "opt_state.* not finite"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path, part, at_step, message, monkeypatch):
    """Of a loss within the epoch, of the state at its end."""
    config = tiny(tmp_path, "ce")
    workdir = tmp_path / "run"
    small_runs.run_one_call(config, workdir)
    student = get_trainer(resolve(config).student_training("none"))

    def change(state):
        return state._replace(**{part: small_runs.with_infinity(getattr(state, part))})

    small_runs.spoil(monkeypatch, student, change, at_step=at_step)
    small_runs.assert_diverges(
        workdir, f"ce s0: .*{message}.* step 1$", lambda: run(config, workdir)
    )


# Teachers.


def test_teacher_is_shared(done):
    """By all methods and seeds."""
    folder, results = done
    (path,) = (folder / "teachers").glob("*/results.json")
    stamp = path.stat().st_mtime_ns
    teacher = teachers.obtain(resolve(tiny(folder, "kd", seed=2)), StopRequest())
    assert (
        teacher.results == json.loads(json.dumps(results["teacher"]))
        and path.stat().st_mtime_ns == stamp
    )
    assert sorted(
        path.name for path in (folder / "teachers").iterdir() if path.is_dir()
    ) == [path.parent.name]


@pytest.mark.parametrize(
    "values, changed, message",
    [
        ({"teacher.model": "resnet14"}, {}, "model='resnet8'.*'resnet14'"),
        ({}, {"num_classes": 100}, "num_classes=100.*10"),
        ({}, {"image_shape": [9, 9, 1]}, r"image_shape=\[9, 9, 1\].*\[8, 8, 1\]"),
    ],
)
def test_teacher_that_does_not_fit(copied_teacher, tmp_path, values, changed, message):
    path = copied_teacher / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ConfigError, match=message):
        teachers.obtain(with_teacher(tmp_path, copied_teacher, **values), StopRequest())


def test_teacher_that_is_damaged(copied_teacher, tmp_path):
    """It is not replaced by an earlier checkpoint of its training."""
    spec = with_teacher(tmp_path, copied_teacher)
    newest, _ = Checkpoints(copied_teacher / "checkpoints").steps()
    flip_a_byte(copied_teacher / "checkpoints" / f"step_{newest}")
    with pytest.raises(ConfigError, match="is damaged: remove the folder"):
        teachers.obtain(spec, StopRequest())
    (copied_teacher / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="results.json is damaged"):
        with_teacher(tmp_path, copied_teacher)
    with pytest.raises(ConfigError, match="/nowhere holds no finished teacher"):
        with_teacher(tmp_path, "/nowhere")


def test_teacher_from_elsewhere_is_part_of_the_identity(copied_teacher, tmp_path):
    """By what it is, not by where it lies."""
    own = resolve(tiny(tmp_path, "kd"))
    other = with_teacher(tmp_path, copied_teacher)
    assert other.hash != own.hash and other.teacher_hash == own.teacher_hash
    moved = copied_teacher.rename(tmp_path / "moved")
    assert with_teacher(tmp_path, moved).hash == other.hash
    results = json.loads((moved / "results.json").read_text())
    (moved / "results.json").write_text(json.dumps({**results, "hash": "another"}))
    assert with_teacher(tmp_path, moved).hash != other.hash


def test_stop_while_waiting_for_a_teacher(tmp_path, capsys):
    spec = resolve(tiny(tmp_path, "kd"))
    lock = (tmp_path / "teachers" / spec.teacher_hash).with_suffix(".lock")
    with files.lock(lock), pytest.raises(StoppedError, match="waiting for the teacher"):
        teachers.obtain(spec, StopRequest(deadline=0))
    assert "waiting for the teacher" in capsys.readouterr().err


def test_table_and_network_agree(done):
    folder, results = done
    assert results["teacher_logits"] == "network"
    config = tiny(folder, **{"teacher.table": "always"})
    assert resolve(config).hash == results["config_hash"]
    assert run(config, folder / "by_table")["teacher_logits"] == "table"
    by_table, by_network = (
        small_runs.records(folder / name)[0] for name in ("by_table", "run")
    )
    assert by_table["loss"] == pytest.approx(by_network["loss"], rel=1e-3)


def test_table_that_is_damaged_stopped_or_without_room(
    copied_teacher, tmp_path, monkeypatch
):
    """It is built again, continued, or an error; a memory map of a full disk would kill the process."""
    spec = with_teacher(
        tmp_path, copied_teacher, **{"data.n_max": 30, "data.imbalance": 1.0}
    )  # 2,700 views
    teacher = teachers.obtain(spec, StopRequest())
    images = dataset.load(spec.data).train

    def table(deadline=None):
        return teacher.table(images, StopRequest(deadline))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            table()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    starts = []
    build = teacher_table.build

    def build_noting_start(*arguments, start, **options):
        starts.append(start)
        build(*arguments, start=start, **options)

    monkeypatch.setattr(teacher_table, "build", build_noting_start)
    with pytest.raises(StoppedError, match="table.* of 2700"):
        table(deadline=0)
    continued = np.array(table())
    assert starts[0] == 0 and 0 < starts[1] < 2700
    assert not [*teacher.folder.glob("*.tmp"), *teacher.folder.glob("*.done")]
    (path,) = teacher.folder.glob("table-*-300x9x10-*.npy")
    for damage in (lambda data: data[:-40] + bytes(40), lambda data: data[:500]):
        path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_allclose(table(), continued, rtol=1e-5, atol=1e-5)
    assert starts[2:] == [0, 0]
