"""The small steps that both training loops are made of."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.data import CaptionedPictures, StepBatches
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.posthoc_ema import PowerEMA, save_snapshot
from latentdiff.training.sharding import gather_whole
from latentdiff.training.tally import Reading
from latentdiff.training.together import on_main


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every so many steps, and at the end, is due."""
    return step % every == 0 or step == total


def set_learning_rate(optimizer: Optimizer, lr: float) -> float:
    """Write the learning rate of this step into all parameter groups; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def synchronising(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over the processes in the last micro-batch of a step only."""
    return nullcontext() if last else accelerator.no_sync(model)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device without the host waiting: copies to NVIDIA GPUs need pinned memory for that."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def backward(accelerator: Accelerator, loss: Tensor, share: float) -> None:
    """Accumulate the gradient of a micro-batch that makes up `share` of the step.

    A loss that is not finite may have a finite gradient (that of |x| at infinity is 1), so it is made to have none
    here: then every process, and the loss scaling of fp16, sees it in the gradients.
    """
    accelerator.backward(loss * torch.where(loss.detach().isfinite(), share, math.nan))


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip to a global norm; returns the norm before, still on the device, so that the host need not wait."""
    return accelerator.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)


def apply_gradients(accelerator: Accelerator, optimizer: AcceleratedOptimizer, skip: Tensor) -> None:
    """An optimiser step, or none where `skip` is 1.0; then no gradients are left.

    The fused kernels read `skip` on the device (it is how loss scaling skips steps), so that the host need not wait.
    With loss scaling the scaler has found the same.
    """
    if accelerator.scaler is not None:
        optimizer.step()
    elif optimizer.defaults["fused"]:
        optimizer.optimizer.found_inf = skip
        optimizer.step()
    elif not skip.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def write_snapshot(run: Path, step: int, power_ema: PowerEMA, accelerator: Accelerator) -> None:
    """Keep the power-function averages as they are now, for `latentdiff ema`. Every process calls this."""
    averages = gather_whole(power_ema.state(), keep=accelerator.is_main_process)
    on_main(accelerator, lambda: save_snapshot(run, step, averages))


def check_skipped(reading: Reading, limit: int, batches: StepBatches, pictures: CaptionedPictures, run: Path) -> None:
    """Stop a run in which more than `limit` steps in a row were skipped; its checkpoints stay good."""
    if reading.longest_row <= limit:
        return
    names = [pictures.name(index) for index in sorted(set(batches.global_batch(reading.row_end)))]
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    saved = list_checkpoints(run)
    raise ValueError(
        f"the loss or its gradient was not finite in {reading.longest_row} steps in a row (train.max_skipped_steps is "
        f"{limit}), the last time at step {reading.row_end} with the pictures {shown}. The weights are still those "
        "of the last finite step. Look at these pictures, lower optimizer.lr or use another train.precision; "
        + (f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet")
    )


def summary(reading: Reading, images_per_second: float) -> str:
    """What the progress bar shows."""
    loss = f"loss {reading.means['loss']:.4f}" if reading.means else "no finite loss"
    skipped = f", {reading.skipped} skipped" if reading.skipped else ""
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
