"""Metrics as TensorBoard events, read back."""

import json

import pytest

from experiments import tensorboard

RECORDS = [
    {
        "step": step,
        "epoch": step / 5,
        "loss": 1 / step,
        "test": {"all": 40.0, "groups": {"tail": 3.0}},
    }
    for step in (5, 10)
]


def work_directory(folder):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in RECORDS)
    )
    return str(folder)


def test_every_number_is_written_once(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    run = work_directory(tmp_path / "run")
    work_directory(tmp_path / "out" / "run")
    for _ in range(2):
        tensorboard.main([run, f"--output={tmp_path / 'out'}"])
    assert "2 epochs" in capsys.readouterr().out
    assert (tmp_path / "out" / "run" / "metrics.jsonl").exists()  # other files stay
    (file,) = (tmp_path / "out" / "run").glob("events*")
    content, values = file.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        values |= {
            (value.tag, event.step): value.simple_value for value in event.summary.value
        }
    assert values["test/groups/tail", 10] == 3.0 and values["loss", 5] == pytest.approx(
        0.2
    )
    assert len(values) == 8


def test_equal_names_are_refused(tmp_path):
    paths = [work_directory(tmp_path / folder / "run") for folder in ("a", "b")]
    with pytest.raises(SystemExit, match="'run'"):
        tensorboard.main([*paths, f"--output={tmp_path / 'out'}"])


def test_without_metrics(tmp_path):
    with pytest.raises(SystemExit, match="no work directory with a metrics.jsonl"):
        tensorboard.main([str(tmp_path)])
