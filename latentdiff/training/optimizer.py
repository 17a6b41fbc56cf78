"""The optimiser: AdamW or Muon, its learning rate, and the small steps of an update."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from latentdiff.config import OptimizerConfig
from latentdiff.training.muon import Muon, hidden_matrices


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where there is such a kernel; no weight decay on biases and norms.

    With kind muon the weights of hidden layers are updated by Muon.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    muon = hidden_matrices(model) if config.kind == "muon" else []
    rest = set(parameters) - set(muon)
    decayed = [p for p in parameters if p.ndim >= 2 and p in rest]
    others = [p for p in parameters if p.ndim < 2]
    assert len(muon) + len(decayed) + len(others) == len(parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.kind == "muon":
        groups.append({"params": muon, "weight_decay": config.weight_decay, "muon": True})
        return Muon(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: Optimizer, lr: float) -> float:
    """Write the learning rate of this step into all parameter groups; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def synchronising(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Average gradients over the processes in the last micro-batch of a step only."""
    return nullcontext() if last else accelerator.no_sync(model)


def backward(accelerator: Accelerator, loss: Tensor, weight: float) -> None:
    """Accumulate the gradient of a micro-batch that makes up the fraction `weight` of the step.

    A loss that is not finite may have a finite gradient (that of |x| at infinity is 1). Here its gradient becomes NaN,
    so that every process, and the loss scaling of fp16, sees it.
    """
    accelerator.backward(loss * torch.where(loss.detach().isfinite(), weight, math.nan))


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip to a global norm; returns the norm before, still on the device, so that the host need not wait."""
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    assert norm is not None
    return norm


def apply_gradients(accelerator: Accelerator, optimizer: AcceleratedOptimizer, skip: Tensor) -> None:
    """An optimiser step, or none where `skip` is 1.0; clears the gradients.

    The fused kernels read `skip` on the device (as they do for loss scaling), so the host does not wait. With loss
    scaling the scaler skips the same steps.
    """
    if accelerator.scaler is not None:
        optimizer.step()
    elif optimizer.defaults["fused"]:
        optimizer.optimizer.found_inf = skip
        optimizer.step()
    elif not skip.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step` (0-based).

    Linear warm-up, then constant, linear or half a cosine down to `min_lr` at the last step; or the stages one after
    another, counted from step 0; the last stage lasts until the end.
    """
    lr = config.lr if config.lr_stages is None else _stage_at(step, config.lr_stages)
    assert lr is not None, "the config has lr or lr_stages"
    if step < config.warmup_steps:
        return lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.lr_schedule == "linear":
        return lr + (config.min_lr - lr) * progress
    if config.lr_schedule == "cosine":
        return config.min_lr + 0.5 * (lr - config.min_lr) * (1 + math.cos(math.pi * progress))
    return lr


def _stage_at(step: int, stages: tuple[tuple[float, int], ...]) -> float:
    for lr, steps in stages:
        if step < steps:
            return lr
        step -= steps
    return stages[-1][0]
