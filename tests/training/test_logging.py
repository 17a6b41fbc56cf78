"""Logging."""

import json
from pathlib import Path

import pytest
from accelerate import PartialState
from PIL import Image

from latentdiff.training.logging import MetricsLog, ThroughputMeter


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("pending", [True, False])
def test_metrics_log_over_a_resume(tmp_path, accelerator, pending):
    """Lines of later steps go, and the validation at the checkpoint's step if it will be made again."""
    log = MetricsLog(tmp_path, 0, True, accelerator)
    lines = [
        {"step": 0, "validation/loss": 1.0},
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": 0.25},
        {"step": 20, "validation/loss": 0.75, "validation/psnr": 20.0},
        {"step": 30, "loss": 0.125},
    ]
    for line in lines:
        log.write(line["step"], {key: value for key, value in line.items() if key != "step"})
    assert read_log(tmp_path) == lines
    log.write(20, {"published_step": 10})  # at the end of a run of 20 steps: it goes, whether the run goes on or not
    resumed = MetricsLog(tmp_path, 20, pending, accelerator)
    kept = lines[: 3 if pending else 4]
    assert read_log(tmp_path) == kept
    resumed.write(30, {"loss": 0.0625})
    assert read_log(tmp_path) == [*kept, {"step": 30, "loss": 0.0625}]
    MetricsLog(tmp_path, 0, True, accelerator)
    assert read_log(tmp_path) == []


def test_metrics_log_drops_a_line_that_was_cut_off(tmp_path, accelerator):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    MetricsLog(tmp_path, 2, True, accelerator).write(3, {"loss": 1.0})
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]


def test_log_of_another_process_writes_nothing(tmp_path, accelerator):
    PartialState().process_index = 1
    assert not accelerator.is_main_process
    log = MetricsLog(tmp_path, 0, True, accelerator)
    log.write(1, {"loss": 1.0})
    log.write_image(1, Image.new("RGB", (1, 1)))
    assert list(tmp_path.iterdir()) == []


def test_meter():
    meter = ThroughputMeter()
    assert meter.read(now=90.0) is None
    meter.restart(now=100.0)
    meter.add(32)
    meter.add(16)
    assert meter.read(now=104.0) == 12.0
    meter.add(10)
    assert meter.read(now=104.5) == 20.0  # since the last reading
    assert meter.read(now=105.0) is None


def test_meter_counts_the_steps_alone():
    """Not what is before the end of the first step, and not the 7 s between two steps."""
    meter = ThroughputMeter()
    meter.start(now=0.0)
    meter.restart(now=50.0)
    meter.add(8)
    meter.stop(now=51.0)
    meter.stop(now=55.0)
    meter.start(now=58.0)
    meter.start(now=58.5)
    meter.add(8)
    assert meter.read(now=59.0) == 8.0
    meter.add(8)
    assert meter.read(now=63.0) == 2.0
