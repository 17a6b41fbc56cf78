"""The report of a run: reading its metrics, the files that are written, and wrong input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from metric_lines import STAGE_1, STAGE_2, TRAINING
from PIL import Image
from scripts import ROOT

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.training.report import MAX_SAMPLES_SIZE, objective_of, read_metrics, stacked_samples, write_report


def write_run(run: Path, lines: list[dict], rest: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return run


def write_samples(run: Path, steps: range, size: tuple[int, int] = (52, 16)) -> list[Path]:
    """Grids of one grey each, the darker the earlier."""
    (run / "samples").mkdir(parents=True, exist_ok=True)
    paths = [run / "samples" / f"step_{step:08d}.png" for step in steps]
    for i, path in enumerate(paths):
        Image.new("RGB", size, (i, i, i)).save(path)
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_metrics_are_read_by_key(tmp_path: Path) -> None:
    """NaN, infinity, null and text are skipped; of two the later counts; the last line may be cut off."""
    lines = [
        *({"step": 20, "loss": 2.0}, {"step": 10, "loss": 1.0, "lr": 0.5}, {"step": 30, "loss": math.nan}),
        *({"step": 40, "loss": math.inf, "lr": None}, {"step": 50, "lr": "high"}, {"step": 20, "loss": 3}),
    ]
    run = write_run(tmp_path, lines, '{"step": 60, "lo')
    assert read_metrics(run / "metrics.jsonl") == {"loss": {10: 1.0, 20: 3}, "lr": {10: 0.5}}
    assert list(read_metrics(run / "metrics.jsonl")["loss"]) == [10, 20]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_stacked_in_order(tmp_path: Path) -> None:
    stack = np.asarray(stacked_samples(write_samples(tmp_path, range(0, 300, 100), size=(52, 40))))
    column = stack[:, -20, 0]  # through the images, right of the labels
    greys = [int(value) for i, value in enumerate(column) if value < 255 and (i == 0 or column[i - 1] != value)]
    assert greys == [0, 1, 2] and [(column == grey).sum() for grey in greys] == [40, 40, 40]
    assert (stack[:, : stack.shape[1] - 52 - 12] < 128).any()  # the steps


def test_samples_are_chosen_from_many(tmp_path: Path) -> None:
    stack = np.asarray(stacked_samples(write_samples(tmp_path, range(0, 3100, 100))))
    greys = set(stack[:, -20, 0].tolist()) - {255}
    assert len(greys) == 12 and min(greys) == 0 and max(greys) == 30


def test_large_samples_are_scaled_down(tmp_path: Path) -> None:
    stack = stacked_samples(write_samples(tmp_path, range(0, 300, 100), size=(4000, 500)))
    assert stack.width == MAX_SAMPLES_SIZE[0]
    # Three grids of 500 pixels and four gaps of 6; about 70 pixels beside the grids for the steps.
    assert stack.height == pytest.approx((3 * 506 + 6) * stack.width / 4070, rel=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, STAGE_2, '{"step": 50')
    write_samples(run, range(0, 50, 10))
    main(["report", str(run)])
    names = ["loss.png", "validation_bins.png", "training.png", "samples.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [*(str(run / "report" / name) for name in names), str(run / "index.html")]
    assert lines[-1].startswith("Learning. The validation loss has fallen from 4 at step 0 to 0.025 at step 40")
    assert "Learning." in (run / "index.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(names)
    sizes = [Image.open(run / "report" / name).size for name in names[:3]]
    assert sizes == [(1050, 570), (2250, 570), (1500, 1140)]


def test_report_of_stage_1_has_its_charts(tmp_path: Path) -> None:
    run = write_run(tmp_path, STAGE_1)
    assert [path.name for path in write_report(run)] == ["loss.png", "reconstruction.png", "training.png"]
    assert all(Image.open(path).mode == "RGB" for path in (run / "report").iterdir())


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/metrics.jsonl does not exist; give the folder of a run"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"metrics.jsonl has no numbers yet"):
        write_report(write_run(tmp_path / "empty", []))
    with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 is not a JSON object with a "step"'):
        write_report(write_run(tmp_path / "broken", TRAINING[:1], '{"loss": 1}\n{"step": 3, "loss": 1}\n'))
    assert not list(tmp_path.rglob("*.png"))


def test_objective_is_named_unless_validation_measures_it(tmp_path: Path) -> None:
    assert objective_of(tmp_path) == ""  # without a config
    for overrides, name in [
        ([], ""),
        (["loss.loss_type=huber", "loss.weighting=p2"], "huber, p2"),
        (["train.offset_noise=0.1"], "offset noise"),
    ]:
        config = load_config(UNetTrainingConfig, ROOT / "configs/demo/unet.yaml", overrides)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert objective_of(tmp_path) == name
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(VAETrainingConfig, ROOT / "configs/demo/vae.yaml")))
    assert objective_of(tmp_path) == ""  # stage 1
