"""A newcomer's walk: a fresh clone, then the README's commands in their order, as they stand there.

Only what takes hours on an accelerator is shortened, by `shortened`, and the test suite is collected, not run.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]


def shortened(command):
    """The command, made short where it trains at real size: smoke runs, and a minute of a queue."""
    if "experiments.main" in command and "cifar100lt" in command and "smoke" not in command:
        command = re.sub(r"(--config=\S+)", r"\1,smoke", command)
    if "experiments.sweep" in command:
        command = command.replace("configs/digitslt.py", "configs/digitslt.py:smoke")
    return re.sub(r"--minutes=\d+", "--minutes=1", command)


def test_the_walk_meets_the_readmes_commands():
    programs = {word for command in COMMANDS for word in re.findall(r"-m (\S+)|make (\S+)", command) for word in word}
    assert {"experiments.main", "experiments.sweep", "experiments.audit", "experiments.reproduce", "demo"} <= programs
    assert all(shlex.split(command)[0] in ("make", "python") for command in COMMANDS)
    changed = [command for command in COMMANDS if shortened(command) != command]
    assert len(changed) < len(COMMANDS) / 2


@pytest.mark.slow
def test_a_newcomer_runs_every_command_of_the_readme(tmp_path, cifar100_dir):
    """An hour's walk in some twenty minutes; the first command makes the environment that the others run in."""
    clone = tmp_path / "ltkd_jax"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH", "LTKD_CACHE")}
    environment = {**clean, "PYTHON": sys.executable, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
    for command in COMMANDS:
        collect = {"PYTEST_ADDOPTS": "--collect-only -q"} if command.startswith("make test") else {}
        done = subprocess.run(
            shortened(command).replace("DIR", str(cifar100_dir)),
            shell=True, cwd=clone, env=environment | collect, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for page in (
        "runs/demo/report.html",
        "runs/sweep-digitslt/report.html",
        "runs/audit.html",
        "docs/_build/html/index.html",
    ):
        assert (clone / page).stat().st_size > 5_000, page
    # The results page is what its files and queues say.
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert not changed.stdout, changed.stdout
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    for block in blocks:
        subprocess.run([clone / ".venv/bin/python", "-c", block], cwd=tmp_path, env=environment, check=True)
