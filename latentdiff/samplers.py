"""Samplers: functions that turn unit Gaussian noise into latents. All have one signature:

    sampler(denoise, x, schedule, timesteps, generators, callback=None, **options) -> x

denoise(x, timestep) -> x0: the predicted clean latents, in the shape and dtype of x. Guidance and the conversion from
    the network's output (schedule.predict_x0) are the caller's.
x: [B, C, h, w], unit Gaussian noise, left unchanged. The result has its shape, dtype and device.
timesteps: strictly descending, in 0 .. T-1, as from diffusion.sampling_timesteps.
generators: one torch.Generator per image, on the CPU; see randn.
callback(step_index, timestep, x, x0): called after each step with the new x and the x0 it was made with.

Every step goes from its timestep to the next one in the list, and the last one to clean latents (abar = 1; ddim:
schedule.final_alpha_cumprod) without adding noise. Coefficients are computed in float64, then applied in x's dtype.
Nothing is recorded for autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log, sqrt

import torch
from torch import Tensor

from latentdiff.diffusion import NoiseSchedule

Denoiser = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Unit Gaussian noise [B, *shape], image i drawn from generators[i].

    Drawn on the CPU in float32 and then moved, so that an image gets the same numbers alone or in a batch, on any
    device, and in any dtype up to rounding.
    """
    noise = [torch.randn(*shape, generator=g, device="cpu", dtype=torch.float32) for g in generators]
    return torch.stack(noise).to(device, dtype)


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, eq. 6-7; diffusers' "fixed_small").

    With fewer than T steps, alpha = abar / abar_next is that of the respaced chain (Nichol & Dhariwal 2021, eq. 19).
    """
    assert len(generators) == len(x)
    for step, timestep, abar, abar_next in _steps(schedule, timesteps, final_abar=1.0):
        x0 = denoise(x, timestep)
        alpha = abar / abar_next
        beta = 1 - alpha
        x = (sqrt(abar_next) * beta / (1 - abar)) * x0 + (sqrt(alpha) * (1 - abar_next) / (1 - abar)) * x
        if step < len(timesteps) - 1:
            std = sqrt((1 - abar_next) / (1 - abar) * beta)
            x = x + std * randn(x.shape[1:], generators, x.device, x.dtype)
        if callback is not None:
            callback(step, timestep, x, x0)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    eta in [0, 1] scales the fresh noise: 0 is deterministic and draws none, 1 is ddpm. ValueError outside.

    diffusers steps from t to t - T // n rather than to the next timestep of its own list. The two agree for "leading"
    spacing, and for "trailing" when the number of steps n divides T; elsewhere diffusers' x is at another noise level
    than the timestep it is next denoised at.
    """
    assert len(generators) == len(x)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, must be in [0, 1]")
    for step, timestep, abar, abar_next in _steps(schedule, timesteps, schedule.final_alpha_cumprod):
        x0 = denoise(x, timestep)
        last = step == len(timesteps) - 1
        std = 0.0 if last else eta * sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        # Eq. 12, with epsilon = (x - sqrt(abar) * x0) / sqrt(1 - abar).
        x = sqrt(abar_next) * x0 + sqrt((1 - abar_next - std**2) / (1 - abar)) * (x - sqrt(abar) * x0)
        if std > 0:
            x = x + std * randn(x.shape[1:], generators, x.device, x.dtype)
        if callback is not None:
            callback(step, timestep, x, x0)
    return x


@torch.no_grad()
def dpm_solver_pp_2m(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), deterministic, second order from the second step on (Lu et al. 2022b, algorithm 2).

    The last step, to sigma = 0, is first order, as in diffusers' DPMSolverMultistepScheduler (its defaults with
    final_sigmas_type "zero"; its "leading" and "linspace" timesteps differ from the DDIM ones used here).
    """
    assert len(generators) == len(x)
    previous_x0, previous_h = x, 0.0
    for step, timestep, abar, abar_next in _steps(schedule, timesteps, final_abar=1.0):
        x0 = d = denoise(x, timestep)
        alpha, sigma = sqrt(abar), sqrt(1 - abar)
        alpha_next, sigma_next = sqrt(abar_next), sqrt(1 - abar_next)
        if step < len(timesteps) - 1:
            h = log(alpha_next / sigma_next) - log(alpha / sigma)
            if step > 0:
                r = previous_h / h
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
            previous_x0, previous_h = x0, h
        # alpha_next * (1 - exp(-h)) written without h, which is infinite on the last step.
        x = (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * d
        if callback is not None:
            callback(step, timestep, x, x0)
    return x


def _steps(
    schedule: NoiseSchedule, timesteps: Sequence[int], final_abar: float
) -> Iterator[tuple[int, int, float, float]]:
    """Yield (step index, timestep, its abar, the next timestep's abar), with `final_abar` after the last."""
    assert len(timesteps) > 0 and timesteps[-1] >= 0 and all(t > following for t, following in pairwise(timesteps))
    abar = [*schedule.alphas_cumprod[list(timesteps)].tolist(), final_abar]
    for step, timestep in enumerate(timesteps):
        yield step, timestep, abar[step], abar[step + 1]


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpm_solver_pp_2m}


def get_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of that name; ValueError listing the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, must be one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
