"""A newcomer's walk: the README's commands in their order, in a fresh clone.

What they would train is made short by `shortened`; all of them write what they would write.
"""

import re
import shlex

from conftest import _data_dir
from helpers import environments
from helpers.small_runs import ROOT

README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.partition("  #")[0].strip() for line in SHELL.splitlines() if line.strip()]
STEPS = " --config.train.max_steps=5 --config.teacher.train.max_steps=5"
PAGES = ("runs/demo/report.html", "runs/sweep-digitslt/report.html", "runs/audit.html")


def shortened(command):
    """Returns the command with less to train, or None where another test runs the same.

    `make test` is what runs this file, `make docs` is run by test_docs.py; every argument of a config is loaded by
    tests/unit/test_docs.py, and one config of real data is run here.
    """
    if command in ("make test", "make docs"):
        return f"{command} --dry-run"
    if "cifar100" in command:
        return command if "smoke" in command or "prepare" in command else None
    if "experiments.main" in command:
        return command + STEPS
    if "experiments.sweep" in command:
        command = command.replace("digitslt.py", "digitslt.py:smoke").replace("--methods=ce,kd,ltkd,bikd", "--methods=ce,ltkd")
        return command.replace("--imbalance=10,100", "--imbalance=10").replace("--seeds=3", "--seeds=1")
    if "experiments.reproduce" in command:
        return command + " --list"
    return command


def test_readme_names_every_program():
    programs = {word for command in COMMANDS for word in shlex.split(command)}
    assert {"demo", *(f"experiments.{name}" for name in ("main", "sweep", "report", "audit", "reproduce"))} <= programs
    assert {shlex.split(command)[0] for command in COMMANDS} == {"make", "python"}


def test_readmes_commands_in_order(tmp_path):
    """The first `make` installs the clone into an environment that has the packages already."""
    clone, data_dir = environments.clone(tmp_path / "ltkd_jax"), _data_dir()
    python = environments.create(clone / ".venv")
    path = f"{python.parent}:/usr/bin:/bin"
    queue = clone / "experiments" / "queues" / "demo.json"
    demo = queue.read_text()
    queue.write_text(re.sub(r'"(configs/\w+\.py:\w+)", "seeds": \[0, 1, 2\]', r'"\1,smoke", "seeds": [0]', demo))
    for command in COMMANDS:
        command = shortened(command)
        if command and (data_dir or "DIR" not in command):
            environments.run("bash", "-c", command.replace("DIR", str(data_dir)), cwd=clone, PATH=path)
        queue.write_text(demo)
    for page in PAGES:
        assert (clone / page).stat().st_size > 5_000, page
    # The results page is what its files and queues say.
    assert not environments.run("git", "status", "--porcelain", cwd=clone)
