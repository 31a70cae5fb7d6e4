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
    for _ in range(2):
        tensorboard.main([str(run), f"--out={tmp_path / 'out'}"])
    assert "2 epochs" in capsys.readouterr().out
    (file,) = (tmp_path / "out" / "run").iterdir()
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
