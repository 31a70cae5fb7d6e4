"""The notebook: executed from its first cell to the report, in an environment of its own."""

import html
import json
import os
import subprocess
import sys

import pytest
from helpers.small_runs import ROOT

NOTEBOOK = ROOT / "experiments" / "colab_tpu.ipynb"


def test_it_is_committed_without_outputs_and_names_a_config_that_is_there():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    settings = {}
    exec(code[0], settings)
    assert (ROOT / settings["CONFIG"].partition(":")[0]).exists() and settings["REPOSITORY"] == ""
    for text in code:
        compile(text, str(NOTEBOOK), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "in the checkout"])
def test_it_installs_trains_and_shows_the_report(tmp_path, where, monkeypatch):
    """As in Colab: nothing is installed but Jupyter, and the project is cloned; or it lies in a checkout."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    if not (ROOT / ".git").exists():
        pytest.skip("the project is cloned from its git repository, and this is none")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
    subprocess.run([python, "-m", "ipykernel", "install", "--prefix", tmp_path / "env", "--name", "fresh"], check=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "env" / "share" / "jupyter"))
    monkeypatch.setenv("LTKD_CACHE", os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache")))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = tmp_path / "colab"
    if where == "elsewhere":
        place.mkdir()
        setting = notebook.cells[1]
        setting.source = setting.source.replace('REPOSITORY = ""', f"REPOSITORY = {f'file://{ROOT}'!r}")
    else:
        subprocess.run(["git", "clone", "--quiet", ROOT, place], check=True)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="fresh", resources={"metadata": {"path": str(place)}}
    )
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "ltkd classifies" in printed and "CpuDevice" in printed
    shown = html.unescape(notebook.cells[-2].outputs[0]["data"]["text/html"])
    assert shown.startswith("<iframe") and "digits" in shown and shown.count("<svg") > 3
