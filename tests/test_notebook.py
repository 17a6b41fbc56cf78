"""docs/notebooks: the notebook for learners is whole, and runs from top to bottom."""

import json
import os
import re
from pathlib import Path

import pytest
from scripts import ROOT
from typer.main import get_command

from latentdiff.commands.cli import app

NOTEBOOK = ROOT / "docs/notebooks/diffusion_from_scratch.ipynb"
MAX_BYTES = 1_500_000
# What the notebook computed, printed by a cell that the test adds.
REPORT = """
import json
print(json.dumps({
    "untrained": untrained.mean().item(),
    "final_loss": final_loss,
    "network_new": new_with_caption.mean().item(),
    "single_pixels": pixel_baseline.mean().item(),
    "copies_differ": difference.max().item(),
    "held_out_right": held_out_right,
    "psnr": psnr.tolist(),
}))
"""


def cells(kind: str) -> list[dict]:
    """The committed notebook's cells of a kind."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text_of(kind: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(kind))


def test_committed_notebook_is_valid() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


def test_committed_notebook_was_run_in_order_without_error() -> None:
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 14


def test_committed_notebook_holds_nothing_of_the_machine_it_ran_on() -> None:
    raw = NOTEBOOK.read_text(encoding="utf-8")
    assert len(raw.encode()) < MAX_BYTES
    without_images = re.sub(r'"image/png": "[^"]*"', "", raw)
    assert not re.search(r"/(home|root|Users|work|tmp|usr|opt|mnt)/|[A-Z]:\\\\", without_images)
    assert all("execution" not in cell["metadata"] for cell in cells("code"))  # times
    assert not re.search(r"pip install|urlopen|requests|hf_hub_download", text_of("code"))


def test_files_and_commands_that_the_text_names_exist() -> None:
    text = text_of("markdown")
    named = re.findall(r"`((?:latentdiff|docs|saved)/[^`]*|train_\w+\.py)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    commands = re.findall(r"`latentdiff ([a-z-]+) ", text)
    assert commands and set(commands) <= set(getattr(get_command(app), "commands"))  # noqa: B009 (a click group)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    # From a folder of the repository that is not the notebook's; a cell's error fails the test.
    resources = {"metadata": {"path": str(ROOT / "tests")}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    numbers = json.loads(notebook.cells[-1].outputs[0].text)
    assert numbers["untrained"] == pytest.approx(0.681, abs=0.02)
    assert numbers["single_pixels"] == pytest.approx(0.412, abs=0.001)
    assert numbers["final_loss"] < 0.1
    assert numbers["network_new"] < 0.12
    assert numbers["copies_differ"] < 1e-3
    assert numbers["held_out_right"] >= 20  # of 24
    assert min(numbers["psnr"]) > 22 and max(numbers["psnr"]) > 28
