"""Both stages train as recorded: a refactoring changes no bit, another platform only the rounding."""

import json
from pathlib import Path

import pytest
from golden.traces import FOLDER, platform, trace


@pytest.mark.runs
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_ten_steps_equal_the_recorded_ones(stage: str, tmp_path: Path) -> None:
    recorded = json.loads((FOLDER / f"{stage}_cpu_fp32.json").read_text(encoding="utf-8"))
    measured = trace(stage, tmp_path)
    for name, values in measured.items():
        assert len(values) == len(recorded[name]) == 10
        if platform() == recorded["platform"]:
            assert values == recorded[name], name
        else:
            assert values == pytest.approx(recorded[name], rel=1e-4), name
