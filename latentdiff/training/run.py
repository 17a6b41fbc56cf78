"""A run: its folder, resumable state, log and stop signals; both stages train within one."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from latentdiff.config import (
    Section,
    to_yaml,
)
from latentdiff.data.batches import StepBatches
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.distributed import gather_whole, on_main
from latentdiff.formats.files import write_text
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.loss_meter import Window
from latentdiff.training.posthoc_ema import PowerEMA, save_snapshot


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every so many steps, and at the end, is due."""
    return step % every == 0 or step == total


def write_snapshot(run: Path, step: int, power_ema: PowerEMA, accelerator: Accelerator) -> None:
    """Keep the power-function averages as they are now, for `latentdiff ema`. Every process calls this."""
    averages = gather_whole(power_ema.state(), keep=accelerator.is_main_process)
    on_main(accelerator, lambda: save_snapshot(run, step, averages))


def check_skipped(window: Window, limit: int, batches: StepBatches, images: CaptionedImages, run: Path) -> None:
    """Stop a run in which more than `limit` steps in a row were skipped; its checkpoints stay good."""
    if window.longest_skip_streak <= limit:
        return
    names = [images.name(index) for index in sorted(set(batches.global_batch(window.last_skipped_step)))]
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    saved = list_checkpoints(run)
    raise ValueError(
        f"the loss or its gradient was not finite in {window.longest_skip_streak} steps in a row (train.max_skipped_steps is "
        f"{limit}), the last time at step {window.last_skipped_step} with the images {shown}. The weights are still those "
        "of the last finite step. Look at these images, lower optimizer.lr or use another train.precision; "
        + (f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet")
    )


def summary(window: Window, images_per_second: float) -> str:
    """What the progress bar shows."""
    loss = f"loss {window.means['loss']:.4f}" if window.means else "no finite loss"
    skipped = f", {window.skipped} skipped" if window.skipped else ""
    return f"{loss}{skipped}, {images_per_second:.1f} images/s"


def check_steps(step: int, total: int, folder: Path) -> None:
    """ValueError if the checkpoint that was loaded is further than the run is to go."""
    if step > total:
        raise ValueError(f"train.steps is {total}, but the newest checkpoint in {folder} is that of step {step}")


def stopped(accelerator: Accelerator, run: Path, reason: str, step: int, resume: str) -> None:
    """Tell how to go on after a run was asked to end; `resume` is what --resume said."""
    how = "the same command again" if resume == "latest" else "the same command with --resume latest"
    accelerator.print(f"\n{reason}: saved at step {step} in {run}; {how} continues from there")
    accelerator.end_training()


def record(config: Section, run: Path, accelerator: Accelerator) -> None:
    """Write the resolved config into the run's folder: the file alone repeats the run."""
    if accelerator.is_main_process:
        for leftover in (*run.glob(".*.tmp"), *run.glob("*/.*.tmp")):  # of a killed run
            if leftover.is_file():
                leftover.unlink()
        write_text(to_yaml(config), run / "config.yaml")
    accelerator.wait_for_everyone()


def describe(model: nn.Module) -> str:
    """One line on the model's size."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{type(model).__name__}: {count:,} parameters, {trained:,} trained"


def model_settings(**sections: Section | str | None) -> dict[str, Any]:
    """The parts of a config that a resumed run must share with its checkpoint, as `section.key: value`."""
    flat = {}
    for name, section in sections.items():
        if isinstance(section, Section):
            flat |= {f"{name}.{key}": value for key, value in section.model_dump(mode="json").items()}
        else:
            flat[name] = section
    return flat
