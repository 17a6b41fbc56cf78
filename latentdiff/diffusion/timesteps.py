"""The noise levels of a sampling run: from a number of steps to levels that descend from noise to data.

A schedule's timestep_spacing (Lin et al. 2024, table 2) says which trained timesteps are used. diffusers' schedulers
interpret it in three ways, here called grids. All three are implemented, so that a model folder gives the same image
here and in diffusers:

| grid        | diffusers classes       | linspace, n steps                          | leading                   |
|-------------|-------------------------|--------------------------------------------|---------------------------|
| "ddim"      | DDPM, DDIM, PNDM        | n timesteps, rounded                       | multiples of T // n       |
| "euler"     | Euler, Heun, DPM2, LMS  | n timesteps, not rounded                   | multiples of T // n       |
| "dpmsolver" | DPM-Solver, UniPC, DEIS | n + 1 timesteps, rounded; t = 0 is dropped | multiples of T // (n + 1) |

"trailing" is the same in all three. Alternatively, the levels are spaced by their noise: "karras" (Karras et al. 2022,
eq. 5, rho = 7), "exponential" (evenly in the logarithm of sigma / alpha) or "beta" (Lee et al. 2024, quantiles of
Beta(0.6, 0.6)).
"""

from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Literal, get_args

import numpy as np

from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule

TimestepGrid = Literal["ddim", "euler", "dpmsolver"]
Sigmas = Literal["schedule", "karras", "exponential", "beta"]


def sampling_levels(
    schedule: NoiseSchedule, num_inference_steps: int, grid: TimestepGrid = "ddim", sigmas: Sigmas = "schedule"
) -> list[NoiseLevel]:
    """The noise levels of a sampling run: one per step, then a last one without noise. Noise strictly decreases.

    Timesteps and noise equal those of the diffusers schedulers of the grid, with two exceptions. Where diffusers
    truncates the timesteps of "exponential" or "beta" sigmas (or of a cosine schedule) to integers, they are rounded
    here. Where KDPM2 rounds the timesteps of "karras" sigmas, they are kept here, as in the other classes of its grid.

    Raises ValueError if num_inference_steps is not in 1 .. T or too large for the spacing, or if steps_offset moves the
    first timestep past T - 1.
    """
    assert grid in get_args(TimestepGrid)
    if sigmas not in get_args(Sigmas):
        raise ValueError(f"sigmas is {sigmas!r}, must be one of {', '.join(get_args(Sigmas))}")
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, must be in 1 .. {total} (num_train_timesteps)")
    if sigmas == "schedule":
        levels = [schedule.level(t) for t in _timesteps(schedule, num_inference_steps, grid)]
        if grid in ("euler", "dpmsolver"):
            levels = [_finite(schedule, level) for level in levels]
    else:
        levels = _levels_by_noise(schedule, num_inference_steps, grid, sigmas)
    for level, after in pairwise(levels):
        if after.sigma_karras >= level.sigma_karras:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, too many for this sampler with "
                f"{schedule.timestep_spacing} spacing: timesteps {level.timestep:g} and {after.timestep:g} have the "
                f"same noise; take fewer steps"
            )
    return [*levels, CLEAN]


def _timesteps(schedule: NoiseSchedule, steps: int, grid: TimestepGrid) -> list[float]:
    """The timesteps of a sampling run, descending."""
    total, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    # "dpmsolver" counts one timestep more and drops the last one, t = 0.
    count = steps + 1 if grid == "dpmsolver" else steps
    if spacing == "leading":
        timesteps = np.arange(count)[::-1] * (total // count) + schedule.steps_offset
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count)[::-1]
        timesteps = timesteps if grid == "euler" else timesteps.round()
    else:
        # Rounding can give diffusers an extra timestep of -1 (T = 1000, 61 steps); here it is left out.
        timesteps = np.arange(total, 0, -total / steps).round() - 1
    if timesteps[0] >= total:
        raise ValueError(
            f"steps_offset {schedule.steps_offset} moves the first of {steps} steps to timestep {timesteps[0]:.0f}, "
            f"past the last one, {total - 1}: take fewer steps or a smaller steps_offset"
        )
    return timesteps[:steps].tolist()


def _levels_by_noise(schedule: NoiseSchedule, steps: int, grid: TimestepGrid, sigmas: Sigmas) -> list[NoiseLevel]:
    """Levels spaced by sigma / alpha, between the noisiest and the cleanest level that the grid would use."""
    if grid == "dpmsolver":
        ends = [schedule.num_train_timesteps - 1, 0]
    else:
        timesteps = _timesteps(schedule, steps, grid)
        ends = [timesteps[0], timesteps[-1]]
    high, low = (_finite(schedule, schedule.level(t)).sigma_karras for t in ends)
    ramp = np.linspace(0, 1, steps)
    if sigmas == "karras":
        sigmas_karras = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif sigmas == "exponential":
        sigmas_karras = np.exp(log(high) + ramp * (log(low) - log(high)))
    else:
        from scipy.stats import beta  # slow to import and rarely needed

        sigmas_karras = low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    levels = [schedule.level_of_sigma_karras(float(sigma_karras)) for sigma_karras in sigmas_karras]
    if grid == "euler":
        return levels
    return [NoiseLevel(round(level.timestep), level.alpha, level.sigma) for level in levels]


def _finite(schedule: NoiseSchedule, level: NoiseLevel) -> NoiseLevel:
    """The level itself, or where sigma / alpha is infinite (zero terminal SNR), the one with the largest finite value.

    The timestep stays.
    """
    if level.sigma_karras <= schedule.largest_sigma_karras:
        return level
    return replace(schedule.level_of_sigma_karras(schedule.largest_sigma_karras), timestep=level.timestep)
