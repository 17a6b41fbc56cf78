"""Charts of a training run from its metrics, as matplotlib figures.

matplotlib is imported where it is used, as importing it writes a cache of the fonts into the home folder.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 150
# Okabe & Ito's palette, which most colour-blind readers can distinguish. Early to late steps go from light to dark.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
EARLY_TO_LATE = ("#8CC1E6", "#2F7EBC", "#08306B")
Series = dict[int, float]  # optimiser step -> value, ascending


def running_mean(series: Series) -> Series:
    """Each value replaced by the mean of about 5 % of the values, centred at it; near the ends of fewer."""
    steps, values = list(series), np.array(list(series.values()), dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    half = len(values) // 40
    means = {}
    for i, step in enumerate(steps):
        reach = min(half, i, len(values) - 1 - i)
        means[step] = float((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def by_bin(metrics: Mapping[str, Series], name: str) -> dict[int, list[float]]:
    """The values of `name_bin_00`, `name_bin_01`, ... at each step, ascending; NaN where one is missing."""
    pattern = re.compile(rf"{re.escape(name)}_bin_(\d+)")
    bins = {int(match[1]): series for key, series in metrics.items() if (match := pattern.fullmatch(key))}
    steps = sorted({step for series in bins.values() for step in series})
    return {step: [bins.get(b, {}).get(step, math.nan) for b in range(max(bins) + 1)] for step in steps}


def evenly_chosen(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` (at least 2) items: the first, the last and evenly spaced ones between."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def wants_log_scale(*series: Sequence[float]) -> bool:
    """Whether the values are all positive and span more than a factor of five."""
    values = [value for one in series for value in one if not math.isnan(value)]
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


# ----------------------------------------------------------------------------------------------------------------------
# Charts; each is None if the run has no numbers for it


def loss_figure(metrics: Mapping[str, Series], objective: str = "") -> "Figure | None":
    """Training and held-out loss over the steps; in stage 1 the parts of the loss beside it.

    objective: name of the training loss if validation measures another one; it then has an axis of its own.
    """
    parts = {name: metrics[name] for name in ("reconstruction", "kl") if name in metrics}
    training = [
        ("training", metrics.get("loss", {}), {"color": BLUE, "alpha": 0.3, "linewidth": 0.8}),
        ("training, running mean", running_mean(metrics.get("loss", {})), {"color": BLUE}),
    ]
    validation = [
        ("held-out images", metrics.get("validation/loss", {}), {"color": ORANGE, "marker": "o"}),
        (
            "training images, validated the same way",
            _training_validation(metrics),
            {"color": GREEN, "marker": "s"},
        ),
        ("constant predictor", metrics.get("validation/baseline", {}), {"color": GREY, "linestyle": "--"}),
    ]
    published = published_step(metrics)
    separate = [line for line in training if line[1]] if objective else []
    lines = [line for line in (validation if separate else training + validation) if line[1]]
    if not lines and not separate:
        return None
    if separate and lines:
        figure, axes = _figure(columns=2)
        _plot_over_steps(axes[0], "Validation loss (mean squared error)", "loss", lines, published=published)
        _plot_over_steps(axes[1], f"Training loss ({objective})", "loss", separate)
        return figure
    lines = lines or separate
    figure, axes = _figure(columns=2 if parts else 1)
    title = "Training and validation loss" if "validation/loss" in metrics else "Training loss"
    _plot_over_steps(axes[0], title, "loss", lines, published=published)
    if parts:
        styles = [{"color": BLUE}, {"color": ORANGE, "linestyle": "--"}]
        names = {"reconstruction": "reconstruction", "kl": "KL (nats per pixel value, not weighted)"}
        lines = [(names[key], running_mean(parts[key]), style) for key, style in zip(parts, styles, strict=False)]
        _plot_over_steps(axes[1], "Parts of the training loss, running mean", "loss", lines)
    return figure


def _training_validation(metrics: Mapping[str, Series]) -> Series:
    """The validation loss on training images: the held-out loss minus the gap."""
    held_out, gap = metrics.get("validation/loss", {}), metrics.get("validation/gap", {})
    return {step: held_out[step] - gap[step] for step in held_out if step in gap}


def published_step(metrics: Mapping[str, Series]) -> int | None:
    """The step whose weights a finished run published."""
    series = metrics.get("published_step")
    return int(series[max(series)]) if series else None


def reconstruction_figure(metrics: Mapping[str, Series]) -> "Figure | None":
    """Stage 1: reconstruction quality of held-out images."""
    panels = [
        ("validation/psnr", "Peak signal-to-noise ratio", "PSNR (dB)"),
        ("validation/ssim", "Structural similarity", "SSIM"),
        ("validation/kl", "Divergence from the prior", "KL (nats per image)"),
    ]
    panels = [panel for panel in panels if panel[0] in metrics]
    if not panels:
        return None
    figure, axes = _figure(columns=len(panels))
    figure.suptitle("Reconstruction of held-out images")
    style = {"color": BLUE, "marker": "o"}
    published = published_step(metrics)
    for ax, (key, title, label) in zip(axes, panels, strict=True):
        _plot_over_steps(ax, title, label, [("", metrics[key], style)], key == "validation/kl", published)
    return figure


def bins_figure(metrics: Mapping[str, Series]) -> "Figure | None":
    """Stage 2: the loss on held-out images by noise level, and its gap to the loss on training images."""
    losses, gaps = by_bin(metrics, "validation/loss"), by_bin(metrics, "validation/gap")
    baselines, gap = by_bin(metrics, "validation/baseline"), metrics.get("validation/gap", {})
    if not losses:
        return None
    figure, axes = _figure(columns=1 + bool(gaps) + bool(gap))
    chosen = evenly_chosen(list(losses), 3)
    _plot_over_bins(axes[0], "Loss on held-out images", "loss", {step: losses[step] for step in chosen})
    if baselines:
        constant = baselines[max(baselines)]
        axes[0].plot(_middles(constant), constant, color=GREY, linestyle="--", label="constant predictor")
    if wants_log_scale(*losses.values(), *baselines.values()):
        _set_log_scale(axes[0])
    _finish(axes[0])
    if gaps:
        chosen = evenly_chosen(list(gaps), 3)
        _plot_over_bins(axes[1], "Gap by noise level", "held-out minus training loss", {s: gaps[s] for s in chosen})
        _finish(axes[1], zero_line=True)
    if gap:
        _plot_over_steps(
            axes[-1],
            "Gap over the training (growing: memorisation)",
            "held-out minus training loss",
            [("", gap, {"color": ORANGE, "marker": "o"})],
        )
        _finish(axes[-1], zero_line=True)
    return figure


def training_figure(metrics: Mapping[str, Series]) -> "Figure | None":
    """Learning rate, gradient norm, speed (and its share of the peak, if known) and skipped steps."""
    panels = [
        ("lr", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm before clipping", "norm"),
        ("images_per_second", "Speed", "images per second"),
        ("mfu", "Model FLOPs utilisation", "share of the device's peak"),
        ("skipped", "Skipped steps", "steps since the previous line"),
    ]
    panels = [panel for panel in panels if panel[0] in metrics]
    if not panels:
        return None
    columns = min(2, len(panels))
    figure, axes = _figure(columns, rows=-(-len(panels) // columns))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (key, title, label) in zip(axes, panels, strict=False):
        _plot_over_steps(ax, title, label, [("", metrics[key], {"color": BLUE})], log=key == "grad_norm")
        if key == "lr":
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        if key == "skipped":
            ax.locator_params(axis="y", integer=True)
        if key != "grad_norm":
            ax.set_ylim(bottom=0)
    return figure


def _figure(columns: int, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, outside of pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 5.0 * columns), 3.8 * rows), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _plot_over_steps(
    ax: "Axes",
    title: str,
    label: str,
    lines: Sequence[tuple[str, Series, dict[str, Any]]],
    log: bool = True,
    published: int | None = None,
) -> None:
    """Lines (name, numbers, style) over the optimiser steps; logarithmic if `log` and they span a wide range.

    published: a step to mark.
    """
    for name, series, style in lines:
        ax.plot(list(series), list(series.values()), label=name, **{"markersize": 3.5, **style})
    if published is not None:
        ax.axvline(published, color=GREY, linestyle=":", zorder=0, label=f"published: step {published:,}")
    if log and wants_log_scale(*(list(series.values()) for _, series, _ in lines)):
        _set_log_scale(ax)
    ax.set(title=title, xlabel="optimiser step", ylabel=label)
    ax.locator_params(axis="x", nbins=6, integer=True)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    _finish(ax)


def _plot_over_bins(ax: "Axes", title: str, label: str, curves: Mapping[int, Sequence[float]]) -> None:
    """One curve per step, early ones light, over the middles of the bins."""
    colours = EARLY_TO_LATE[-len(curves) :]
    for colour, (step, values) in zip(colours, curves.items(), strict=True):
        ax.plot(_middles(values), values, color=colour, marker="o", markersize=3.5, label=f"step {step:,}")
    ax.set(title=title, xlabel="timestep / T (0: clean, 1: noise)", ylabel=label, xlim=(0, 1))


def _set_log_scale(ax: "Axes") -> None:
    """Ticks at 1, 2 and 5 times a power of ten, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def _middles(values: Sequence[float]) -> list[float]:
    return [(b + 0.5) / len(values) for b in range(len(values))]


def _finish(ax: "Axes", zero_line: bool = False) -> None:
    if zero_line:
        ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if any(ax.get_legend_handles_labels()):
        ax.legend(frameon=False)


def rendered(figure: "Figure") -> Image.Image:
    """A figure as an image, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
