"""Where the steps of a sampling run lie: a number of steps -> noise levels from noise to data.

A schedule's timestep_spacing (Lin et al. 2024, table 2) says which trained timesteps are taken. diffusers' schedulers
read it in three ways, and so do we, so that a folder draws the same image here as there:

| layout     | classes                                | linspace of n steps          | leading                   |
|------------|----------------------------------------|------------------------------|---------------------------|
| "integer"  | DDPM, DDIM, PNDM                       | n timesteps, rounded         | multiples of T // n       |
| "real"     | Euler, Heun, DPM2, LMS                 | n timesteps, not rounded     | multiples of T // n       |
| "interval" | DPM-Solver, UniPC, DEIS                | n of n + 1, without t = 0    | multiples of T // (n + 1) |

"trailing" is one and the same. Instead, the steps may be laid out by their noise: Karras et al. 2022, eq. 5 (rho = 7),
"exponential" (evenly in its logarithm) or "beta" (Lee et al. 2024, quantiles of Beta(0.6, 0.6)).
"""

from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Literal, get_args

import numpy as np

from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule

Layout = Literal["integer", "real", "interval"]
Sigmas = Literal["schedule", "karras", "exponential", "beta"]


def sampling_levels(
    schedule: NoiseSchedule, num_inference_steps: int, layout: Layout = "integer", sigmas: Sigmas = "schedule"
) -> list[NoiseLevel]:
    """The noise levels of a sampling run: one a step, and a last one without noise. Noise decreases strictly.

    Timesteps and noise are those of the diffusers scheduler of the layout, except: where it cuts the fraction off a
    timestep of "exponential" or "beta" sigmas (or of a cosine schedule), it is rounded here. And where KDPM2 rounds
    those of "karras" sigmas, here they are kept, as in the other classes of its layout.

    Raises ValueError if num_inference_steps is not in 1 .. T or too large for the spacing, or if steps_offset moves the
    first timestep past T - 1.
    """
    assert layout in get_args(Layout)
    if sigmas not in get_args(Sigmas):
        raise ValueError(f"sigmas is {sigmas!r}, must be one of {', '.join(get_args(Sigmas))}")
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, must be in 1 .. {total} (num_train_timesteps)")
    if sigmas == "schedule":
        levels = [schedule.level(t) for t in _timesteps(schedule, num_inference_steps, layout)]
        if layout in ("real", "interval"):
            levels = [_finite(schedule, level) for level in levels]
    else:
        levels = _by_noise(schedule, num_inference_steps, layout, sigmas)
    for level, after in pairwise(levels):
        if after.sigma_karras >= level.sigma_karras:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, too many for this sampler with "
                f"{schedule.timestep_spacing} spacing: timesteps {level.timestep:g} and {after.timestep:g} do not "
                f"differ in noise; must be less"
            )
    return [*levels, CLEAN]


def _timesteps(schedule: NoiseSchedule, steps: int, layout: Layout) -> list[float]:
    """The timesteps that a sampling run visits, descending."""
    total, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    # One more than is used: the last one, t = 0, is left out.
    count = steps + 1 if layout == "interval" else steps
    if spacing == "leading":
        timesteps = np.arange(count)[::-1] * (total // count) + schedule.steps_offset
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count)[::-1]
        timesteps = timesteps if layout == "real" else timesteps.round()
    else:
        # diffusers may return one timestep of -1 more, from rounding (T = 1000, 61 steps); here it is left out.
        timesteps = np.arange(total, 0, -total / steps).round() - 1
    if timesteps[0] >= total:
        raise ValueError(
            f"steps_offset {schedule.steps_offset} moves the first of {steps} steps to timestep {timesteps[0]:.0f}, "
            f"past the last one, {total - 1}: take fewer steps or a smaller steps_offset"
        )
    return timesteps[:steps].tolist()


def _by_noise(schedule: NoiseSchedule, steps: int, layout: Layout, sigmas: Sigmas) -> list[NoiseLevel]:
    """Levels laid out by sigma / alpha, between the noisiest and the cleanest that the layout would take."""
    if layout == "interval":
        ends = [schedule.num_train_timesteps - 1, 0]
    else:
        timesteps = _timesteps(schedule, steps, layout)
        ends = [timesteps[0], timesteps[-1]]
    high, low = (_finite(schedule, schedule.level(t)).sigma_karras for t in ends)
    ramp = np.linspace(0, 1, steps)
    if sigmas == "karras":
        ratios = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif sigmas == "exponential":
        ratios = np.exp(log(high) + ramp * (log(low) - log(high)))
    else:
        from scipy.stats import beta  # slow to import, and rarely wanted

        ratios = low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    levels = [schedule.level_of_sigma_karras(float(ratio)) for ratio in ratios]
    if layout == "real":
        return levels
    return [NoiseLevel(round(level.timestep), level.alpha, level.sigma) for level in levels]


def _finite(schedule: NoiseSchedule, level: NoiseLevel) -> NoiseLevel:
    """Where sigma / alpha is infinite (a terminal SNR of zero), the level with the largest finite one instead."""
    if level.sigma_karras <= schedule.largest_sigma_karras:
        return level
    return replace(schedule.level_of_sigma_karras(schedule.largest_sigma_karras), timestep=level.timestep)
