"""benchmarks/gpu.py, which needs a GPU to measure anything, with tiny networks on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ENVIRONMENT, ROOT


@pytest.mark.runs
@pytest.mark.slow
def test_every_part_runs_with_tiny_networks(tmp_path: Path) -> None:
    """Compiled too: about ten minutes on one core. Each part gives its figures, and none fails."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", f"--out={out}"]
    done = subprocess.run([*command, "--seconds=3000"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(line["part"], line["setting"]): line for line in json.loads(out.read_text())}
    assert len(found) == 13
    for weights in ("float32", "bf16"):
        for how in ("off", "blocks", "step"):
            assert found["steps", f"{weights} {how}"]["images/s"] > 0
    assert found["resume", ""]["resumed"] == "bitwise, float32 and bf16 weights"


@pytest.mark.runs
def test_a_failing_part_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    """Without CUDA, or with a time limit that nothing keeps."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "nothing", "--tiny", f"--out={out}"]
    done = subprocess.run([*command, "--parts", "image", "decode"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    results = json.loads(out.read_text())
    assert [line["part"] for line in results] == ["image", "image", "image", "decode"]
    assert all("device" in line["failed"] for line in results)
