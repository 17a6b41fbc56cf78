"""The noise schedule: how much noise each timestep has.

Notation of Ho et al. 2020 (DDPM), with 0-based timesteps t = 0 .. T-1 as in diffusers:

    abar[t] = prod_{s <= t} (1 - beta[s])    alpha = sqrt(abar), sigma = sqrt(1 - abar)    alpha^2 + sigma^2 = 1
    noisy_latents = alpha * latents + sigma * noise                                        (eq. 4)

Shapes: latents, noise and network output [B, C, h, w]; timesteps [B] int64 on the same device.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from math import cos, inf, log, pi, sqrt
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.prediction import PREDICTIONS, PredictionType

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True)
class NoiseLevel:
    """A point between data and noise: x = alpha * x0 + sigma * noise, with alpha^2 + sigma^2 = 1.

    timestep: the network's input; not an integer between two trained timesteps.
    """

    timestep: float
    alpha: float
    sigma: float

    @property
    def sigma_karras(self) -> float:
        """sigma / alpha, the noise level ("sigma") of Karras et al. 2022 and k-diffusion; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else inf

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), lambda in Lu et al. 2022; inf for clean data."""
        if self.sigma == 0:
            return inf
        return log(self.alpha / self.sigma) if self.alpha > 0 else -inf


CLEAN = NoiseLevel(timestep=-1, alpha=1.0, sigma=0.0)
# Replaces abar = 0 at the last timestep, for samplers that compute with sigma / alpha; the value is diffusers'.
SMALLEST_ALPHA_CUMPROD = 2.0**-24


_KIND_NAMES = {Integral: "an integer", Real: "a number", bool: "true or false"}
_FIELDS_OF_KIND = {
    Integral: ("num_train_timesteps", "steps_offset"),
    Real: ("beta_start", "beta_end"),
    bool: ("set_alpha_to_one", "rescale_betas_zero_snr"),
}


# The fields of a NoiseSchedule that its noise levels depend on.
BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule and the network's parameterisation, in diffusers' config keys.

    Raises ValueError, naming the field, for values outside those given below.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    num_train_timesteps: int = 1000
    """Number of timesteps T, at least 1."""
    beta_schedule: BetaSchedule = "scaled_linear"
    """linear (Ho et al. 2020), scaled_linear (linear in sqrt(beta), Rombach et al. 2022) or cosine (Nichol & Dhariwal
    2021, eq. 17, betas capped at 0.999), which ignores beta_start and beta_end."""
    beta_start: float = 0.00085
    """First beta, above 0."""
    beta_end: float = 0.012
    """Last beta, at least beta_start and below 1."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts: epsilon, v_prediction (Salimans & Ho 2022) or sample (the clean latents)."""
    timestep_spacing: TimestepSpacing = "trailing"
    """Which timesteps a sampling run takes: leading, linspace or trailing (Lin et al. 2024, table 2)."""
    steps_offset: int = 1
    """Timesteps by which leading spacing is shifted, 0 .. T-1; Stable Diffusion has 1."""
    set_alpha_to_one: bool = True
    """Whether DDIM's last step ends at abar = 1 (true) or at abar[0] (false)."""
    rescale_betas_zero_snr: bool = False
    """Make the last timestep pure noise, abar[T-1] = 0 (Lin et al. 2024, algorithm 1); not with epsilon."""

    def __post_init__(self) -> None:
        choices = {
            "beta_schedule": BetaSchedule,
            "prediction_type": PredictionType,
            "timestep_spacing": TimestepSpacing,
        }
        for field, known in choices.items():
            if getattr(self, field) not in get_args(known):
                raise ValueError(
                    f"{field} is {getattr(self, field)!r:.100}, must be one of {', '.join(get_args(known))}"
                )
        # Configs of other tools may hold anything; bool is a kind of int.
        for kind, names in _FIELDS_OF_KIND.items():
            for field in names:
                value = getattr(self, field)
                if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                    raise ValueError(f"{field} is {value!r:.100}, must be {_KIND_NAMES[kind]}")
        if not 1 <= self.num_train_timesteps <= 100_000:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}, must be in 1 .. 100000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}, must be 0 < beta_start <= beta_end < 1"
            )
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise ValueError(f"steps_offset is {self.steps_offset}, must be in 0 .. {self.num_train_timesteps - 1}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr is true with prediction_type epsilon, must be with v_prediction or sample: at "
                "pure noise epsilon says nothing about the image"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2, it is 1")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar: [T] float64 on the CPU, decreasing; abar[0] = 1 - beta[0], abar[T-1] = 0 if rescaled."""
        num = self.num_train_timesteps
        exact = {"dtype": torch.float64, "device": "cpu"}  # independent of the default device
        if self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, num, **exact)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, num, **exact) ** 2
        else:
            f = [cos((t / num + 0.008) / 1.008 * pi / 2) ** 2 for t in range(num + 1)]
            betas = torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(num)], **exact)
        abar = torch.cumprod(1 - betas, dim=0)
        if not self.rescale_betas_zero_snr:
            return abar
        root = abar.sqrt()
        return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    @property
    def final_alpha_cumprod(self) -> float:
        """The abar at which DDIM's last step ends."""
        return 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0].item()

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level of a timestep in 0 .. T-1; between trained ones sigma / alpha is interpolated linearly."""
        assert 0 <= timestep <= self.num_train_timesteps - 1
        if timestep == int(timestep):
            abar = self.alphas_cumprod[int(timestep)].item()
            return NoiseLevel(int(timestep), sqrt(abar), sqrt(1 - abar))
        sigma_karras = float(np.interp(timestep, np.arange(self.num_train_timesteps), self._sigmas_karras))
        return _level_of_sigma_karras(float(timestep), sigma_karras)

    def level_of_sigma_karras(self, sigma_karras: float) -> NoiseLevel:
        """The noise level with that sigma / alpha; its timestep is interpolated in the logarithm of sigma / alpha."""
        assert sigma_karras > 0
        timestep = np.interp(log(sigma_karras), np.log(self._sigmas_karras), np.arange(self.num_train_timesteps))
        return _level_of_sigma_karras(float(timestep), sigma_karras)

    @property
    def largest_sigma_karras(self) -> float:
        """The largest finite sigma / alpha; where abar[T-1] is 0, that of abar = 2^-24."""
        return float(self._sigmas_karras[-1])

    @cached_property
    def _sigmas_karras(self) -> np.ndarray:
        """sigma / alpha of all timesteps, finite and never decreasing: [T] float64."""
        abar = self.alphas_cumprod
        if abar[-1] == 0:
            abar = abar.clamp(min=SMALLEST_ALPHA_CUMPROD)
        return ((1 - abar) / abar).sqrt().numpy()

    def alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at `timesteps`: two float32 [B, 1, 1, 1] on the device of `like`.

        On CUDA the host does not wait, except for the first call per device, which uploads the table.
        """
        alpha, sigma = _alpha_sigma_table(self, like.device)[:, timesteps].view(2, -1, 1, 1, 1)
        return alpha, sigma

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents at `timesteps` (Ho et al. 2020, eq. 4), in the dtype of `latents`."""
        assert latents.shape == noise.shape and timesteps.shape == latents.shape[:1]
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return (alpha * latents + sigma * noise).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect network returns at `timesteps` (see `prediction`)."""
        assert latents.shape == noise.shape and timesteps.shape == latents.shape[:1]
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return PREDICTIONS[self.prediction_type].target(alpha, sigma, latents, noise)

    def predict_x0(self, output: Tensor, noisy_latents: Tensor, level: NoiseLevel) -> Tensor:
        """The clean latents that the network's output implies, in the dtype of `noisy_latents`.

        The whole batch is at one noise level, on or between the trained timesteps.
        """
        assert output.shape == noisy_latents.shape
        return PREDICTIONS[self.prediction_type].x0(level.alpha, level.sigma, noisy_latents, output)


def _level_of_sigma_karras(timestep: float, sigma_karras: float) -> NoiseLevel:
    alpha = 1 / sqrt(sigma_karras**2 + 1)
    return NoiseLevel(timestep, alpha, sigma_karras * alpha)


@cache
def _alpha_sigma_table(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """[2, T] float32 on `device`: the square roots are taken in float64, where 1 - abar[0] is still exact."""
    abar = schedule.alphas_cumprod
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float().to(device)
