"""What the commands share: the encoding of the console, and their arguments."""

import importlib
import io
import sys

import pytest

from ltkd_jax import console

HOME = "~nobody-here/x"


def test_replaces_what_the_console_lacks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.replace_unencodable()
    print("±1 …", flush=True)
    assert stream.buffer.getvalue() == b"?1 ?\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_other_consoles_are_left_alone(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    console.replace_unencodable()


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("experiments.sweep", ["--methods=ce", f"--data_dir={HOME}"]),
        ("experiments.reproduce", [HOME]),
        ("experiments.reproduce", ["q.json", f"--results={HOME}"]),
        ("experiments.reproduce", ["q.json", f"--runs={HOME}"]),
        ("experiments.reproduce", ["q.json", f"--data_dir={HOME}"]),
        ("experiments.report", [HOME]),
        ("experiments.report", ["runs", f"--output={HOME}"]),
        ("experiments.report", [f"--results={HOME}"]),
        ("experiments.report", ["--results=results", "--queue", HOME]),
        ("experiments.tensorboard", [HOME]),
        ("experiments.tensorboard", ["runs", f"--output={HOME}"]),
        ("experiments.audit.__main__", [f"--logits={HOME}"]),
        ("experiments.audit.__main__", [f"--checkpoint={HOME}"]),
        ("experiments.audit.__main__", ["--logits=a.npz", f"--compare={HOME}"]),
        ("experiments.audit.__main__", ["--logits=a.npz", f"--counts={HOME}"]),
        ("experiments.audit.__main__", ["--logits=a.npz", f"--data_dir={HOME}"]),
        ("experiments.audit.__main__", ["--logits=a.npz", f"--subset={HOME}"]),
        ("experiments.audit.__main__", ["--checkpoint=a", f"--save={HOME}"]),
        ("experiments.audit.__main__", ["--logits=a.npz", f"--output={HOME}"]),
        ("ltkd_jax.data.prepare.__main__", ["cifar10", f"--data_dir={HOME}"]),
        ("ltkd_jax.data.prepare.__main__", ["cifar10", f"--source={HOME}"]),
        ("ltkd_jax.models.convert", ["resnet8", HOME, "out"]),
        ("ltkd_jax.models.convert", ["resnet8", "in", HOME]),
    ],
)
def test_unknown_home_in_arguments(module, arguments, capsys):
    with pytest.raises(SystemExit) as status:
        importlib.import_module(module).main(arguments)
    assert status.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"'{HOME}' is in a home directory that is not known" in error


def test_home_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert console.path_argument("~/x") == "/users/me/x"
    assert console.path_argument("") == ""


@pytest.mark.parametrize("number", ["0", "auto", "-1", "1.5"])
@pytest.mark.parametrize(
    "module, arguments, flag",
    [
        ("experiments.reproduce", ["q.json"], "--num_workers"),
        ("experiments.sweep", ["--methods=ce"], "--seeds"),
        ("experiments.predict", ["run", "a.png"], "--top"),
        ("experiments.benchmark.__main__", ["train"], "--steps"),
    ],
)
def test_numbers_in_arguments(module, arguments, flag, number, capsys):
    with pytest.raises(SystemExit) as status:
        importlib.import_module(module).main([*arguments, f"{flag}={number}"])
    assert status.value.code == 2
    message = f"argument {flag}: '{number}' must be a whole number of at least 1"
    assert message in capsys.readouterr().err


def test_least_number_is_allowed():
    assert console.at_least(0)("0") == 0
    assert console.at_least(3)("3") == 3
