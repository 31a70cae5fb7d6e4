"""The notebook: executed from its first cell to the report, as in Colab."""

import html

import nbclient
import nbformat
import pytest
from helpers import environments
from helpers.environments import ROOT

NOTEBOOK = ROOT / "experiments" / "colab_tpu.ipynb"


def test_committed_without_outputs():
    cells = [
        cell
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "code"
    ]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    settings = {}
    exec(cells[0].source, settings)
    assert (ROOT / settings["CONFIG"].partition(":")[0]).exists() and settings[
        "REPOSITORY"
    ] == ""


def test_it_installs_trains_and_shows_the_report(tmp_path, monkeypatch):
    """The project is cloned and installed; in the clone, the cell that installs it finds it."""
    if not (ROOT / ".git").exists():
        pytest.skip("the project is cloned from its git repository, and this is none")
    python = environments.create(tmp_path / "env")
    prefix = python.parent.parent
    environments.run(
        python, "-m", "ipykernel", "install", "--prefix", prefix, "--name", "fresh"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(prefix / "share" / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings, install = notebook.cells[1], notebook.cells[3]
    settings.source = settings.source.replace(
        'REPOSITORY = ""', f"REPOSITORY = 'file://{ROOT}'"
    )
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="fresh", resources=resources
    )
    client.execute(env=environments.isolated_variables())
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "ltkd classifies" in printed and "CpuDevice" in printed
    shown = html.unescape(notebook.cells[-2].outputs[0]["data"]["text/html"])
    assert shown.startswith("<iframe") and "digits" in shown and shown.count("<svg") > 3
    checkout = tmp_path / "ltkd_jax"
    again = environments.run(
        python, "-c", 'REPOSITORY = ""\n' + install.source, cwd=checkout / "experiments"
    )
    assert again.split()[0] == str(checkout)
