"""The training loss: the error of the network's output, and the weight of each noise level."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.diffusion.prediction import PREDICTIONS
from latentdiff.diffusion.schedule import NoiseSchedule

LossType = Literal["mse", "l1", "huber"]
Weighting = Literal["constant", "min_snr", "p2"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training minimises: an error of the network's output, weighted by noise level.

    With SNR = alpha^2 / sigma^2, min-SNR weights the squared error of x0 by min(SNR, min_snr_gamma) (Hang et al. 2023,
    eq. 7), P2 the squared error of epsilon by (1 + SNR)^-p2_gamma (Choi et al. 2022, eq. 8). Other predictions get the
    factor that makes it the same objective for the squared error; l1 and huber use the same factor.

    Raises ValueError, naming the field, for other values.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    loss_type: LossType = "mse"
    """Error of the network's output: mse, l1, or huber (d^2 / 2 up to huber_delta, a line above)."""
    huber_delta: float = 1.0
    """Where huber turns from a square into a line."""
    weighting: Weighting = "constant"
    """Weight of the noise levels: constant, min_snr or p2."""
    min_snr_gamma: float = 5.0
    """Largest SNR that min_snr gives its full weight, above 0."""
    p2_gamma: float = 1.0
    """Exponent of p2, at least 0; 0 is constant."""

    def __post_init__(self) -> None:
        for field, known in {"loss_type": LossType, "weighting": Weighting}.items():
            if getattr(self, field) not in get_args(known):
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be one of {', '.join(get_args(known))}")
        for field in ("huber_delta", "min_snr_gamma"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}, must be above 0")
        if not self.p2_gamma >= 0:
            raise ValueError(f"p2_gamma is {self.p2_gamma}, must be at least 0")

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """The unweighted error of each sample: [B, C, h, w] twice -> [B] float32."""
        output, target = output.float(), target.float()
        if self.loss_type == "mse":
            values = (output - target).square()
        elif self.loss_type == "l1":
            values = (output - target).abs()
        else:
            values = F.huber_loss(output, target, reduction="none", delta=self.huber_delta)
        return values.mean(dim=(1, 2, 3))

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Weight of the error of the network's own output at each timestep: [T] float64 on the CPU."""
        abar = schedule.alphas_cumprod
        if self.weighting == "constant":
            return torch.ones_like(abar)
        snr = abar / (1 - abar)
        if self.weighting == "min_snr":
            of_epsilon = (self.min_snr_gamma / snr).clamp(max=1)
        else:
            of_epsilon = (1 + snr) ** -self.p2_gamma
        return of_epsilon * PREDICTIONS[schedule.prediction_type].weight(abar)


MEAN_SQUARED_ERROR = Objective()


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    latents: Tensor,
    condition: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    objective: Objective = MEAN_SQUARED_ERROR,
) -> Tensor:
    """The weighted error of each sample, [B] float32 (Ho et al. 2020, eq. 14); all randomness is an argument.

    latents, noise: [B, C, h, w]; timesteps: [B] int64.
    model(noisy_latents, timesteps, condition) returns the network's output, shaped like the latents.
    """
    output = model(schedule.add_noise(latents, noise, timesteps), timesteps, condition)
    target = schedule.target(latents, noise, timesteps)
    assert output.shape == target.shape, f"model returned {tuple(output.shape)}, expected {tuple(target.shape)}"
    errors = objective.errors(output, target)
    if objective.weighting == "constant":
        return errors
    return errors * _weight_table(schedule, objective, errors.device)[timesteps]


@cache
def _weight_table(schedule: NoiseSchedule, objective: Objective, device: torch.device) -> Tensor:
    return objective.weights(schedule).float().to(device)


def drop_captions(condition: Tensor, unconditional: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Caption dropout for classifier-free guidance (Ho & Salimans 2022, algorithm 1), independently per sample.

    condition: input_ids [B, L] or context [B, L, D]; unconditional: that of the unconditional prompt, [L] or [L, D];
    uniform: [B] in [0, 1). Rows with uniform < probability are replaced, so 0 keeps every caption and 1 keeps none.
    """
    assert uniform.shape == condition.shape[:1] and unconditional.shape == condition.shape[1:]
    dropped = (uniform < probability).view(-1, *[1] * unconditional.ndim)
    return torch.where(dropped, unconditional, condition)
