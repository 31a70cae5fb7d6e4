"""A newcomer's walk: the README's commands in their order, in a fresh clone."""

import os
import re

import pytest
from helpers import environments
from helpers.environments import ROOT

SHELL = "\n".join(
    re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
)
COMMANDS = [
    line.partition("  #")[0].strip() for line in SHELL.splitlines() if line.strip()
]


def shortened(command):
    """Returns the command with less to train; `make test` runs this file, and `make docs` is run by test_docs.py."""
    if command in ("make test", "make docs"):
        return f"{command} --dry-run"
    if "experiments.reproduce" in command:
        return f"{command} --list"
    if "experiments.main" in command and "smoke" not in command:
        return (
            f"{command} --config.train.max_steps=5 --config.teacher.train.max_steps=5"
        )
    command = command.replace(
        "digitslt.py --methods=ce,kd,ltkd,bikd", "digitslt.py:smoke --methods=ce,ltkd"
    )
    return command.replace("--imbalance=10,100", "--imbalance=10").replace(
        "--seeds=3", "--seeds=1"
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with an environment that has the packages already; its first `make` installs the clone there."""
    folder = tmp_path_factory.mktemp("walk") / "ltkd_jax"
    environments.run("git", "clone", "--quiet", ROOT, folder)
    environments.create(folder / ".venv")
    return folder


def walk(clone, commands):
    path = f"{clone}/.venv/bin:{os.environ['PATH']}"
    for command in commands:
        environments.run("bash", "-c", command, cwd=clone, PATH=path)


def test_readmes_commands_in_order(clone):
    queue = clone / "experiments" / "queues" / "demo.json"
    text = queue.read_text()
    queue.write_text(
        re.sub(
            r'"(configs/\w+\.py:\w+)", "seeds": \[0, 1, 2\]',
            r'"\1,smoke", "seeds": [0]',
            text,
        )
    )
    walk(clone, ["make demo"])
    queue.write_text(text)
    walk(
        clone,
        [
            shortened(command)
            for command in COMMANDS
            if "DIR" not in command and command != "make demo"
        ],
    )
    for page in (
        "runs/demo/report.html",
        "runs/sweep-digitslt/report.html",
        "runs/audit.html",
    ):
        assert (clone / page).stat().st_size > 5_000, page
    # The results page is what its files and queues say.
    assert not environments.run("git", "status", "--porcelain", cwd=clone)


def test_readmes_commands_with_data(clone, cifar100_dir):
    """Of the runs the smoke run; the arguments of the others are loaded by tests/unit/test_docs.py."""
    commands = [
        command.replace("DIR", cifar100_dir) for command in COMMANDS if "DIR" in command
    ]
    walk(
        clone,
        [
            shortened(command)
            for command in commands
            if "main" not in command or "smoke" in command
        ],
    )
