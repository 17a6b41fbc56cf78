"""The charts of a run: the numbers that are plotted, the files that are written, and wrong input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from latentdiff.commands.cli import main
from latentdiff.figures.charts import (
    bins_figure,
    by_bin,
    evenly_chosen,
    loss_figure,
    reconstruction_figure,
    running_mean,
    training_figure,
    wants_log_scale,
)
from latentdiff.figures.grids import MAX_SAMPLES_SIZE, stacked_samples
from latentdiff.training.report import objective_of, read_metrics, write_report

BINS = 3
TRAINING = [
    {"step": step, "loss": 8.0 / step, "grad_norm": 1.0 + step, "lr": 1e-4, "images_per_second": 50.0, "skipped": 0}
    for step in range(10, 50, 10)
]


def validated(step: int, loss: float, gap: float) -> dict[str, float]:
    """A stage 2 validation; bin b has b more than the mean."""
    values = {"step": step, "validation/loss": loss, "validation/baseline": 4.0, "validation/gap": gap}
    for b in range(BINS):
        values[f"validation/loss_bin_{b:02}"] = loss + b
        values[f"validation/baseline_bin_{b:02}"] = 4.0 + b
        values[f"validation/gap_bin_{b:02}"] = gap + b
    return values


STAGE_2 = [validated(0, 4.0, 0.0), *TRAINING, *(validated(step, 1.0 / step, step / 1e4) for step in (10, 20, 30, 40))]
STAGE_1 = [
    *({**line, "reconstruction": line["loss"] / 2, "kl": 0.1} for line in TRAINING),
    *(
        {"step": step, "validation/mse": 0.1, "validation/psnr": 5.0 + step, "validation/ssim": 0.5, "validation/kl": 9}
        for step in (0, 20, 40)
    ),
]


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


def plotted(ax: Axes) -> dict[str, list[list[float]]]:
    """The points of each named line."""
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_metrics_are_read_by_key(tmp_path: Path) -> None:
    """NaN, infinity, null and text are left out; the later of two counts; the last line may be cut off."""
    lines = [
        *({"step": 20, "loss": 2.0}, {"step": 10, "loss": 1.0, "lr": 0.5}, {"step": 30, "loss": math.nan}),
        *({"step": 40, "loss": math.inf, "lr": None}, {"step": 50, "lr": "high"}, {"step": 20, "loss": 3}),
    ]
    run = write_run(tmp_path, lines, '{"step": 60, "lo')
    assert read_metrics(run / "metrics.jsonl") == {"loss": {10: 1.0, 20: 3}, "lr": {10: 0.5}}
    assert list(read_metrics(run / "metrics.jsonl")["loss"]) == [10, 20]


def test_running_mean_is_centred() -> None:
    """200 values: windows of 11, which shrink to the value itself at both ends."""
    values = np.random.default_rng(0).normal(size=200)
    means = running_mean({10 * i: float(value) for i, value in enumerate(values)})
    assert means[1000] == pytest.approx(values[95:106].mean())
    assert means[20] == pytest.approx(values[0:5].mean())
    assert means[0] == pytest.approx(values[0]) and means[1990] == pytest.approx(values[199])
    # A straight line is its own mean everywhere, so nothing lags behind.
    line = {step: 3.0 * step for step in range(200)}
    assert running_mean(line) == pytest.approx(line)
    assert running_mean({}) == {} and running_mean({7: 1.5}) == {7: 1.5}


def test_values_by_bin() -> None:
    metrics = {
        **{"validation/loss": {0: 9.0}, "validation/loss_bin_00": {0: 1.0, 5: 2.0}, "validation/loss_bin_01": {5: 3.0}},
        **{"validation/train/loss_bin_00": {0: 7.0}, "validation/gap_bin_00": {0: 8.0}},
    }
    assert by_bin(metrics, "validation/loss") == {0: [1.0, pytest.approx(math.nan, nan_ok=True)], 5: [2.0, 3.0]}
    assert by_bin(metrics, "validation/baseline") == {}


def test_evenly_chosen() -> None:
    assert evenly_chosen(range(21), 3) == [0, 10, 20]
    assert evenly_chosen("abcd", 3) == ["a", "c", "d"]
    assert evenly_chosen("ab", 3) == ["a", "b"]
    chosen = evenly_chosen(range(100), 12)
    assert len(chosen) == 12 and set(np.diff(chosen)) == {9} and chosen[-1] == 99


def test_log_scale() -> None:
    assert wants_log_scale([1.0, 6.0]) and wants_log_scale([1.0], [6.0, math.nan])
    assert not wants_log_scale([1.0, 4.0]) and not wants_log_scale([0.0, 6.0]) and not wants_log_scale([], [math.nan])


# ----------------------------------------------------------------------------------------------------------------------
# Charts


def test_loss_chart(tmp_path: Path) -> None:
    figure = loss_figure(read_metrics(write_run(tmp_path, [*STAGE_2, validated(50, 0.5, 0.125)]) / "metrics.jsonl"))
    (ax,) = figure.axes
    lines = plotted(ax)
    assert lines["training"] == [[10, 0.8], [20, 0.4], [30, pytest.approx(8 / 30)], [40, 0.2]]
    assert lines["training, running mean"] == pytest.approx(np.array(lines["training"]))  # too few to be averaged
    held_out = [[0, 4], [10, 0.1], [20, 0.05], [30, pytest.approx(1 / 30)], [40, 0.025], [50, 0.5]]
    assert lines["held-out images"] == held_out
    assert lines["constant predictor"] == [[step, 4.0] for step in range(0, 60, 10)]
    validated_alike = lines["training images, validated alike"]
    assert validated_alike[0] == [0, 4] and validated_alike[-1] == [50, 0.375] and len(validated_alike) == 6
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "optimiser step"


def test_bins_chart(tmp_path: Path) -> None:
    """First, middle and last validation, over the middles of three bins; the gap by bin and over the steps."""
    figure = bins_figure(read_metrics(write_run(tmp_path, STAGE_2) / "metrics.jsonl"))
    losses, gaps, gap = figure.axes
    middles = [1 / 6, 3 / 6, 5 / 6]
    assert list(plotted(losses)) == ["step 0", "step 20", "step 40", "constant predictor"]
    assert np.array(plotted(losses)["step 20"]).T == pytest.approx(np.array([middles, [0.05, 1.05, 2.05]]))
    assert np.array(plotted(losses)["constant predictor"]).T == pytest.approx(np.array([middles, [4, 5, 6]]))
    assert np.array(plotted(gaps)["step 40"]).T == pytest.approx(np.array([middles, [0.004, 1.004, 2.004]]))
    assert gap.lines[0].get_xydata().tolist() == [[0, 0], [10, 0.001], [20, 0.002], [30, 0.003], [40, 0.004]]


def test_bins_chart_without_training_images(tmp_path: Path) -> None:
    lines = [{key: value for key, value in validated(0, 1.0, 0.0).items() if "gap" not in key}]
    figure = bins_figure(read_metrics(write_run(tmp_path, lines) / "metrics.jsonl"))
    assert [list(plotted(ax)) for ax in figure.axes] == [["step 0", "constant predictor"]]


def test_stage_1_charts(tmp_path: Path) -> None:
    metrics = read_metrics(write_run(tmp_path, STAGE_1) / "metrics.jsonl")
    _, parts = loss_figure(metrics).axes
    assert plotted(parts)["reconstruction"] == pytest.approx(np.array([[s, 4 / s] for s in (10, 20, 30, 40)]))
    psnr, ssim, kl = reconstruction_figure(metrics).axes
    assert psnr.lines[0].get_xydata().tolist() == [[0, 5], [20, 25], [40, 45]]
    assert psnr.get_yscale() == "linear" and psnr.get_ylabel() == "PSNR (dB)"  # dB are logarithms already
    assert (ssim.get_ylabel(), kl.get_ylabel()) == ("SSIM", "KL (nats per image)")
    assert bins_figure(metrics) is None


def test_training_chart(tmp_path: Path) -> None:
    metrics = read_metrics(write_run(tmp_path, TRAINING) / "metrics.jsonl")
    axes = training_figure(metrics).axes
    assert [ax.get_title() for ax in axes] == [
        *("Learning rate", "Gradient norm before clipping", "Speed", "Skipped steps"),
    ]
    assert axes[1].lines[0].get_xydata().tolist() == [[10, 11], [20, 21], [30, 31], [40, 41]]
    del metrics["skipped"]
    assert [ax.get_title() for ax in training_figure(metrics).axes if ax.axison] == [ax.get_title() for ax in axes[:3]]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_stacked_in_order(tmp_path: Path) -> None:
    stack = np.asarray(stacked_samples(write_samples(tmp_path, range(0, 300, 100), size=(52, 40))))
    column = stack[:, -20, 0]  # through the images, right of the labels
    greys = [int(value) for i, value in enumerate(column) if value < 255 and (i == 0 or column[i - 1] != value)]
    assert greys == [0, 1, 2] and [(column == grey).sum() for grey in greys] == [40, 40, 40]
    assert (stack[:, : stack.shape[1] - 52 - 12] < 128).any()  # the steps


def test_many_samples_are_chosen_from(tmp_path: Path) -> None:
    stack = np.asarray(stacked_samples(write_samples(tmp_path, range(0, 3100, 100))))
    greys = set(stack[:, -20, 0].tolist()) - {255}
    assert len(greys) == 12 and min(greys) == 0 and max(greys) == 30


def test_large_samples_are_scaled_down(tmp_path: Path) -> None:
    stack = stacked_samples(write_samples(tmp_path, range(0, 300, 100), size=(4000, 500)))
    assert stack.width == MAX_SAMPLES_SIZE[0]
    # Three grids of 500 pixels, gaps of 12 and the heading's 36; about 70 beside the grids for the steps.
    assert stack.height == pytest.approx((3 * 512 + 36) * stack.width / 4070, rel=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, STAGE_2, '{"step": 50')
    write_samples(run, range(0, 50, 10))
    main(["report", str(run)])
    names = ["loss.png", "validation_bins.png", "training.png", "samples.png"]
    assert capsys.readouterr().out.splitlines() == [str(run / "report" / name) for name in names]
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(names)
    sizes = [Image.open(run / "report" / name).size for name in names[:3]]
    assert sizes == [(1050, 570), (2250, 570), (1500, 1140)]


def test_report_of_stage_1(tmp_path: Path) -> None:
    run = write_run(tmp_path, STAGE_1)
    assert [path.name for path in write_report(run)] == ["loss.png", "reconstruction.png", "training.png"]
    assert all(Image.open(path).mode == "RGB" for path in (run / "report").iterdir())


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/metrics.jsonl does not exist; give the folder of a run"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"metrics.jsonl has no numbers yet"):
        write_report(write_run(tmp_path / "empty", []))
    with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 is not a JSON object with a "step"'):
        write_report(write_run(tmp_path / "broken", TRAINING[:1], '{"loss": 1}\n{"step": 3, "loss": 1}\n'))
    assert not list(tmp_path.rglob("*.png"))


def test_another_objective_has_an_axis_of_its_own(tmp_path: Path) -> None:
    """Validation is the squared error always: a Huber or weighted loss beside it on one axis would not compare."""
    lines = [{"step": i, "loss": 0.1, "validation/loss": 0.5} for i in range(3)]
    run = write_run(tmp_path, lines)
    metrics = read_metrics(run / "metrics.jsonl")
    assert objective_of(run) == ""  # without a config
    for loss, diffusion, name in [
        ("{error: mse, weighting: constant}", "{offset_noise: 0.0}", ""),
        ("{error: huber, weighting: p2}", "{}", "huber, p2"),
        ("{error: mse, weighting: constant}", "{offset_noise: 0.1}", "offset noise"),
    ]:
        (run / "config.yaml").write_text(f"loss: {loss}\ndiffusion: {diffusion}\n")
        assert objective_of(run) == name
        axes = loss_figure(metrics, name).axes
        titles = [ax.get_title() for ax in axes]
        if name:
            assert titles == ["Validation loss (mean squared error)", f"Training loss ({name})"]
            assert "training" not in plotted(axes[0]) and "training" in plotted(axes[1])
        else:
            assert titles == ["Training and validation loss"] and {"training", "held-out images"} <= set(
                plotted(axes[0])
            )
    (run / "config.yaml").write_text("loss: {kl_weight: 1}\n")  # stage 1
    assert objective_of(run) == ""
