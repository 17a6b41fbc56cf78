"""Losses between two lines of the log, summed on the device: the host waits only when a line is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.distributed import whole


@dataclass(frozen=True)
class Window:
    """The steps since the last line: mean losses by name, and the steps that were skipped.

    longest_skip_streak: most skipped steps in a row; last_skipped_step: the last step of that streak.
    """

    means: dict[str, float]
    skipped: int
    longest_skip_streak: int
    last_skipped_step: int


class LossMeter:
    """Sums each step's losses, and counts the steps that are skipped because something in them is not finite.

    Per process; `read` is where processes and host meet. It is part of a checkpoint, so that a resumed run logs the
    same lines (with several processes, up to rounding).
    """

    def __init__(self, names: Sequence[str], accelerator: Accelerator) -> None:
        self.names = tuple(names)
        self.accelerator = accelerator
        self.step_sums = torch.zeros(len(names), device=accelerator.device)
        self.sums = torch.zeros_like(self.step_sums)
        self.grad_norm = torch.zeros((), device=accelerator.device)  # of the last finite step
        # Finite steps, skipped steps, the current skip streak, the longest one, and the last step of the longest.
        self.counts = torch.zeros(5, dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
        self.counts = self.counts.to(accelerator.device)

    def add(self, losses: Mapping[str, Tensor], weight: float) -> None:
        """Add a micro-batch's losses, scalars by name, which make up the fraction `weight` of the step's."""
        self.step_sums += torch.stack([losses[name].detach().float() for name in self.names]) * weight

    def close(self, step: int, grad_norm: Tensor, *others: Tensor) -> Tensor:
        """End a step: 1.0 if it must be skipped because a gradient norm is not finite, else 0.0.

        `others` are gradient norms of further networks that are trained at the same time; one that is not finite skips
        the step of all. Norms are over all processes, so every process returns the same; `optimizer.backward` makes
        the gradient of a loss that is not finite not finite either.
        """
        grad_norm = whole(grad_norm).float()
        skip = (~torch.stack([grad_norm, *(whole(norm).float() for norm in others)]).isfinite().all()).float()
        self.sums += torch.where(skip > 0, 0.0, self.step_sums)
        self.grad_norm = torch.where(skip > 0, self.grad_norm, grad_norm)
        self.step_sums.zero_()
        done, skipped, streak, longest, last = self.counts
        streak = (streak + 1) * skip
        last = torch.where(streak >= torch.clamp(longest, min=1), torch.full_like(last, step), last)
        self.counts = torch.stack([done + 1 - skip, skipped + skip, streak, torch.maximum(longest, streak), last])
        return skip

    def read(self) -> Window:
        """The window since the last call, with means over steps and processes. The host waits for the device."""
        packed = torch.cat([self.sums.to(self.counts.dtype), self.grad_norm[None], self.counts])
        reduced: Any = self.accelerator.reduce(packed, reduction="mean")
        *values, done, skipped, streak, longest, last = reduced.tolist()
        *sums, grad_norm = values
        means = {name: value / done for name, value in zip(self.names, sums, strict=True)} if done else {}
        if done:
            means["grad_norm"] = grad_norm
        self.sums.zero_()
        self.counts = self.counts * 0
        self.counts[2] = streak
        return Window(means, round(skipped), round(longest), round(last))

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the mean over processes, from which any number can resume. Every process calls this."""
        mean: Any = self.accelerator.reduce({"sums": self.sums, "grad_norm": self.grad_norm}, reduction="mean")
        return mean | {"counts": self.counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved `state`; one with other losses (the config was changed) is ignored."""
        if state["sums"].shape != self.sums.shape:
            return
        self.sums.copy_(state["sums"])
        self.grad_norm.copy_(state["grad_norm"])
        self.counts.copy_(state["counts"])
