"""Whole small runs in this process, spread over the eight devices of the tests."""

import json
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_runs import parameters, run, tiny

from experiments.config import checks
from experiments.trainer import build, dataset, loop
from experiments.trainer import run as runs
from experiments.trainer import teacher as teachers
from ltkd_jax import files
from ltkd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished LTKD run, its config and its folder."""
    folder = tmp_path_factory.mktemp("done")
    config = tiny(folder)
    return config, folder, run(config, folder / "run")


def test_results_hold_what_they_promise(done):
    config, folder, results = done
    assert json.loads((folder / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["config_hash"] == checks.config_hash(config) and results["config"]["method"]["name"] == "ltkd"
    assert results["seeds"] == {"split": 0, "teacher": 0, "student": 0}
    assert results["train_images"] == sum(results["class_counts"]) and results["class_counts"][0] == 12
    assert results["epochs"] == 3.0
    for part in (results["test"], results["validation"], results["teacher"]["test"]):
        assert set(part) == {"all", "per_class", "groups", "shots", "ece", "confusion"}
        assert len(part["per_class"]) == 10 and set(part["groups"]) == {"head", "medium", "tail"}
        # The sets are balanced: each image was counted once, on eight devices with a padded batch.
        assert part["all"] == pytest.approx(np.mean(part["per_class"]))
    mass = results["teacher"]["group_mass"]
    assert all(sum(mass[kind].values()) == pytest.approx(1) for kind in ("long_tailed", "balanced"))
    assert results["teacher"]["hash"] == checks.teacher_hash(config)
    assert {"device", "precision", "versions", "commit", "timing", "command"} <= set(results)


def test_metrics_are_logged_per_epoch(done):
    _, folder, results = done
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1.0, 2.0, 3.0]
    assert set(lines[0]["terms"]) == {"ce", "inter", "intra"}
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["terms"].values()), rel=1e-4)
    assert lines[-1]["test"]["all"] == results["test"]["all"]


def test_a_hook_hears_of_every_record(tmp_path):
    heard = []
    runs.run(tiny(tmp_path, "ce"), tmp_path / "run", command="the test", on_record=heard.append)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert heard == [json.loads(line) for line in lines] and len(heard) == 3


def test_a_finished_run_is_not_repeated(done):
    config, folder, results = done
    before = (folder / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert run(config, folder / "run") == json.loads(json.dumps(results))
    assert (folder / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_work_directory_of_another_config_is_refused(done):
    config, folder, _ = done
    other = tiny(folder, "kd", seed=5)
    with pytest.raises(checks.ConfigError, match="holds a run of another config .*method"):
        run(other, folder / "run")


def test_a_work_directory_in_use_is_refused(done):
    config, folder, _ = done
    with files.lock(folder / "run" / ".lock"):
        with pytest.raises(checks.ConfigError, match="in use by another run"):
            run(config, folder / "run")


def test_table_and_network_teacher_give_the_same_run(done):
    config, folder, results = done
    assert results["teacher_logits"] == "network"
    other = tiny(folder, **{"teacher.table": "always"})
    assert checks.config_hash(other) == checks.config_hash(config)
    looked_up = run(other, folder / "by_table")
    assert looked_up["teacher_logits"] == "table"
    for name in ("run", "by_table"):
        assert (folder / name / "metrics.jsonl").exists()
    a, b = (json.loads((folder / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("run", "by_table"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.slow
def test_pmap_gives_the_same_run(done):
    _, folder, _ = done
    run(tiny(folder, parallel="pmap"), folder / "pmap")
    a, b = (json.loads((folder / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("run", "pmap"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_teacher_is_shared(done):
    config, folder, results = done
    before = sorted((folder / "teachers").glob("*/results.json"))
    assert [path.parent.name for path in before] == [checks.teacher_hash(config)]
    stamp = before[0].stat().st_mtime_ns
    other = run(tiny(folder, "kd", seed=2), folder / "kd")
    assert other["teacher"] == results["teacher"] and before[0].stat().st_mtime_ns == stamp
    assert not list((folder / "teachers").glob("*.unfinished"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"teacher.model": "resnet14"}, "has model='resnet8', the config wants 'resnet14'"),
        ({"teacher.checkpoint": "/nowhere"}, "holds no finished teacher"),
    ],
)
def test_a_teacher_that_does_not_fit(done, values, message):
    config, folder, _ = done
    own = {"teacher.checkpoint": str(folder / "teachers" / checks.teacher_hash(config))}
    with pytest.raises(checks.ConfigError, match=message):
        teachers.obtain(tiny(folder, "kd", **{**own, **values}), loop.StopRequest())


def test_a_teacher_of_another_class_count(done, tmp_path):
    config, folder, _ = done
    other = tmp_path / "other"
    other.mkdir()
    own = folder / "teachers" / checks.teacher_hash(config) / "results.json"
    (other / "results.json").write_text(json.dumps({**json.loads(own.read_text()), "num_classes": 100}))
    with pytest.raises(checks.ConfigError, match="num_classes=100, the config wants 10"):
        teachers.obtain(tiny(folder, "kd", **{"teacher.checkpoint": str(other)}), loop.StopRequest())


def copy_of_teacher(done, tmp_path):
    """A copy of the finished run's teacher, and a config that uses it."""
    config, folder, _ = done
    place = tmp_path / "teacher"
    shutil.copytree(folder / "teachers" / checks.teacher_hash(config), place)
    return place, tiny(folder, "kd", **{"teacher.checkpoint": str(place)})


def test_a_teacher_whose_last_checkpoint_is_damaged_is_not_replaced_by_an_earlier_one(done, tmp_path):
    place, config = copy_of_teacher(done, tmp_path)
    assert len(Checkpoints(place / "checkpoints").steps()) == 2
    newest = place / "checkpoints" / f"step_{Checkpoints(place / 'checkpoints').steps()[0]}"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(checks.ConfigError, match="last checkpoint in .* is damaged: remove the folder"):
        teachers.obtain(config, loop.StopRequest())
    assert newest.exists()


def test_a_teacher_from_elsewhere_is_part_of_the_identity(done, tmp_path):
    """By what it is, not by where it lies."""
    place, config = copy_of_teacher(done, tmp_path)
    own, there = tiny(tmp_path, "kd"), checks.config_hash(config)
    assert there != checks.config_hash(own)
    assert checks.teacher_hash(config) == checks.teacher_hash(own)
    moved = place.rename(tmp_path / "moved")
    again = tiny(tmp_path, "kd", **{"teacher.checkpoint": str(moved)})
    assert checks.config_hash(again) == there
    results = json.loads((moved / "results.json").read_text())
    (moved / "results.json").write_text(json.dumps({**results, "hash": "another"}))
    assert checks.config_hash(again) != there
    (moved / "results.json").write_text("{")
    with pytest.raises(checks.ConfigError, match="is damaged"):
        checks.config_hash(again)


def test_a_damaged_table_is_built_again(done, tmp_path):
    _, config = copy_of_teacher(done, tmp_path)
    teacher = teachers.obtain(config, loop.StopRequest())
    good = np.array(teacher.table(dataset.load(config).train, loop.StopRequest()))
    (path,) = teacher.folder.glob("table-*.npy")
    for damage in (lambda content: content[:-40] + bytes(40), lambda content: content[:500]):
        path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_array_equal(teacher.table(dataset.load(config).train, loop.StopRequest()), good)


def test_a_table_that_was_stopped_is_gone_on_with(done, tmp_path, monkeypatch):
    _, config = copy_of_teacher(done, tmp_path)
    teacher = teachers.obtain(config, loop.StopRequest())
    good = np.array(teacher.table(dataset.load(config).train, loop.StopRequest()))
    (path,) = teacher.folder.glob("table-*.npy")
    path.unlink()
    monkeypatch.setattr(teachers, "_TABLE_BATCH", 50)
    with pytest.raises(loop.Stopped, match="at 50 of"):
        teacher.table(dataset.load(config).train, loop.StopRequest(deadline=0))
    starts, build_table = [], teacher.teacher_table.build

    def noting(*arguments, start, **keywords):
        starts.append(start)
        build_table(*arguments, start=start, **keywords)

    monkeypatch.setattr(teacher.teacher_table, "build", noting)
    np.testing.assert_allclose(
        teacher.table(dataset.load(config).train, loop.StopRequest()), good, rtol=1e-5, atol=1e-5
    )
    assert starts == [50] and not list(teacher.folder.glob("*.tmp")) and not list(teacher.folder.glob("*.done"))


def test_a_stop_is_heard_while_waiting_for_another_run(tmp_path, capsys):
    config = tiny(tmp_path, "kd")
    lock = (tmp_path / "teachers" / checks.teacher_hash(config)).with_suffix(".lock")
    with files.lock(lock), pytest.raises(loop.Stopped, match="while waiting for the teacher of another run"):
        teachers.obtain(config, loop.StopRequest(deadline=0))
    assert "waiting for the teacher" in capsys.readouterr().err


def test_a_run_that_could_not_start_claims_nothing(tmp_path):
    with pytest.raises(checks.ConfigError):
        run(tiny(tmp_path, "ce", **{"groups.fractions": (0.5, 0.6)}), tmp_path / "run")
    run(tiny(tmp_path, "ce", **{"groups.fractions": (0.5, 0.5), "train.max_steps": 1}), tmp_path / "run")


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_a_damaged_file_of_a_finished_run_is_named(done, tmp_path, name):
    config, folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_text(path.read_text()[:40])
    remedy = "remove it" if name == "results.json" else "give another --workdir, or remove "
    with pytest.raises(checks.ConfigError, match=f"{name} is damaged .*: {remedy}"):
        run(config, tmp_path / "run")


def test_garbage_in_the_metrics_is_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nwhat\n[3]\n\xff\xfe\n{"step": "a"}\n{"step": 2}\n{"step": 3}\n{"ste')
    loop.MetricsLog(path).keep_until(2, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not caplog.text
    loop.MetricsLog(path).keep_until(2, 3)
    assert "metrics.jsonl has 2 of the 3 epochs until step 2" in caplog.text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "config.json").unlink(), "holds a run, and no config.json that says of what: give another"),
        (
            lambda d: (d / "results.json").write_text("{}"),
            r"results.json is damaged \(no result of this config\): remove",
        ),
        (lambda d: (d / "results.json").write_bytes(b"\xff\xfe"), "results.json is damaged .*: remove it"),
        (lambda d: (shutil.rmtree(d), d.write_text("")), "is a file: give --workdir a folder"),
    ],
)
def test_a_work_directory_that_says_not_whose_it_is(done, tmp_path, spoil, message):
    """It is refused, rather than another run's result given out as this one's."""
    config, folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(checks.ConfigError, match=message):
        run(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_lost(tmp_path):
    config = tiny(tmp_path, "ce")
    with pytest.raises(loop.Stopped):
        runs.run(config, tmp_path / "run", command="", deadline=time.monotonic())
    (good,) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    saved = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    program = build.student_program(tiny(tmp_path, "ce", **{"train.lr": 1e30}), "none")
    with pytest.raises(loop.Diverged, match="x: the loss of step .*ce.*last good checkpoint is step") as caught:
        loop.fit(program, program.train_data(None), 0, tmp_path / "run", loop.StopRequest(), config=config, label="x")
    assert f"last good checkpoint is step {good}" in str(caught.value)
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == saved


@pytest.mark.parametrize(
    "method, part",
    [
        ("ce", "params"),
        ("ce", "batch_stats"),
        ("ce", "opt_state"),
        pytest.param("bikd", "meta", marks=pytest.mark.slow),
    ],
)
def test_a_state_that_is_not_finite_stops_the_run_before_anything_is_lost(done, tmp_path, method, part, monkeypatch):
    """Where every loss was finite: at the end of the epoch."""
    _, folder, _ = done
    config = tiny(folder, method, **{"train.epochs": 2.0})
    with pytest.raises(loop.Stopped):
        runs.run(config, tmp_path / "run", command="", deadline=time.monotonic())
    saved = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    program = build.student_program(config, build.teacher_kind(config, dataset.load(config)))
    chunk = program.chunk

    def spoiled(step, state, *rest):
        state = chunk(step, state, *rest)
        leaves, structure = jax.tree.flatten(getattr(state, part))
        largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[largest] = leaves[largest].at[(0,) * leaves[largest].ndim].set(jnp.inf)
        return state._replace(**{part: jax.tree.unflatten(structure, leaves)})

    spoils = program.steps_per_epoch - 1
    monkeypatch.setattr(program, "chunk", lambda step, *rest: (spoiled if step == spoils else chunk)(step, *rest))
    with pytest.raises(loop.Diverged, match=rf"after step {spoils + 1}, .*{part}.* not finite: .* is step 1$"):
        runs.run(config, tmp_path / "run", command="")
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == saved


@pytest.mark.parametrize("damage", ["flip a byte", pytest.param("truncate", marks=pytest.mark.slow), "an empty step"])
def test_from_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(done, tmp_path, damage, caplog):
    """And ends with the same bits."""
    config, folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    newest, older = Checkpoints(checkpoints).steps()
    victim = max(
        (p for p in (checkpoints / f"step_{newest}").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    if damage == "flip a byte":
        content[len(content) // 2] ^= 1
    victim.write_bytes(content[:100] if damage == "truncate" else content)
    if damage == "an empty step":
        shutil.rmtree(checkpoints / f"step_{newest}")
        (checkpoints / f"step_{newest}").mkdir()
    with caplog.at_level("WARNING"):
        resumed = run(config, tmp_path / "run")
    assert f"step_{newest} is damaged or incomplete: passing it over for an older one" in caplog.text
    assert resumed["test"] == done[2]["test"] and parameters(tmp_path / "run") == parameters(folder / "run")


def test_a_table_that_the_disk_does_not_hold(done, tmp_path):
    """An error, where a memory map of a full disk would kill the process; with room it is built."""
    _, config = copy_of_teacher(done, tmp_path)
    teacher = teachers.obtain(config, loop.StopRequest())
    for path in teacher.folder.glob("table-*"):
        path.unlink()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            teacher.table(dataset.load(config).train, loop.StopRequest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert np.isfinite(teacher.table(dataset.load(config).train, loop.StopRequest())).all()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"platform": "gpu"}, "config.platform='gpu' but jax finds 8 × cpu here: install the jax of the machine"),
        ({"platform": "cuda"}, r"config.platform='cuda' must be one of \('', 'cpu', 'gpu', 'tpu'\)"),
        ({"devices": 9}, "config.devices=9 is more than the 8 that there are"),
        ({"train.batch_size": 20}, "train.batch_size=20 must be a multiple of the 8 devices: .* config.devices=5"),
        ({"train.batch_size": 20, "devices": 6}, "multiple of the 6 devices: .* config.devices=5"),
    ],
)
def test_devices_that_are_not_there(tmp_path, values, message):
    with pytest.raises(checks.ConfigError, match=message):
        run(tiny(tmp_path, "ce", **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fewer_devices_give_the_same_run(done, tmp_path):
    _, folder, results = done
    config = tiny(folder, devices=2, platform="cpu")
    fewer = run(config, tmp_path / "run")
    assert build.student_program(config, "network").parallel.num_devices == 2
    a, b = (json.loads((f / "run" / "metrics.jsonl").read_text().splitlines()[0]) for f in (folder, tmp_path))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and fewer["config_hash"] == results["config_hash"]


def test_a_deadline_stops_and_the_next_call_goes_on(done, tmp_path):
    """Stopped at every chunk and resumed each time: the same bits as in one go."""
    config, folder, results = done
    config = tiny(folder, checkpoint_every=100)
    for _ in range(1000):
        try:
            resumed = runs.run(config, tmp_path / "run", command="", deadline=time.monotonic() + 0.01)
            break
        except loop.Stopped:
            pass
    assert resumed["test"] == results["test"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (folder / "run" / "metrics.jsonl").read_text()
    assert parameters(tmp_path / "run") == parameters(folder / "run")
