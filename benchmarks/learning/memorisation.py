"""The memorisation clock: when a model begins to copy, against the number of its training images; see README.md.

python benchmarks/learning/memorisation.py --images 32 64 128 256 --epochs 2000
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for train_unet.py

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import train_unet
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import open_images
from latentdiff.evaluation.metrics import stack_pixels
from latentdiff.evaluation.prompts import generate
from latentdiff.evaluation.scores import markdown_table
from latentdiff.figures.charts import EARLY_TO_LATE, rendered
from latentdiff.formats.files import write_png
from latentdiff.models.pixel_space import PixelSpace
from latentdiff.training.arguments import run_as_command
from latentdiff.training.checkpoint import list_checkpoints, step_of
from latentdiff.training.report import read_metrics
from latentdiff.training.unet_model import checkpoint_pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = Path(__file__).parent / "memorisation.yaml"
# An image is a copy if its nearest training image is less than a third as far as the second nearest one (Yoon et al.
# 2023, and Bonnaire et al. 2025, arXiv 2505.17638, section 2).
RATIO = 1 / 3
ONSET = 0.1  # share of copies among the samples at which memorisation has begun
BATCH_SIZE = 128

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for images in arguments.images:
        rows += clock(images, arguments)
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))
    write_png(rendered(chart(rows)), arguments.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64, 128, 256], help="sizes of the training set")
    parser.add_argument("--epochs", type=int, default=2000, help="length of each run in passes over its images")
    parser.add_argument("--points", type=int, default=12, help="measurements of each run")
    parser.add_argument("--samples", type=int, default=256, help="images generated at each point")
    parser.add_argument("--out", type=Path, default=Path("saved/memorisation/results.jsonl"), help="rows; .png: chart")
    return parser.parse_args()


def clock(images: int, arguments: argparse.Namespace) -> list[Row]:
    """Train on so many images, and measure the averaged weights of evenly spaced checkpoints."""
    folder = arguments.out.parent / f"{images}-images"
    batch_size = load_config(UNetTrainingConfig, BASE, []).train.batch_size
    every = max(1, arguments.epochs * images // batch_size // arguments.points)
    steps = every * arguments.points
    overrides = [
        *(f"data.limit={images}", f"data.repeat={-(-batch_size // images)}", f"train.steps={steps}"),
        *(f"validation.every={every}", f"validation.sample_every={steps}"),
        *(f"output.checkpoint_every={every}", f"output.keep={arguments.points}", f"output.folder={folder}"),
    ]
    AcceleratorState._reset_state(reset_partial_state=True)  # each run makes its own
    train_unet.main([str(BASE), *overrides])
    config = load_config(UNetTrainingConfig, BASE, overrides)
    training, _ = open_images(config.data, config.model.in_channels, config.train.seed, progress=False)
    reference = torch.cat([pixels for _, pixels in training.batches(BATCH_SIZE)])
    metrics = read_metrics(folder / "metrics.jsonl")
    held_out, gap = metrics["validation/loss"], metrics["validation/gap"]
    rows: list[Row] = []
    for checkpoint in list_checkpoints(folder):
        step = step_of(checkpoint)
        pipeline = checkpoint_pipeline(config, checkpoint, PixelSpace(config.model.in_channels))
        drawn = generate(pipeline, [""] * arguments.samples, config.data.shape, 0, BATCH_SIZE, progress=False)
        row = {"images": images, "step": step, "epochs": step * batch_size / images}
        row |= {"held_out_loss": held_out[step], "training_loss": held_out[step] - gap[step]}
        rows.append(row | {"copies": copies(stack_pixels(drawn), reference), "samples": arguments.samples})
    return rows


def copies(generated: Tensor, training: Tensor) -> int:
    """How many images are copies: [N, ...] against [M, ...]."""
    nearest = torch.cdist(generated.flatten(1), training.flatten(1)).topk(2, largest=False).values
    return int((nearest[:, 0] < RATIO * nearest[:, 1]).sum())


def onset(rows: list[Row]) -> float | None:
    """The step at which ONSET of the samples are copies, between the measured ones; None if it never comes to that."""
    before, share = 0.0, 0.0
    for row in rows:
        now = row["copies"] / row["samples"]
        if now >= ONSET:
            return before + (row["step"] - before) * (ONSET - share) / (now - share)
        before, share = row["step"], now
    return None


def by_size(rows: list[Row]) -> dict[int, list[Row]]:
    """The rows of each size of the training set."""
    return {size: [row for row in rows if row["images"] == size] for size in dict.fromkeys(r["images"] for r in rows)}


def table(rows: list[Row]) -> str:
    """As Markdown, one line for each size."""
    lines: list[tuple[str, dict[str, str]]] = []
    for size, own in by_size(rows).items():
        best, begun, last = min(own, key=lambda row: row["held_out_loss"]), onset(own), own[-1]
        per_step = last["epochs"] / last["step"]
        cells = {
            "lowest held-out loss at step": str(best["step"]),
            "a tenth are copies at step": "never" if begun is None else f"{begun:.0f}",
            "in epochs": "" if begun is None else f"{begun * per_step:.0f}",
            "at the end": f"{last['copies']} / {last['samples']} at {last['step']}",
        }
        lines.append((str(size), cells))
    return markdown_table(lines, "training images")


def chart(rows: list[Row]) -> "Figure":
    """Loss and share of copies over the steps, and the share over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13.0, 3.8), dpi=110, layout="constrained")
    losses, shares, epochs = figure.subplots(1, 3)
    colours = [*EARLY_TO_LATE, "#000000"]
    for i, (size, own) in enumerate(by_size(rows).items()):
        style: dict[str, Any] = {"color": colours[i % len(colours)], "label": f"{size} images"}
        steps, share = [row["step"] for row in own], [row["copies"] / row["samples"] for row in own]
        losses.plot(steps, [row["held_out_loss"] for row in own], **style)
        losses.plot(steps, [row["training_loss"] for row in own], color=style["color"], linestyle=":")
        shares.plot(steps, share, **style)
        epochs.plot([row["epochs"] for row in own], share, **style)
    titles = ("Loss: held-out (lines), training images (dots)", "Share of samples that are copies", "The same")
    for ax, title, x in zip((losses, shares, epochs), titles, ("step", "step", "epochs"), strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(x)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    run_as_command(lambda given: main())
