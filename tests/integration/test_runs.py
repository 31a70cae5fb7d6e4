"""Small complete runs in this process, over the eight devices of the tests."""

import concurrent.futures
import dataclasses
import json
import resource
import shutil

import jax
import numpy as np
import pytest
from helpers import small_runs
from helpers.small_runs import assert_same_bits, run, tiny

from experiments.config import identity
from experiments.config.spec import resolve
from experiments.config.validation import ConfigError
from experiments.trainer import dataset, external_teacher
from experiments.trainer import run as runs
from experiments.trainer import teacher as teachers
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.metrics_log import MetricsLog
from experiments.trainer.trainer import get_trainer
from ltkd_jax import files, inference, models
from ltkd_jax.training import teacher_table
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def logged():
    """The records that `on_record` of the finished run was called with."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, logged):
    """A finished LTKD run: its folder and its results."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(tiny(folder), folder / "run", on_record=logged.append)


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the finished run's work directory."""
    folder, _ = finished
    return shutil.copytree(folder / "run", tmp_path / "run")


@pytest.fixture
def copied_teacher(finished, tmp_path):
    """A copy of the finished run's teacher."""
    folder, _ = finished
    teacher_hash = resolve(tiny(tmp_path)).teacher_hash
    return shutil.copytree(folder / "teachers" / teacher_hash, tmp_path / "teacher")


def with_teacher(folder, checkpoint, **values):
    """Returns the specification of a run with a teacher's folder."""
    values = {"teacher.checkpoint": str(checkpoint), **values}
    return resolve(tiny(folder, "kd", **values))


def test_run_in_a_thread(tmp_path):
    """Only the main thread may set signal handlers."""
    config = tiny(tmp_path, "ce", **{"train.max_steps": 2})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = pool.submit(run, config, tmp_path / "run").result()
    assert results["test"]["all"] >= 0


@pytest.mark.parametrize("option", ["--workdir", "config.teacher.dir"])
def test_folder_that_cannot_be_made(option, tmp_path):
    file = tmp_path / "file"
    file.touch()
    folders = {"--workdir": tmp_path / "run", "config.teacher.dir": tmp_path}
    folders[option] = file / "x"
    values = {"teacher.dir": str(folders["config.teacher.dir"])}
    config = tiny(tmp_path, "kd", **values)
    with pytest.raises(ConfigError, match=f"{file}/x cannot .*: give another {option}"):
        run(config, folders["--workdir"])


def test_batch_larger_than_the_training_set(tmp_path, caplog):
    values = {"train.batch_size": 128, "train.max_steps": 1}
    run(tiny(tmp_path, "ce", **values), tmp_path / "run")
    assert "train.batch_size=128 is larger than the training set of" in caplog.text


# The files of a run.


def test_results(finished):
    folder, results = finished
    spec = resolve(tiny(folder))
    as_json = json.loads(json.dumps(results))
    assert json.loads((folder / "run" / "results.json").read_text()) == as_json
    assert resolve({**as_json["config"]}).hash == results["config_hash"] == spec.hash
    assert results["content"] == {"teacher": None, "subset": None, "data": None}
    assert results["seeds"] == {"split": 0, "teacher": 0, "student": 0}
    assert results["train_images"] == sum(results["class_counts"])
    assert results["class_counts"][0] == 12
    assert results["epochs"] == 3.0
    teacher = results["teacher"]
    for summary in (results["test"], results["validation"], teacher["test"]):
        keys = {"all", "per_class", "groups", "shots", "ece", "confusion", "group_mass"}
        assert set(summary) == keys
        assert len(summary["per_class"]) == 10
        assert set(summary["groups"]) == {"head", "medium", "tail"}
        # The sets are balanced, so this shows that each image was counted once, on
        # eight devices with a padded batch.
        assert summary["all"] == pytest.approx(np.mean(summary["per_class"]))
    for kind in ("long_tailed", "balanced"):
        assert sum(teacher["group_mass"][kind].values()) == pytest.approx(1)
    assert teacher["test"]["group_mass"] == teacher["group_mass"]["balanced"]
    assert teacher["hash"] == spec.teacher_hash
    assert {"device", "precision", "versions", "commit"} <= set(results)
    assert {"timing", "command"} <= set(results)


def test_records(finished, logged):
    folder, results = finished
    records = small_runs.records(folder / "run")
    assert logged == records
    assert [record["epoch"] for record in records] == [1.0, 2.0, 3.0]
    terms = records[0]["terms"]
    assert set(terms) == {"ce", "inter", "intra"}
    assert records[0]["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
    assert records[-1]["test"]["all"] == results["test"]["all"]


def test_damaged_records(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\nwhat\n[3]\n\xff\xfe\n{"step": "a"}\n{"step": 2}\n{"step": 3}\n'
        b'{"ste'
    )
    MetricsLog(path).truncate(2, epochs=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not caplog.text
    MetricsLog(path).truncate(2, epochs=3)
    assert "metrics.jsonl has 2 of the 3 epochs" in caplog.text


def test_finished_run(finished):
    folder, results = finished
    metrics = folder / "run" / "metrics.jsonl"
    write_time = metrics.stat().st_mtime_ns
    assert run(tiny(folder), folder / "run") == json.loads(json.dumps(results))
    assert metrics.stat().st_mtime_ns == write_time


# Work directories that a run may not use.


def test_workdir_of_another_config(finished):
    folder, _ = finished
    message = "another config .*method.*'ltkd' recorded, 'kd' now.*--workdir"
    with pytest.raises(ConfigError, match=message):
        run(tiny(folder, "kd"), folder / "run")


def test_workdir_in_use(finished):
    folder, _ = finished
    with (
        files.lock(folder / "run" / ".lock"),
        pytest.raises(runs.InUseError, match="in use.*--workdir"),
    ):
        run(tiny(folder), folder / "run")


def write_to(name, content):
    """Returns a function that writes bytes to a file of a folder."""
    return lambda folder: (folder / name).write_bytes(content)


def write_old_config(folder):
    """Writes `config.json` in the form of version 0.1."""
    config = {"config_hash": "x", "config": {"seed_split": 0, "method": {}}}
    (folder / "config.json").write_text(json.dumps(config))


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGED_RESULTS = "results.json is damaged.*remove it"


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            write_to("config.json", b"{"),
            "config.json is damaged.*--workdir, or remove ",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            "no config.json.*--workdir",
        ),
        (write_old_config, "config.json is of another version.*--workdir"),
        (write_to("results.json", b'{"config_ha'), DAMAGED_RESULTS),
        (write_to("results.json", b"\xff\xfe"), DAMAGED_RESULTS),
        (write_to("results.json", b"{}"), DAMAGED_RESULTS),
        (replace_by_file, "is a file: give --workdir"),
    ],
)
def test_damaged_workdir(finished, copied_run, damage, message):
    """It is refused: another run's results must not be returned."""
    folder, _ = finished
    damage(copied_run)
    with pytest.raises(ConfigError, match=message):
        run(tiny(folder), copied_run)


def test_failed_start_claims_nothing(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match="devices=9"):
        run(tiny(tmp_path, "ce", devices=9), workdir)
    assert not workdir.exists()
    # This fails before the teacher is trained.
    with pytest.raises(ConfigError, match="cutout"):
        run(tiny(tmp_path, "ltkd", **{"augment.cutout": 8}), workdir)
    assert not (tmp_path / "teachers").exists()
    small_runs.run_one_call(tiny(tmp_path, "ce"), workdir)


# Interruptions.


def test_resume_bit_for_bit(finished, tmp_path):
    """The run is stopped after every step."""
    folder, results = finished
    config = tiny(folder, checkpoint_every=100)
    resumed, num_stops = small_runs.run_with_stops(config, tmp_path / "run")
    assert num_stops >= 11 and resumed["test"] == results["test"]
    assert_same_bits(tiny(folder), tmp_path / "run", folder / "run")


def test_resume_from_a_damaged_checkpoint(finished, copied_run, caplog):
    """The run resumes from the one before it, and ends with the same bits."""
    folder, results = finished
    (copied_run / "results.json").unlink()
    newest, _ = Checkpoints(copied_run / "checkpoints").steps()
    flip_a_byte(copied_run / "checkpoints" / f"step_{newest}")
    with caplog.at_level("WARNING"):
        resumed = run(tiny(folder), copied_run)
    assert f"step_{newest} is damaged" in caplog.text
    assert resumed["test"] == results["test"]
    assert_same_bits(tiny(folder), copied_run, folder / "run")


def flip_a_byte(path):
    """Damages a file, or the largest one of a folder."""
    paths = [file for file in [path, *path.rglob("*")] if file.is_file()]
    largest = max(paths, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize(
    "field, at_step, message",
    [
        ("params", 1, "the loss of step 2 .*not finite .*ce"),
        ("params", None, "params.* not finite"),
        ("batch_stats", None, "batch_stats.* not finite"),
        ("opt_state", None, "opt_state.* not finite"),
    ],
)
def test_nonfinite_values(tmp_path, field, at_step, message, monkeypatch):
    """A loss within the epoch, or the state at its end."""
    config = tiny(tmp_path, "ce")
    workdir = tmp_path / "run"
    small_runs.run_one_call(config, workdir)
    student = get_trainer(resolve(config).student_training("none"))

    def change(state):
        value = small_runs.with_infinity(getattr(state, field))
        return state._replace(**{field: value})

    small_runs.spoil(monkeypatch, student, change, at_step=at_step)
    small_runs.assert_diverges(
        workdir, f"ce s0: .*{message}.* step 1$", lambda: run(config, workdir)
    )


# Teachers.


def test_shared_teacher(finished):
    """All methods and seeds use the same one."""
    folder, results = finished
    (path,) = (folder / "teachers").glob("*/results.json")
    write_time = path.stat().st_mtime_ns
    teacher = teachers.obtain(resolve(tiny(folder, "kd", seed=2)), StopRequest())
    assert teacher.results == json.loads(json.dumps(results["teacher"]))
    assert path.stat().st_mtime_ns == write_time
    folders = [path for path in (folder / "teachers").iterdir() if path.is_dir()]
    assert folders == [path.parent]


@pytest.mark.parametrize(
    "values, changes, message",
    [
        ({"teacher.model": "resnet14"}, {}, "model='resnet8'.*'resnet14'"),
        ({}, {"num_classes": 100}, "num_classes=100.*10"),
        ({}, {"image_shape": [9, 9, 1]}, r"image_shape=\[9, 9, 1\].*\[8, 8, 1\]"),
    ],
)
def test_wrong_teacher(copied_teacher, tmp_path, values, changes, message):
    path = copied_teacher / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        teachers.obtain(with_teacher(tmp_path, copied_teacher, **values), StopRequest())


def test_damaged_teacher(copied_teacher, tmp_path):
    """An earlier checkpoint of its training does not replace it."""
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


def test_teacher_with_nan(copied_teacher, tmp_path):
    spec = with_teacher(tmp_path, copied_teacher)
    checkpoints = Checkpoints(copied_teacher / "checkpoints")
    template = jax.eval_shape(get_trainer(spec.teacher_training()).init, 0)
    step, state, extra = checkpoints.restore(template)
    state.variables["params"]["classifier"]["bias"][3] = np.nan
    checkpoints.save(step, state, extra)
    message = "teacher: params/classifier/bias has 1 of 10 values that are NaN"
    with pytest.raises(ConfigError, match=message):
        teachers.obtain(spec, StopRequest())


def test_teacher_of_another_data_set(copied_teacher, tmp_path):
    change_json(copied_teacher / "config.json", "config", "data", name="mnist")
    spec = with_teacher(tmp_path, copied_teacher)
    with pytest.raises(ConfigError, match="teacher' was .* 'mnist', .* teach 'digits'"):
        teachers.obtain(spec, StopRequest())


def test_run_as_teacher(finished, copied_run, tmp_path):
    """The student of a run teaches, as it does from its own file."""
    spec = with_teacher(tmp_path, copied_run)
    teacher = teachers.obtain(spec, StopRequest())
    student = inference.load(copied_run)
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, student.variables)
    _, results = finished
    assert teacher.results["test"] == results["test"]
    assert spec.name.endswith("-run-resnet8-s0")
    from_file = with_teacher(tmp_path, copied_run / "model.msgpack")
    assert spec.hash == from_file.hash and spec.teacher_hash == from_file.teacher_hash

    moved = copied_run.rename(tmp_path / "moved")
    assert with_teacher(tmp_path, moved).hash == spec.hash
    # It is known from the record alone, since the folder need not be there.
    recorded = json.loads(json.dumps({"config": spec.config, "content": spec.content}))
    assert identity.recorded_identity(recorded) == spec.identity
    flip_a_byte(moved / "model.msgpack")
    assert with_teacher(tmp_path, moved).hash != spec.hash


def change_json(path, *keys, **values):
    """Changes values in a section of a JSON file."""
    content = json.loads(path.read_text())
    section = content
    for key in keys:
        section = section[key]
    section.update(values)
    path.write_text(json.dumps(content))


DIGITS = [*"0123456789"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda run: change_json(run / "config.json", "config", "data", name="x"),
            "checkpoint=.*run' was trained on the data set 'x', .* teach 'digits'",
        ),
        (
            lambda run: change_json(run / "config.json", "content", data="abc"),
            "was trained on other images of 'digits' .*was abc, and now is None",
        ),
        (
            lambda run: change_json(run / "model.json", class_names=DIGITS[::-1]),
            "checkpoint=.*run': class 0 is '9', but '0' in the data set",
        ),
        (
            lambda run: change_json(run / "model.json", image_shape=[9, 9, 1]),
            r"run' was trained on images of shape \[9, 9, 1\], .* \[8, 8, 1\]",
        ),
        (
            lambda run: change_json(run / "model.json", model="resnet14"),
            "run' is a run of the student 'resnet14', .* set it to 'resnet14'",
        ),
        (lambda run: (run / "model.json").unlink(), "without model.json.*: repeat"),
        (lambda run: (run / "results.json").unlink(), "no finished .* by its command"),
        (
            lambda run: flip_a_byte(run / "model.msgpack"),
            "model.msgpack is missing or damaged",
        ),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
    ],
)
def test_run_that_cannot_teach(copied_run, tmp_path, change, message):
    change(copied_run)
    with pytest.raises(ConfigError, match=message):
        teachers.obtain(with_teacher(tmp_path, copied_run), StopRequest())


def test_run_of_another_number_of_classes(finished, tmp_path):
    folder, _ = finished
    spec = resolve(tiny(folder, "kd"))
    data = dataset.load(spec.data)
    source = dataclasses.replace(data.source, class_names=data.source.class_names[:9])
    with pytest.raises(ValueError, match="run' has 10 classes, and the data set 9"):
        external_teacher.check_run(
            folder / "run", dataclasses.replace(data, source=source), None
        )


def test_pytorch_file_as_teacher(tmp_path):
    (tmp_path / "resnet.pth").touch()
    with pytest.raises(ConfigError, match="resnet.pth holds no .*models.convert"):
        with_teacher(tmp_path, tmp_path / "resnet.pth")


def test_external_teacher_in_identity(copied_teacher, tmp_path):
    """An external teacher enters it by its content, not by its path."""
    own = resolve(tiny(tmp_path, "kd"))
    external = with_teacher(tmp_path, copied_teacher)
    assert external.hash != own.hash and external.teacher_hash == own.teacher_hash
    moved = copied_teacher.rename(tmp_path / "moved")
    assert with_teacher(tmp_path, moved).hash == external.hash
    results = json.loads((moved / "results.json").read_text())
    (moved / "results.json").write_text(json.dumps({**results, "hash": "another"}))
    assert with_teacher(tmp_path, moved).hash != external.hash


def test_stop_while_waiting_for_a_teacher(tmp_path, capsys):
    spec = resolve(tiny(tmp_path, "kd"))
    lock = (tmp_path / "teachers" / spec.teacher_hash).with_suffix(".lock")
    with files.lock(lock), pytest.raises(StoppedError, match="waiting for the teacher"):
        teachers.obtain(spec, StopRequest(deadline=0))
    assert "waiting for the teacher" in capsys.readouterr().err


def test_table_matches_network(finished):
    folder, results = finished
    assert results["teacher_logits"] == "network"
    config = tiny(folder, **{"teacher.table": "always"})
    assert resolve(config).hash == results["config_hash"]
    assert run(config, folder / "by_table")["teacher_logits"] == "table"
    by_table = small_runs.records(folder / "by_table")
    by_network = small_runs.records(folder / "run")
    assert by_table[0]["loss"] == pytest.approx(by_network[0]["loss"], rel=1e-3)


MASS_OF_DATASET = {"method.mass": "dataset", "train.max_steps": 2, "devices": 1}


@pytest.mark.parametrize("source", ["table", "network"])
def test_mass_of_the_dataset(finished, source):
    """It is that of the images without crops, by the table and by the network."""
    folder, _ = finished
    spec = resolve(tiny(folder, **MASS_OF_DATASET))
    trainer = get_trainer(spec.student_training(source))
    teacher = teachers.obtain(spec, StopRequest())
    images = trainer.data.train
    reads = teacher.variables
    if source == "table":
        reads = teacher.table(images, StopRequest())
    data = trainer.parallel.unreplicate(trainer.device_data(reads))
    network = models.create(spec.teacher.model, 10)
    pixels = trainer.data.preprocess(images.images)
    logits = network.apply(teacher.variables, pixels, train=False)
    scaled = np.exp(np.asarray(logits, np.float64) / 4)
    expected = (scaled / scaled.sum(axis=-1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(data.class_mass, expected, rtol=1e-5)


@pytest.mark.parametrize("argument", ["ltkd", "bikd,terms=ltkd,outer_loss=mix"])
def test_resume_with_mass_of_the_dataset(finished, tmp_path, argument):
    folder, _ = finished
    config = tiny(folder, argument, **MASS_OF_DATASET)
    run(config, tmp_path / "run")
    small_runs.run_with_stops(config, tmp_path / "resumed")
    assert_same_bits(config, tmp_path / "resumed", tmp_path / "run")


@pytest.fixture
def read_table(copied_teacher, tmp_path):
    """A function of a deadline that returns the table of 2,700 views of a teacher."""
    values = {"data.n_max": 30, "data.imbalance": 1.0}
    spec = with_teacher(tmp_path, copied_teacher, **values)
    teacher = teachers.obtain(spec, StopRequest())
    images = dataset.load(spec.data).train
    return lambda deadline=None: teacher.table(images, StopRequest(deadline))


def test_table_without_room(read_table):
    """An error, though a memory map on a full disk would kill the process."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            read_table()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_table().shape == (300, 9, 10)


def test_table_stopped_or_damaged(read_table, copied_teacher, monkeypatch):
    """If stopped, the next call continues it; if damaged, it is built again."""
    starts = []
    build = teacher_table.build

    def recording_build(*arguments, start, **options):
        starts.append(start)
        build(*arguments, start=start, **options)

    monkeypatch.setattr(teacher_table, "build", recording_build)
    with pytest.raises(StoppedError, match="table.* of 2700"):
        read_table(deadline=0)
    continued = np.array(read_table())
    assert starts[0] == 0 and 0 < starts[1] < 2700
    temporary_files = [*copied_teacher.glob("*.tmp"), *copied_teacher.glob("*.done")]
    assert not temporary_files
    (path,) = copied_teacher.glob("table-*-300x9x10-*.npy")
    for damage in (lambda data: data[:-40] + bytes(40), lambda data: data[:500]):
        path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_allclose(read_table(), continued, rtol=1e-5, atol=1e-5)
    assert starts[2:] == [0, 0]
