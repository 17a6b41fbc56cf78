"""Learning rate and EMA decay as pure functions of the step, so that nothing has to be stored or prepared."""

import math

from latentdiff.config import OptimizerConfig


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step` (0-based): linear warm-up, then constant or a cosine to `final_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))


def ema_decay_at(step: int, decay: float) -> float:
    """The EMA's decay after optimiser step `step` (0-based): (1 + n) / (10 + n) for n = step + 1, up to `decay`.

    The warm-up keeps the average from being the random starting weights in a run shorter than 1 / (1 - decay) steps.
    """
    n = step + 1
    return min(decay, (1 + n) / (10 + n))
