"""What happened since the last line of the log, counted on the device: the host reads it at that line only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.distributed import whole


@dataclass(frozen=True)
class Window:
    """A line's worth of a loss_meter: means by name, skipped steps, the longest row of such, and that row's last step."""

    means: dict[str, float]
    skipped: int
    longest_skip_streak: int
    last_skipped_step: int


class LossMeter:
    """Sums of each step's losses, and of the steps that were skipped because something in them was not finite.

    Per process; `read` is where processes and host meet. It is part of a checkpoint, so that a resumed run writes the
    same lines (with several processes, to rounding).
    """

    def __init__(self, names: Sequence[str], accelerator: Accelerator) -> None:
        self.names = tuple(names)
        self.accelerator = accelerator
        self.step_sums = torch.zeros(len(names), device=accelerator.device)
        self.sums = torch.zeros_like(self.step_sums)
        self.grad_norm = torch.zeros((), device=accelerator.device)  # of the last finite step
        # Finite steps, skipped steps, the same in a row up to now, the longest such row, and the row's last step.
        self.counts = torch.zeros(5, dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
        self.counts = self.counts.to(accelerator.device)

    def add(self, losses: Sequence[Tensor], share: float) -> None:
        """Add a micro-batch's losses, which make up `share` of the step's."""
        self.step_sums += torch.stack([loss.detach().float() for loss in losses]) * share

    def close(self, step: int, grad_norm: Tensor, *others: Tensor) -> Tensor:
        """End a step: 1.0 if it is to be skipped because the gradient's norm is not finite, else 0.0.

        `others` are norms of the gradients of networks that are trained along, which must be finite as well.
        The norm is that of the gradient over all processes, so they all say the same; `loop.backward` sees to it that
        it is not finite if a loss is not.
        """
        grad_norm = whole(grad_norm).float()
        skip = (~torch.stack([grad_norm, *(whole(norm).float() for norm in others)]).isfinite().all()).float()
        self.sums += torch.where(skip > 0, 0.0, self.step_sums)
        self.grad_norm = torch.where(skip > 0, self.grad_norm, grad_norm)
        self.step_sums.zero_()
        done, skipped, row, longest, last = self.counts
        row = (row + 1) * skip
        last = torch.where(row >= torch.clamp(longest, min=1), torch.full_like(last, step), last)
        self.counts = torch.stack([done + 1 - skip, skipped + skip, row, torch.maximum(longest, row), last])
        return skip

    def read(self) -> Window:
        """The means over steps and processes since the last reading; starts anew. The host waits for the device."""
        packed = torch.cat([self.sums.to(self.counts.dtype), self.grad_norm[None], self.counts])
        *values, done, skipped, row, longest, last = self.accelerator.reduce(packed, reduction="mean").tolist()
        *sums, grad_norm = values
        means = {name: value / done for name, value in zip(self.names, sums, strict=True)} if done else {}
        if done:
            means["grad_norm"] = grad_norm
        self.sums.zero_()
        self.counts = self.counts * 0
        self.counts[2] = row
        return Window(means, round(skipped), round(longest), round(last))

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the processes' mean, from which any number of them can go on. Every process calls this."""
        mean = self.accelerator.reduce({"sums": self.sums, "grad_norm": self.grad_norm}, reduction="mean")
        return mean | {"counts": self.counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved loss_meter; one of other losses (the config was changed) starts anew."""
        if state["sums"].shape != self.sums.shape:
            return
        self.sums.copy_(state["sums"])
        self.grad_norm.copy_(state["grad_norm"])
        self.counts.copy_(state["counts"])
