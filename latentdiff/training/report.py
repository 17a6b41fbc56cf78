"""A run's report: charts of its metrics and its sample grids, as PNG files in RUN/report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.config import UNetTrainingConfig, load_config, stage_of
from latentdiff.figures.charts import (
    Series,
    bins_figure,
    evenly_chosen,
    loss_figure,
    reconstruction_figure,
    rendered,
    training_figure,
)
from latentdiff.figures.grids import labelled_grid
from latentdiff.formats.files import write_png

MAX_SAMPLES = 12  # sample grids in samples.png
MAX_SAMPLES_SIZE = (2400, 8000)  # pixels; a larger samples.png is scaled down


def write_report(run: Path) -> list[Path]:
    """Write the charts for which the run has numbers into RUN/report; returns their paths.

    Raises ValueError if RUN has no metrics.jsonl, a broken or empty one, or a config.yaml that cannot be read.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    figures = {
        "loss": loss_figure(metrics, objective_of(run)),
        "reconstruction": reconstruction_figure(metrics),
        "validation_bins": bins_figure(metrics),
        "training": training_figure(metrics),
    }
    images = {name: rendered(figure) for name, figure in figures.items() if figure is not None}
    grids = sorted((run / "samples").glob("step_*.png"))
    if grids:
        images["samples"] = stacked_samples(grids)
    if not images:
        raise ValueError(f"{run / 'metrics.jsonl'} has no numbers yet; wait for the first line of the run's log")
    paths = []
    for name, image in images.items():
        paths.append(run / "report" / f"{name}.png")
        write_png(image, paths[-1])
    return paths


def read_metrics(path: Path) -> dict[str, Series]:
    """The finite numbers of a metrics.jsonl by key; if a step has two, the later one counts.

    The last line may be cut off. Raises ValueError if the file is missing or another line is broken.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run of either stage")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    metrics: dict[str, Series] = {}
    for number, line in enumerate(lines, start=1):
        values = _parsed(line)
        if values is None:
            if number == len(lines):
                break
            raise ValueError(f'{path}, line {number} is not a JSON object with a "step"')
        step = values.pop("step")
        for key, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics.setdefault(key, {})[step] = value
    return {key: dict(sorted(series.items())) for key, series in metrics.items()}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def objective_of(run: Path) -> str:
    """Name of stage 2's training loss, by RUN/config.yaml; empty if it is the mean squared error that validation has.

    Raises ValueError if the config cannot be read.
    """
    path = run / "config.yaml"
    if not path.is_file() or stage_of(path) == "vae":
        return ""
    config = load_config(UNetTrainingConfig, path)
    names = [config.loss.loss_type, config.loss.weighting, "offset noise" if config.train.offset_noise else ""]
    return ", ".join(name for name in names if name not in ("mse", "constant", ""))


def stacked_samples(paths: Sequence[Path]) -> Image.Image:
    """Sample grids `step_00000100.png`, ... from top to bottom, their steps to the left; at most `MAX_SAMPLES`."""
    chosen = evenly_chosen(paths, MAX_SAMPLES)
    labels = [f"step {int(path.stem.removeprefix('step_')):,}" for path in chosen]
    stack = labelled_grid([[Image.open(path).convert("RGB")] for path in chosen], labels, [""])
    stack.thumbnail(MAX_SAMPLES_SIZE, Image.Resampling.LANCZOS)
    return stack
