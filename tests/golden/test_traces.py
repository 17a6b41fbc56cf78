"""Both stages train as recorded: a refactoring changes no bit, another platform only the rounding."""

from pathlib import Path

import pytest
from golden.traces import platform, recorded, trace


@pytest.mark.runs
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_ten_steps_equal_the_recorded_ones(stage: str, tmp_path: Path) -> None:
    measured = trace(stage, tmp_path)
    for old in recorded(stage):
        for name, values in measured.items():
            assert len(values) == len(old[name]) == 10
            if old["platform"] == platform():
                assert values == old[name], name
            else:
                assert values == pytest.approx(old[name], rel=1e-4), name
