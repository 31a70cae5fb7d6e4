"""Metrics as TensorBoard events, read back."""

import json

import pytest

from experiments import tensorboard

RECORDS = [
    {
        "step": step,
        "epoch": step / 5,
        "loss": 1 / step,
        "terms": {"ce": 0.5},
        "test": {"all": 40.0, "groups": {"tail": 3.0}},
    }
    for step in (5, 10)
]


def test_every_number_is_written_once(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (run / "config.json").write_text("{}")
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "results.json").write_text("{}")  # whatever lies there stays
    for _ in range(2):
        tensorboard.main([str(run), f"--out={tmp_path / 'out'}"])
    assert "2 epochs" in capsys.readouterr().out
    assert (tmp_path / "out" / "run" / "results.json").exists()
    (file,) = (tmp_path / "out" / "run").glob("events*")
    content, found = file.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert (
        found["test/groups/tail", 10] == 3.0 and found["terms/ce", 5] == 0.5 and found["loss", 5] == pytest.approx(0.2)
    )
    assert len(found) == 10


def test_two_runs_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True)
        (tmp_path / folder / "run" / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(SystemExit, match="several runs are called 'run'"):
        tensorboard.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'out'}"])


def test_what_has_no_metrics_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no work directory with a metrics.jsonl"):
        tensorboard.main([str(tmp_path)])
