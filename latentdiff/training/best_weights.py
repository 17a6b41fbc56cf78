"""The averaged weights with the lowest validation loss, which are published by default."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latentdiff.training.ema import trainable

PREFIX = "average:"  # of the weights' names in a checkpoint


class BestWeights:
    """Step, validation loss and averaged weights of the best validation so far; part of a checkpoint.

    measure: what the loss is, for messages. average: whole (unsharded) tensors in main memory, on every process; empty
    as long as `step` is None, because no validation loss was finite yet. last_loss: that of the latest validation.
    """

    def __init__(self, measure: str) -> None:
        self.measure = measure
        self.step: int | None = None
        self.loss = math.inf
        self.last_loss = math.nan
        self.average: dict[str, Tensor] = {}

    def offer(self, step: int, loss: float, averaged: nn.Module) -> None:
        """Keep a copy of the trained weights if the loss is lower than at any earlier step.

        averaged: the unsharded model with the averaged weights that the loss was measured with (`EMA.applied`). The
        loss is the same on every process, so all keep the same step. NaN and infinity are never the best.
        """
        self.last_loss = loss
        if loss < self.loss:
            self.step, self.loss = step, loss
            self.average = {name: p.detach().to("cpu", copy=True) for name, p in trainable(averaged).items()}

    def reason(self) -> str:
        """Why the best step is published, in words."""
        if self.loss == self.last_loss:
            return f"the lowest {self.measure} ({self.loss:.4g})"
        return f"the lowest {self.measure} ({self.loss:.4g}; the last step has {self.last_loss:.4g})"

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; step -1 if there is none yet."""
        return {
            "step": torch.tensor(-1 if self.step is None else self.step),
            "losses": torch.tensor([self.loss, self.last_loss], dtype=torch.float64),
            **{f"{PREFIX}{name}": tensor for name, tensor in self.average.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved `state`."""
        step = int(state["step"])
        self.step = None if step < 0 else step
        self.loss, self.last_loss = state["losses"].tolist()
        self.average = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
