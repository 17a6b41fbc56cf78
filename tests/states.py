"""Training states of a small model, for the tests of checkpoints and runs."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.config import OptimizerConfig, OutputConfig
from latentdiff.randomness import Stream, normal
from latentdiff.training.checkpoint import (
    TrainingState,
    list_checkpoints,
    save_checkpoint,
)
from latentdiff.training.ema import EMA, ema_decay_at
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.optimizer import (
    apply_gradients,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from latentdiff.training.posthoc_ema import PowerEMA


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SETTINGS = {"model.block_out_channels": (8, 16), "model.scaling_factor": 0.5, "text.pretrained": None}


OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)


LENGTHS = (0.05, 0.1)


def output(keep: int = 9, keep_every: int | None = None) -> OutputConfig:
    return OutputConfig(folder="not used here", checkpoint_every=1, keep=keep, keep_every=keep_every)


def new_state(
    accelerator: Accelerator,
    seed: int = 0,
    lengths: tuple[float, ...] = (),
    config: Mapping[str, object] | None = None,
    optimizer_config: OptimizerConfig = OPTIMIZER,
    **settings: object,
) -> TrainingState:
    """Of a small model; with power-function averages if it is given `lengths`."""
    model = small_model(seed).to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, optimizer_config))
    power_ema = PowerEMA(model, lengths) if lengths else None
    loss_meter = LossMeter(["loss"], accelerator)
    return TrainingState(model, EMA(model), optimizer, SETTINGS | settings, config or {}, power_ema, loss_meter)


def train(state: TrainingState, stop: int, spoilt: tuple[int, ...] = ()) -> None:
    """Optimiser steps as in the training loops; batch, learning rate and EMA decay are functions of the step.

    The loss is NaN in those of `spoilt`.
    """
    accelerator = state.loss_meter.accelerator
    for step in range(state.step, stop):
        set_learning_rate(state.optimizer, 1e-2 / (1 + step))
        loss = state.model(normal((2, 4, 4), 0, Stream.NOISE, step, range(5))).square().mean()
        loss = loss * float("nan") if step in spoilt else loss
        accelerator.backward(loss)
        state.loss_meter.add({"loss": loss}, weight=1.0)
        grad_norm = clip_gradients(accelerator, state.model, 1.0)
        apply_gradients(accelerator, state.optimizer, skip=state.loss_meter.close(step, grad_norm))
        state.ema.update(state.model, ema_decay_at(step, 0.9))
        if state.power_ema is not None:
            state.power_ema.update(state.model, step)
        state.step = step + 1


def trained(
    run: Path, accelerator: Accelerator, *steps: int, keep: int = 9, keep_every: int | None = None, **options: object
) -> TrainingState:
    """A state that was trained and saved at each of `steps`."""
    state = new_state(accelerator, **options)
    for step in steps:
        train(state, step)
        save_checkpoint(run, state, output(keep, keep_every), accelerator)
    return state


def moments(state: TrainingState) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": value.clone()
        for name, p in state.model.named_parameters()
        for key, value in state.optimizer.state.get(p, {}).items()
    }


def same_state(a: TrainingState, b: TrainingState) -> bool:
    """Bit for bit."""
    parts = [[weights(s.model), s.ema.average, moments(s), s.loss_meter.state()] for s in (a, b)]
    for part, state in zip(parts, (a, b), strict=True):
        part.append({} if state.power_ema is None else state.power_ema.state())
    return a.step == b.step and all(equal(one, other) for one, other in zip(*parts, strict=True))


def steps_in(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
