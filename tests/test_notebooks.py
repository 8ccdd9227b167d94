"""The notebooks run from top to bottom, on a small study or on published runs, and committed outputs are real ones."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from commandline import ROOT, Finished
from nbclient import NotebookClient

from tests.analysis.sweeps import write_sweeps

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DATA = Path(os.environ.get("ESCALA_DATA", ROOT.parent / "shared" / "data")).resolve()
"""Published tables, which are not part of the project."""


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweeps(tmp_path_factory.mktemp("sweeps") / "store")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(
    path: Path, finished: Finished, sweeps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESCALA_STUDY", "tiny")
    monkeypatch.setenv("ESCALA_STORE", str(sweeps if "sensitivity" in path.stem else finished.store))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("ESCALA_DATA", str(DATA))
    notebook = nbformat.read(path, as_version=4)
    if "ESCALA_DATA" in nbformat.writes(notebook) and not DATA.is_dir():
        pytest.skip(f"the published runs that it reads are not here: {DATA} (set ESCALA_DATA to their folder)")
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_its_outputs_and_pictures(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed once, in order"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert not [table for table in tables if re.search(r"\bnan\b", table)], "what is not known is a dash"
    text = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|tmp|Users)/", text), "a path of somebody's machine"
