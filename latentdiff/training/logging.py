"""What a run tells: metrics.jsonl, the progress bar, sample grids."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from latentdiff.formats.diffusers_folder import write_text


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with the number of finished optimiser steps.

    On a resume at `start_step` the lines of later steps, which will be written again, are dropped.
    """

    def __init__(self, run: Path, start_step: int, enabled: bool) -> None:
        self.path = run / "metrics.jsonl"
        self.enabled = enabled
        if enabled:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
            kept = [line for line in lines if start_step > 0 and _step(line) <= start_step]
            write_text("".join(f"{line}\n" for line in kept), self.path)

    def write(self, step: int, **values: float) -> None:
        """Append a line (on the main process)."""
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def _step(line: str) -> float:
    """A line's step; infinity for one that was cut off when the run was killed."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class Meter:
    """Pictures per second since the last reading."""

    def __init__(self, now: float | None = None) -> None:
        self.since = time.perf_counter() if now is None else now
        self.pictures = 0

    def add(self, pictures: int) -> None:
        self.pictures += pictures

    def read(self, now: float | None = None) -> float:
        """Pictures per second since the last reading (or the start); starts anew."""
        now = time.perf_counter() if now is None else now
        rate = self.pictures / max(now - self.since, 1e-9)
        self.since, self.pictures = now, 0
        return rate


def progress_bar(name: str, start_step: int, total_steps: int, enabled: bool) -> tqdm:
    """A bar over the optimiser steps with elapsed time and ETA; the loop adds loss and images/s."""
    return tqdm(total=total_steps, initial=start_step, desc=name, unit="step", disable=not enabled, dynamic_ncols=True)


def picture_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows of `columns` (about square, at most eight wide), two pixels apart, on white."""
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        grid.paste(image.convert("RGB"), ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return grid
