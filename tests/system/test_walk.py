"""Runs the README's commands in their order, in a fresh clone, as a new user would."""

import os
import re
import shutil

import pytest
from helpers import environments
from helpers.environments import ROOT

README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
# Without comments, which follow a command after two spaces.
COMMANDS = [
    line.partition("  #")[0].strip() for line in SHELL.splitlines() if line.strip()
]


def shortened(command):
    """Returns the command with less to train."""
    # `make test` would run for minutes, and test_docs.py runs `make docs`.
    if command in ("make test", "make docs"):
        return f"{command} --dry-run"
    # The clone's environment has pip only as a module.
    if command.startswith("pip "):
        return f"python -m {command}"
    if "experiments.reproduce" in command:
        return f"{command} --list"
    if "experiments.main" in command and "smoke" not in command:
        limits = "--config.train.max_steps=5 --config.teacher.train.max_steps=5"
        return f"{command} {limits}"
    for text, shorter in (
        (
            "digitslt.py --methods=ce,kd,ltkd,bikd",
            "digitslt.py:smoke --methods=ce,ltkd",
        ),
        ("--imbalance=10,100", "--imbalance=10"),
        ("--seeds=3", "--seeds=1"),
    ):
        command = command.replace(text, shorter)
    return command


def is_run(command):
    """Returns whether a command on the real data is run: of `main`, only `smoke` is.

    tests/unit/test_docs.py checks the arguments of the others.
    """
    return "main" not in command or "smoke" in command


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Returns a clone whose environment has the packages already.

    The first `make` installs the clone itself there.
    """
    folder = tmp_path_factory.mktemp("walk") / "ltkd_jax"
    environments.run("git", "clone", "--quiet", ROOT, folder)
    environments.create(folder / ".venv")
    return folder


def run_all(clone, commands):
    # As in an activated environment.
    path = f"{clone}/.venv/bin:{os.environ['PATH']}"
    for command in commands:
        environments.run("bash", "-c", command, cwd=clone, PATH=path)


def test_readme_commands(clone):
    queue = clone / "experiments" / "queues" / "demo.json"
    text = queue.read_text()
    # The demo would train for minutes: its queue is shortened, and restored below.
    smoke_queue = re.sub(
        r'"(configs/\w+\.py:\w+)", "seeds": \[0, 1, 2\]',
        r'"\1,smoke", "seeds": [0]',
        text,
    )
    queue.write_text(smoke_queue)
    run_all(clone, ["make demo"])
    queue.write_text(text)
    # A stand-in for the results of LTKD's table, which takes a GPU to train.
    shutil.copytree(clone / "results", clone / "runs" / "core" / "results")
    (clone / "runs" / "core" / "results" / "README.md").unlink()
    commands = [
        shortened(command)
        for command in COMMANDS
        if "DIR" not in command and command != "make demo"
    ]
    run_all(clone, commands)
    for page in (
        "runs/demo/report.html",
        "runs/sweep-digitslt/report.html",
        "runs/audit.html",
        "runs/core/results/README.md",
    ):
        assert (clone / page).stat().st_size > 5_000, page
    # The committed page agrees with the committed results.
    run_all(
        clone,
        ["python -m experiments.report --results=results --queue experiments/queues/*"],
    )
    assert not environments.run("git", "status", "--porcelain", cwd=clone)


def test_readme_commands_with_data(clone, cifar100_dir):
    commands = [
        command.replace("DIR", cifar100_dir) for command in COMMANDS if "DIR" in command
    ]
    run_all(clone, [shortened(command) for command in commands if is_run(command)])
