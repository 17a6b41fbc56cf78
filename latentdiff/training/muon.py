"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

MOMENTUM = 0.95
# The quintic polynomial of the Newton-Schulz iteration: steepest at 0, so that small singular values grow fast.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of an update of AdamW, which Muon's are scaled to (Liu et al. 2025, eq. 4).
UPDATE_RMS = 0.2
# Input and output layers and embeddings are not hidden layers: AdamW suits them better (Jordan et al. 2024).
INPUTS_AND_OUTPUTS = ("conv_in", "conv_out")


class Muon(AdamW):
    """Muon for the parameter groups with `muon` True, AdamW for the others; one learning rate and decay for both.

    A convolution's kernel [out, in, k, k] is the matrix [out, in * k * k]. Updates are scaled to the size of AdamW's,
    so that its learning rate and weight decay carry over (Liu et al. 2025, eq. 4). For matrices this equals
    torch.optim.Muon with adjust_lr_fn "match_rms_adamw".
    """

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """An optimiser step; none where `found_inf` was set to 1, as in AdamW's fused kernels."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        # Matrices of one shape are orthogonalised together: many small products one by one take twice as long.
        by_shape: dict[tuple[int, int], list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in groups:
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape[0], parameter[0].numel()), []).append((parameter, group))
        for shape, entries in by_shape.items():
            updates = orthogonalised(torch.stack([self._momentum(parameter) for parameter, _ in entries]))
            scale = UPDATE_RMS * math.sqrt(max(shape))
            for (parameter, group), update in zip(entries, updates, strict=True):
                _apply(parameter, update, group["lr"], group["weight_decay"], scale)

    @torch.no_grad()
    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum with the new gradient, as a matrix."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        gradient = parameter.grad
        assert gradient is not None
        momentum.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM).flatten(1)


@torch.no_grad()
def _apply(parameter: Tensor, update: Tensor, lr: float, weight_decay: float, scale: float) -> None:
    parameter.mul_(1 - lr * weight_decay)
    parameter.add_(update.reshape(parameter.shape), alpha=-lr * scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Roughly U V^T of the singular value decomposition U S V^T of each of some matrices [B, n, m], in bfloat16.

    A few Newton-Schulz iterations: the singular values end between about 0.5 and 1.5, which serves as well as 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16, copy=True)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trained weights of the linear and convolution layers between the input and the output layer."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not name.endswith(INPUTS_AND_OUTPUTS)
        and module.weight.requires_grad
    ]
