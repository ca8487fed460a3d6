"""Every notebook runs from top to bottom, and is kept without its outputs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def short_sweep(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep of the notebook on sweeps, by its own command, but of a few steps."""
    if "02_rank_sweep-" not in f"{request.node.callspec.id}-" or "top_to_bottom" not in request.node.name:
        return
    [command] = re.findall(r'sweep = "(-m [^"]+)"', NOTEBOOKS[1].read_text().replace('\\"', '"'))
    few = "trainer.max_steps=5 data.batch_size=4 data.limit=300 task.eval_examples=8 task.generate_examples=2"
    few += f" task.samples=0 task.retention_path={tmp_path}/general.txt"
    (tmp_path / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    folder = tmp_path / "a-short-sweep"
    subprocess.run(
        [sys.executable, "-m", "lorafit.train", *command.split(), *few.split(), f"hydra.sweep.dir={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    monkeypatch.setenv("LORAFIT_SWEEP", str(folder))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
