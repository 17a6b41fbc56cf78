"""The charts of a run: the numbers that are plotted."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from latentdiff.figures.charts import (
    Series,
    by_bin,
    evenly_chosen,
    loss_figure,
    reconstruction_figure,
    running_mean,
    wants_log_scale,
)


def series(lines: list[dict]) -> dict[str, Series]:
    """The numbers of metrics lines by key."""
    metrics: dict[str, Series] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for key in line.keys() - {"step"}:
            metrics.setdefault(key, {})[line["step"]] = line[key]
    return metrics


def plotted(ax: Axes) -> dict[str, list[list[float]]]:
    """The points of each named line."""
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


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


def test_values_are_grouped_by_bin() -> None:
    metrics = {
        **{"validation/loss": {0: 9.0}, "validation/loss_bin_00": {0: 1.0, 5: 2.0}, "validation/loss_bin_01": {5: 3.0}},
        **{"validation/train/loss_bin_00": {0: 7.0}, "validation/gap_bin_00": {0: 8.0}},
    }
    assert by_bin(metrics, "validation/loss") == {0: [1.0, pytest.approx(math.nan, nan_ok=True)], 5: [2.0, 3.0]}
    assert by_bin(metrics, "validation/baseline") == {}


def test_chosen_items_are_evenly_spaced() -> None:
    assert evenly_chosen(range(21), 3) == [0, 10, 20]
    assert evenly_chosen("abcd", 3) == ["a", "c", "d"]
    assert evenly_chosen("ab", 3) == ["a", "b"]
    chosen = evenly_chosen(range(100), 12)
    assert len(chosen) == 12 and set(np.diff(chosen)) == {9} and chosen[-1] == 99


def test_log_scale_is_for_positive_values_over_a_wide_range() -> None:
    assert wants_log_scale([1.0, 6.0]) and wants_log_scale([1.0], [6.0, math.nan])
    assert not wants_log_scale([1.0, 4.0]) and not wants_log_scale([0.0, 6.0]) and not wants_log_scale([], [math.nan])


# ----------------------------------------------------------------------------------------------------------------------
# Charts


def test_another_objective_has_an_axis_of_its_own() -> None:
    """Validation always measures the squared error, so a Huber or weighted loss is not comparable with it."""
    metrics = series([{"step": i, "loss": 0.1, "validation/loss": 0.5} for i in range(3)])
    separate, training = loss_figure(metrics, "huber, p2").axes
    assert separate.get_title() == "Validation loss (mean squared error)" and "training" not in plotted(separate)
    assert training.get_title() == "Training loss (huber, p2)" and "training" in plotted(training)
    (both,) = loss_figure(metrics).axes
    assert both.get_title() == "Training and validation loss"
    assert {"training", "held-out images"} <= set(plotted(both))


def test_published_step_is_marked() -> None:
    """A vertical line in the charts of what it was chosen by; none before the run has ended."""
    lines = [{"step": i, "loss": 0.1, "validation/loss": 0.5, "validation/psnr": 9.0} for i in range(4)]
    for metrics, marked in [(series(lines), False), (series([*lines, {"step": 3, "published_step": 2}]), True)]:
        for axes in (
            loss_figure(metrics).axes,
            loss_figure(metrics, "huber").axes[:1],
            reconstruction_figure(metrics).axes,
        ):
            (ax,) = axes
            assert plotted(ax).get("published: step 2") == ([[2, 0], [2, 1]] if marked else None)
