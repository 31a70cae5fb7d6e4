"""Metrics as TensorBoard events, read back."""

import json

import pytest

from experiments import tensorboard
from experiments.reporting.tensorboard import scalars

RECORDS = [
    {
        "step": step,
        "epoch": step / 5,
        "loss": 1 / step,
        "test": {"all": 40.0, "groups": {"tail": 3.0}},
    }
    for step in (5, 10)
]


def write_workdir(folder):
    """Writes a work directory and returns its path."""
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def test_names_for_other_trackers():
    """The function that docs/logging.md uses has flat names."""
    assert dict(scalars(RECORDS[0])) == {
        "epoch": 1.0,
        "loss": 0.2,
        "test/all": 40.0,
        "test/groups/tail": 3.0,
    }


def test_written_values(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    workdir = write_workdir(tmp_path / "run")
    output = tmp_path / "out"
    write_workdir(output / "run")
    for _ in range(2):
        tensorboard.main([workdir, f"--output={output}"])
    assert "2 epochs" in capsys.readouterr().out
    # Other files of the folder are kept.
    assert (output / "run" / "metrics.jsonl").exists()
    (file,) = (output / "run").glob("events*")
    content = file.read_bytes()
    values = {}
    # Each event has its size before it and a checksum after each of the two.
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
    assert values["test/groups/tail", 10] == 3.0
    assert values["loss", 5] == pytest.approx(0.2)
    assert len(values) == 8


def test_equal_names(tmp_path):
    workdirs = [write_workdir(tmp_path / folder / "run") for folder in ("a", "b")]
    with pytest.raises(SystemExit, match="'run'"):
        tensorboard.main([*workdirs, f"--output={tmp_path / 'out'}"])


def test_folder_without_metrics(tmp_path):
    with pytest.raises(SystemExit, match="no work directory with a metrics.jsonl"):
        tensorboard.main([str(tmp_path)])
