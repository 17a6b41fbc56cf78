"""The small steps that both training loops are made of."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer


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


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip to a global norm; returns the norm before, still on the device, so that the host need not wait."""
    return accelerator.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)


def mean_over_processes(accelerator: Accelerator, values: Tensor) -> list[float]:
    """The mean over all processes, as numbers: the one place in the loop where the host waits for the device."""
    return accelerator.reduce(values, reduction="mean").tolist()


def check_finite(loss: float, step: int, run: Path) -> None:
    """Stop a run whose loss is not finite; its checkpoints stay."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step}; lower optimizer.lr or use another train.precision, and continue "
            f"from a checkpoint in {run}"
        )
