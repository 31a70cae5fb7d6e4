"""The commands on a console that is not UTF-8: nothing is lost, and pages are UTF-8."""

import json
import subprocess
import sys

import pytest
from helpers.environments import ROOT, isolated_variables

COMMANDS = [
    "experiments.main",
    "experiments.sweep",
    "experiments.reproduce",
    "experiments.report",
    "experiments.audit",
    "experiments.predict",
    "experiments.tensorboard",
    "experiments.benchmark",
    "ltkd_jax.data.prepare",
    "ltkd_jax.models.convert",
]
# Without the coercion, Python would choose UTF-8 in the C locale.
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
CONSOLES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": ASCII_LOCALE,
}


def run(module, *arguments, cwd=ROOT, code=0, **variables):
    """Runs a command as bytes, checks its exit code, and returns what it printed."""
    variables = {"PYTHONPATH": str(ROOT), **variables}
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        cwd=cwd,
        env=isolated_variables(**variables),
    )
    assert process.returncode == code, process.stderr.decode(errors="replace")[-3000:]
    assert b"Traceback" not in process.stderr
    return process.stdout


@pytest.mark.parametrize("module", COMMANDS)
def test_help_in_ascii(module):
    """`--help` of absl ends with 1, that of argparse with 0."""
    code = int(module == "experiments.main")
    text = run(module, "--help", code=code, **ASCII_LOCALE)
    assert module.encode() in text
    text.decode("ascii")


@pytest.mark.parametrize("console", CONSOLES)
def test_sweep(console, tmp_path):
    """The sweep's title, its table and its page have characters beyond ASCII."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    config = "configs/digitslt.py:smoke,train.max_steps=2"
    arguments = [f"--config={config}", "--methods=ce", "--seeds=1", "--name=e"]
    variables = CONSOLES[console]
    text = run("experiments.sweep", *arguments, cwd=tmp_path, **variables)
    assert b"?" in text
    page = (tmp_path / "runs" / "e" / "report.html").read_text(encoding="utf-8")
    assert not page.isascii()
    (result,) = (tmp_path / "runs" / "e" / "results").glob("*.json")
    assert json.loads(result.read_bytes())["test"]
    # The title is decoded in the console's encoding.
    title = "--title=Größe"
    run("experiments.report", "runs/e", title, cwd=tmp_path, **variables)
    (tmp_path / "report.html").read_text(encoding="utf-8")
