"""Learning rate, EMA decay and caption dropout as pure functions of the step: nothing has to be stored or prepared."""

import math

from latentdiff.config import OptimizerConfig


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step` (0-based).

    Linear warm-up, then constant, a line or a half cosine down to `final_lr` at the last step, or the stages one after
    another, counted from step 0, of which the last one goes on.
    """
    lr = config.lr if config.lr_stages is None else _stage_at(step, config.lr_stages)
    if step < config.warmup_steps:
        return lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.lr_schedule == "linear":
        return lr + (config.final_lr - lr) * progress
    if config.lr_schedule == "cosine":
        return config.final_lr + 0.5 * (lr - config.final_lr) * (1 + math.cos(math.pi * progress))
    return lr


def _stage_at(step: int, stages: tuple[tuple[float, int], ...]) -> float:
    for lr, steps in stages:
        if step < steps:
            return lr
        step -= steps
    return stages[-1][0]


def caption_dropout_at(step: int, total_steps: int, dropout: float | tuple[float, float]) -> float:
    """The share of captions that is dropped at optimiser step `step` (0-based): of two, linear from first to last."""
    if not isinstance(dropout, tuple):
        return dropout
    first, last = dropout
    return first + (last - first) * min(1.0, step / max(1, total_steps - 1))


def ema_decay_at(step: int, decay: float) -> float:
    """The EMA's decay after optimiser step `step` (0-based): (1 + n) / (10 + n) for n = step + 1, up to `decay`.

    The warm-up keeps the average from being the random starting weights in a run shorter than 1 / (1 - decay) steps.
    """
    n = step + 1
    return min(decay, (1 + n) / (10 + n))
