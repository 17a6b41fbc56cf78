"""A run's report: charts of what it wrote, as PNG files in RUN/report."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latentdiff.formats.files import write_png

if TYPE_CHECKING:
    pass
from latentdiff.figures.charts import (
    Series,
    _rendered,
    bins_figure,
    loss_figure,
    reconstruction_figure,
    training_figure,
)
from latentdiff.figures.grids import stacked_samples


def write_report(run: Path) -> list[Path]:
    """Write the charts for which the run has numbers into RUN/report; returns their paths.

    Raises ValueError if RUN has no metrics.jsonl, or one that is broken or without any number.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    figures = {
        "loss": loss_figure(metrics, objective_of(run)),
        "reconstruction": reconstruction_figure(metrics),
        "validation_bins": bins_figure(metrics),
        "training": training_figure(metrics),
    }
    images = {name: _rendered(figure) for name, figure in figures.items() if figure is not None}
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
    """The finite numbers of a metrics.jsonl by their keys; of two for one step the later counts.

    The last line may be cut off. Raises ValueError if the file is missing or another line is broken.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run of train_vae.py or train_unet.py")
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
    """What stage 2 was trained on, by its config.yaml, if that is not the plain squared error of unit noise."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(config, dict) or "diffusion" not in config:
        return ""
    loss, diffusion = config.get("loss") or {}, config["diffusion"] or {}
    names = [loss.get("loss_type", "mse"), loss.get("weighting", "constant")]
    offset = "offset noise" if (config.get("train") or {}).get("offset_noise") else ""
    return ", ".join(name for name in (*names, offset) if name not in ("mse", "constant", ""))
