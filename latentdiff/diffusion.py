"""The forward process and the training loss: what the noise is, what the network is asked for, how both are undone.

Notation of Ho et al. 2020 (DDPM), with 0-based timesteps t = 0 .. T-1 as in diffusers:

    abar[t] = prod_{s <= t} (1 - beta[s])    alpha = sqrt(abar), sigma = sqrt(1 - abar)    alpha^2 + sigma^2 = 1
    noisy_latents = alpha * latents + sigma * noise                                        (eq. 4)

Shapes: latents, noise and network output [B, C, h, w]; timesteps [B] int64 on the same device; context [B, L, D].
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from math import cos, inf, log, pi, sqrt
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
ErrorName = Literal["mse", "l1", "huber"]
Weighting = Literal["constant", "min_snr", "p2"]

# diffusers scheduler classes whose configs can be read, by the timestep_spacing each one takes when the key is missing.
_DIFFUSERS_SPACING: dict[str, TimestepSpacing] = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "DEISMultistepScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "DPMSolverSinglestepScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "EulerDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "KDPM2AncestralDiscreteScheduler": "linspace",
    "KDPM2DiscreteScheduler": "linspace",
    "LCMScheduler": "leading",
    "LMSDiscreteScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
}
# The classes that default to Stable Diffusion's beta range; every other one defaults to DDPM's. LCMScheduler alone
# defaults to "scaled_linear", all others to "linear".
_STABLE_DIFFUSION_BETAS = (
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
)
_DIFFUSERS_COSINE = "squaredcos_cap_v2"


@dataclass(frozen=True)
class NoiseLevel:
    """A place between data and noise: x = alpha * x0 + sigma * noise, with alpha^2 + sigma^2 = 1.

    timestep: what the network is told there; not an integer between two trained ones.
    """

    timestep: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level ("sigma") of Karras et al. 2022 and k-diffusion; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else inf

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), lambda in Lu et al. 2022; inf for clean data."""
        if self.sigma == 0:
            return inf
        return log(self.alpha / self.sigma) if self.alpha > 0 else -inf


CLEAN = NoiseLevel(timestep=-1, alpha=1.0, sigma=0.0)
# abar where a schedule's last one is 0, for samplers that compute with sigma / alpha; the value is diffusers'.
SMALLEST_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training makes small: an error of the network's output, and how much each noise level counts.

    error: "mse", "l1" or "huber": d^2 / 2 up to |d| = huber_delta, from there huber_delta (|d| - huber_delta / 2).
    weighting: "constant" leaves each sample's error as it is; "min_snr" weighs the squared error of x0 by
        min(SNR, min_snr_gamma) (Hang et al. 2023, eq. 7), "p2" the squared error of epsilon by (1 + SNR)^-p2_gamma
        (Choi et al. 2022, eq. 8), where SNR = alpha^2 / sigma^2. Other predictions get the factor that makes it the
        same objective for the squared error; l1 and huber take that factor as it is.

    Raises ValueError, naming the field, for values outside these.
    """

    error: ErrorName = "mse"
    huber_delta: float = 1.0
    weighting: Weighting = "constant"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0

    def __post_init__(self) -> None:
        for field, known in {"error": ErrorName, "weighting": Weighting}.items():
            if getattr(self, field) not in get_args(known):
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be one of {', '.join(get_args(known))}")
        for field in ("huber_delta", "min_snr_gamma"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}, must be above 0")
        if not self.p2_gamma >= 0:
            raise ValueError(f"p2_gamma is {self.p2_gamma}, must be at least 0")

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """The error of each sample, not weighted: [B, C, h, w] twice -> [B] float32."""
        output, target = output.float(), target.float()
        if self.error == "mse":
            values = (output - target).square()
        elif self.error == "l1":
            values = (output - target).abs()
        else:
            values = F.huber_loss(output, target, reduction="none", delta=self.huber_delta)
        return values.mean(dim=(1, 2, 3))


MEAN_SQUARED_ERROR = Objective()


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule and the network's parameterisation; diffusers' config keys.

    num_train_timesteps: T, at least 1.
    beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (linear in sqrt(beta), Rombach et al. 2022), or "cosine"
        (Nichol & Dhariwal 2021, eq. 17, betas capped at 0.999), which ignores beta_start and beta_end.
    beta_start, beta_end: 0 < beta_start <= beta_end < 1.
    prediction_type: what the network returns: the noise, v (Salimans & Ho 2022), or the clean latents ("sample").
    timestep_spacing, steps_offset: how `spacing` picks the steps of a sampling run; the offset (0 .. T-1) shifts
        "leading" only.
    set_alpha_to_one: whether DDIM's last step ends at abar = 1 (True) or at abar[0] (False).
    rescale_betas_zero_snr: shift and scale sqrt(abar) so that abar[T-1] = 0, pure noise (Lin et al. 2024, algorithm 1);
        not with "epsilon", which says nothing about the picture there.
    clip_sample: whether sampling clamps the predicted clean latents to [-1, 1]: right for pixels, wrong for latents.

    Raises ValueError, naming the field, for values outside these.
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "trailing"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = False

    def __post_init__(self) -> None:
        choices = {
            "beta_schedule": BetaSchedule,
            "prediction_type": PredictionType,
            "timestep_spacing": TimestepSpacing,
        }
        for field, known in choices.items():
            if getattr(self, field) not in get_args(known):
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be one of {', '.join(get_args(known))}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}, must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}, must be 0 < beta_start <= beta_end < 1"
            )
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise ValueError(f"steps_offset is {self.steps_offset}, must be in 0 .. {self.num_train_timesteps - 1}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr is true with prediction_type epsilon, must be with v_prediction or sample: at "
                "pure noise epsilon tells nothing about the picture"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2, it is 1")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar: [T] float64 on the CPU, decreasing; abar[0] = 1 - beta[0], rescaled to a last one of 0 or not."""
        num = self.num_train_timesteps
        exact = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is
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
        """The abar that DDIM's last step goes to."""
        return 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0].item()

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level of a timestep in 0 .. T-1; between trained ones sigma / alpha is interpolated linearly."""
        assert 0 <= timestep <= self.num_train_timesteps - 1
        if timestep == int(timestep):
            abar = self.alphas_cumprod[int(timestep)].item()
            return NoiseLevel(int(timestep), sqrt(abar), sqrt(1 - abar))
        ratio = float(np.interp(timestep, np.arange(self.num_train_timesteps), self._ratios))
        return _level_of_ratio(float(timestep), ratio)

    def level_of_ratio(self, ratio: float) -> NoiseLevel:
        """The noise level with sigma / alpha = ratio; its timestep is interpolated in the logarithm of the ratio."""
        assert ratio > 0
        timestep = np.interp(log(ratio), np.log(self._ratios), np.arange(self.num_train_timesteps))
        return _level_of_ratio(float(timestep), ratio)

    @property
    def largest_ratio(self) -> float:
        """The largest finite sigma / alpha; where abar[T-1] is 0, that of abar = 2^-24."""
        return float(self._ratios[-1])

    @cached_property
    def _ratios(self) -> np.ndarray:
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
        """What a perfect network returns; v = alpha * noise - sigma * latents (Salimans & Ho 2022, section 4)."""
        assert latents.shape == noise.shape and timesteps.shape == latents.shape[:1]
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return alpha * noise - sigma * latents

    def predict_x0(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that the network's output stands for, in the dtype of `noisy_latents`."""
        assert output.shape == noisy_latents.shape and timesteps.shape == output.shape[:1]
        return self._x0(output, noisy_latents, *self.alpha_sigma(timesteps, noisy_latents))

    def predict_x0_at(self, output: Tensor, noisy_latents: Tensor, level: NoiseLevel) -> Tensor:
        """`predict_x0` where the whole batch is at one noise level, on or between the trained timesteps.

        This is what sampling sees: clamped to [-1, 1] with `clip_sample`.
        """
        assert output.shape == noisy_latents.shape
        # The formulas of `_x0` in two operations instead of three: this is done at every step of a sampling run
        if self.prediction_type == "sample":
            x0 = output.to(noisy_latents.dtype)
        elif self.prediction_type == "epsilon":
            x0 = torch.add(noisy_latents, output, alpha=-level.sigma) / level.alpha
        else:
            x0 = torch.add(noisy_latents * level.alpha, output, alpha=-level.sigma)
        # The product keeps what is not finite so: it is not to end up as black or white.
        return x0.clamp(-1.0, 1.0) + 0 * x0 if self.clip_sample else x0

    def _x0(self, output: Tensor, noisy_latents: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        if self.prediction_type == "epsilon":
            x0 = (noisy_latents - sigma * output) / alpha
        elif self.prediction_type == "sample":
            x0 = output
        else:
            x0 = alpha * noisy_latents - sigma * output
        return x0.to(noisy_latents.dtype)

    def predict_epsilon(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that the network's output stands for, in the dtype of `noisy_latents`."""
        assert output.shape == noisy_latents.shape and timesteps.shape == output.shape[:1]
        alpha, sigma = self.alpha_sigma(timesteps, noisy_latents)
        if self.prediction_type == "epsilon":
            epsilon = output
        elif self.prediction_type == "sample":
            epsilon = (noisy_latents - alpha * output) / sigma
        else:
            epsilon = alpha * output + sigma * noisy_latents
        return epsilon.to(noisy_latents.dtype)

    def loss(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        context: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        objective: Objective = MEAN_SQUARED_ERROR,
    ) -> Tensor:
        """The weighted error of each sample, [B] float32 (Ho et al. 2020, eq. 14); all randomness is an argument.

        model(noisy_latents, timesteps, context) returns the network's output, shaped like the latents.
        """
        output = model(self.add_noise(latents, noise, timesteps), timesteps, context)
        target = self.target(latents, noise, timesteps)
        assert output.shape == target.shape, f"model returned {tuple(output.shape)}, expected {tuple(target.shape)}"
        errors = objective.errors(output, target)
        if objective.weighting == "constant":
            return errors
        return errors * _weight_table(self, objective, errors.device)[timesteps]

    def loss_weights(self, objective: Objective) -> Tensor:
        """How much the error of the network's own output counts at each timestep: [T] float64 on the CPU."""
        abar = self.alphas_cumprod
        if objective.weighting == "constant":
            return torch.ones_like(abar)
        snr = abar / (1 - abar)
        # Of epsilon's squared error, which is SNR times that of x0; that of v is 1 + SNR = 1 / sigma^2 times.
        if objective.weighting == "min_snr":
            weights = (objective.min_snr_gamma / snr).clamp(max=1)
        else:
            weights = (1 + snr) ** -objective.p2_gamma
        if self.prediction_type == "epsilon":
            return weights
        return weights * (abar if self.prediction_type == "v_prediction" else snr)

    def to_scheduler_config(self) -> dict[str, Any]:
        """The scheduler_config.json of a diffusers DDIMScheduler with this schedule, every key written out."""
        return asdict(self) | {
            "_class_name": "DDIMScheduler",
            "beta_schedule": _DIFFUSERS_COSINE if self.beta_schedule == "cosine" else self.beta_schedule,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "sample_max_value": 1.0,
            "thresholding": False,
            "trained_betas": None,
        }

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler_config.json; missing keys take the defaults of the class it names.

        clip_sample is not looked at: whether there is an autoencoder decides (diffusers' own latent pipelines force it
        to false).
        Raises ValueError naming the key for an unknown _class_name and for what would change the schedule:
        trained_betas, thresholding, and the values NoiseSchedule itself refuses.
        """
        name = config.get("_class_name")
        if name not in _DIFFUSERS_SPACING:
            raise ValueError(f"_class_name is {name!r}, must be one of {', '.join(_DIFFUSERS_SPACING)}")
        for key in ("trained_betas", "thresholding"):
            if config.get(key) not in (None, False):
                raise ValueError(f"{key} is {config[key]!r} in the {name} config, only null or false is supported")
        stable_diffusion = name in _STABLE_DIFFUSION_BETAS
        values = {
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear" if name == "LCMScheduler" else "linear",
            "beta_start": 0.00085 if stable_diffusion else 0.0001,
            "beta_end": 0.012 if stable_diffusion else 0.02,
            "prediction_type": "epsilon",
            "timestep_spacing": _DIFFUSERS_SPACING[name],
            "steps_offset": 0,
            "set_alpha_to_one": name != "PNDMScheduler",
            "rescale_betas_zero_snr": False,
        }
        values |= {key: config[key] for key in values if key in config}
        if values["beta_schedule"] == _DIFFUSERS_COSINE:
            values["beta_schedule"] = "cosine"
        return cls(**values)


def _level_of_ratio(timestep: float, ratio: float) -> NoiseLevel:
    alpha = 1 / sqrt(ratio**2 + 1)
    return NoiseLevel(timestep, alpha, ratio * alpha)


@cache
def _weight_table(schedule: NoiseSchedule, objective: Objective, device: torch.device) -> Tensor:
    return schedule.loss_weights(objective).float().to(device)


@cache
def _alpha_sigma_table(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """[2, T] float32 on `device`: the square roots are taken in float64, where 1 - abar[0] is still exact."""
    abar = schedule.alphas_cumprod
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float().to(device)


def drop_captions(condition: Tensor, empty: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Caption dropout for classifier-free guidance (Ho & Salimans 2022, algorithm 1), drawn per sample.

    condition: input_ids [B, L] or context [B, L, D]; empty: that of the empty caption, [L] or [L, D]; uniform [B] in
    [0, 1). Rows with uniform < probability are replaced, so 0 keeps every caption and 1 keeps none.
    """
    assert uniform.shape == condition.shape[:1] and empty.shape == condition.shape[1:]
    dropped = (uniform < probability).view(-1, *[1] * empty.ndim)
    return torch.where(dropped, empty, condition)
