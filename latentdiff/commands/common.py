"""What several commands share."""

import argparse
import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.devices import choose_device, processor_name

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def append_to_log(path: Path, command: str, report: str) -> None:
    """Append what a command measured, where and when, to a Markdown file."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores, {processor_name()}"
    entry = f"\n## {date.today()}: {command}\n\n{device}; torch {torch.__version__}.\n\n{report}\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(entry)


def check_place(option: str, path: Path) -> None:
    """Before anything is drawn: whether the file can be written where it is to be."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, must be a file")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is not a folder")


def open_pipeline(model: str, device: str | None, dtype: str = "float32") -> "LatentDiffusionPipeline":
    """The pipeline of a folder or model id on a device; ValueError if either cannot be had."""
    import torch

    from latentdiff.pipeline import LatentDiffusionPipeline

    chosen = choose_device(device)
    return LatentDiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(chosen)
