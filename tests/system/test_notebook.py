"""The Colab notebook runs from its first cell to the report."""

import html

import nbclient
import nbformat
import pytest
from helpers import environments
from helpers.environments import ROOT

NOTEBOOK = ROOT / "experiments" / "colab_tpu.ipynb"


def test_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    settings = {}
    exec(cells[0].source, settings)
    config_file, _, _ = settings["CONFIG"].partition(":")
    assert (ROOT / config_file).exists()
    assert settings["REPOSITORY"] == ""


def test_it_installs_trains_and_shows_the_report(tmp_path, monkeypatch):
    """Clones and installs the project; in the clone, the install cell finds it."""
    if not (ROOT / ".git").exists():
        pytest.skip("the notebook clones a git repository; this is not one")
    python = environments.create(tmp_path / "env")
    prefix = python.parent.parent
    environments.run(
        python, "-m", "ipykernel", "install", "--prefix", prefix, "--name", "fresh"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(prefix / "share" / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = notebook.cells[1]
    install = notebook.cells[3]
    repository = f"REPOSITORY = 'file://{ROOT}'"
    settings.source = settings.source.replace('REPOSITORY = ""', repository)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="fresh", resources=resources
    )
    client.execute(env=environments.isolated_variables())
    outputs = []
    for cell in notebook.cells:
        outputs += cell.get("outputs", [])
    text = "".join(output.get("text", "") for output in outputs)
    assert "ltkd classifies" in text
    assert "CpuDevice" in text
    report = html.unescape(notebook.cells[-2].outputs[0]["data"]["text/html"])
    assert report.startswith("<iframe")
    assert "digits" in report
    assert report.count("<svg") > 3
    checkout = tmp_path / "ltkd_jax"
    code = 'REPOSITORY = ""\n' + install.source
    printed = environments.run(python, "-c", code, cwd=checkout / "experiments")
    assert printed.split()[0] == str(checkout)
