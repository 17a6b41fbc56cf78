"""Logging of a run: metrics.jsonl, trackers, sample grids, the progress bar."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from latentdiff.formats.files import write_png, write_text

PUBLISHED_STEP = "published_step"  # in the log's last line: the step of the weights in the run's folder


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line with the number of finished optimiser steps, and the trackers.

    On a resume at `start_step`, lines that will be written again are removed: those of later steps, the validation at
    that step if it is `pending`, and the published step. evaluated: whether a validation or an image was written.
    """

    evaluated = False

    def __init__(self, run: Path, start_step: int, pending: bool, accelerator: Accelerator) -> None:
        self.run = run
        self.path = run / "metrics.jsonl"
        self.accelerator = accelerator
        if accelerator.is_main_process:
            # A power cut can leave bytes that are no text; such a line is no JSON either, and goes.
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
            kept = [line for line in lines if _is_before(line, start_step, pending)]
            write_text("".join(f"{line}\n" for line in kept), self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line (on the main process)."""
        self.evaluated |= any(key.startswith("validation/") for key in values)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.accelerator.log(dict(values), step=step)

    def write_image(self, step: int, image: Image.Image) -> None:
        """Write `samples/step_<step>.png` (on the main process)."""
        self.evaluated = True
        if not self.accelerator.is_main_process:
            return
        write_png(image, self.run / "samples" / f"step_{step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(image)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": [image]}, step=step)


def _is_before(line: str, start_step: int, pending: bool) -> bool:
    """Whether a line was written before the state at `start_step`, and is complete (a kill may cut one off)."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return False
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return False
    again = PUBLISHED_STEP in values or (pending and any(key.startswith("validation/") for key in values))
    return values["step"] < start_step or (values["step"] == start_step and not again)


class ThroughputMeter:
    """Images per second of the steps alone: the time between `stop` and `start` does not count, and neither does that
    before `restart`, which is called after the first step, in which kernels are compiled or chosen.
    """

    def __init__(self) -> None:
        self.since: float | None = None  # when counting began; None while it is stopped
        self.seconds, self.images = 0.0, 0

    def start(self, now: float | None = None) -> None:
        """Count from now on, if it is not so already."""
        if self.since is None:
            self.since = time.perf_counter() if now is None else now

    def stop(self, now: float | None = None) -> None:
        """Stop to count. The device must be done with what it was given."""
        if self.since is not None:
            self.seconds += (time.perf_counter() if now is None else now) - self.since
            self.since = None

    def restart(self, now: float | None = None) -> None:
        """Forget all that was counted, and count from now on."""
        self.since = time.perf_counter() if now is None else now
        self.seconds, self.images = 0.0, 0

    def add(self, images: int) -> None:
        """Count finished images."""
        self.images += images

    def read(self, now: float | None = None) -> float | None:
        """Images per second since the last reading (or the restart); None if there were none. Resets the counter."""
        now = time.perf_counter() if now is None else now
        self.stop(now)
        rate = self.images / max(self.seconds, 1e-9) if self.images else None
        self.restart(now)
        return rate


def progress_bar(name: str, start_step: int, total_steps: int, enabled: bool) -> tqdm:
    """A bar over the optimiser steps with elapsed time and ETA; the loop adds loss and images/s."""
    return tqdm(total=total_steps, initial=start_step, desc=name, unit="step", disable=not enabled, dynamic_ncols=True)
