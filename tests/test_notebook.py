"""The demo notebook runs from top to bottom, on the package's model beside the smallest stock one."""

from __future__ import annotations

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "demo.ipynb"
LARGEST = 400_000  # bytes: its outputs are kept small


@pytest.mark.timeout(600)
def test_runs(tiny_en_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAWHISPER_DEMO_STOCK", str(tiny_en_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = "".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    assert "practiced in the very best" in printed
    assert "step 5: loss" in printed
    assert len(nbformat.writes(notebook)) < LARGEST


def test_is_small_as_committed() -> None:
    assert NOTEBOOK.stat().st_size < LARGEST
