"""Samplers: functions that turn unit Gaussian noise into latents. All have one signature:

    sampler(denoise, x, schedule, levels, generators, callback=None, **options) -> x

denoise(x, level) -> x0: the predicted clean latents, in the shape and dtype of x. Guidance and the conversion from
    the network's output (schedule.predict_x0) are up to the caller.
x: [B, C, h, w], unit Gaussian noise (or latents noised to levels[0]), not modified. The result has its shape, dtype
    and device.
levels: the n + 1 noise levels of n steps, noise strictly decreasing, as from `sampler.levels(schedule, n)`.
generators: one torch.Generator per image, on the CPU; see `randn`.
callback(step_index, timestep, x, x0): called after each step with the new x and the x0 used to compute it. An
    exception that it raises ends the sampling.

Every step goes from its level to the next one in the list. Coefficients are computed in float64 on the host and then
applied in x's dtype. Nothing is recorded for autograd.

A level has alpha and sigma (x = alpha x0 + sigma epsilon), sigma_karras = sigma / alpha and half_log_snr =
log(alpha / sigma) ("lambda"). x / alpha = x0 + sigma_karras * epsilon is the x of Karras et al. 2022, where the
probability-flow ODE is d(x / alpha) / d(sigma_karras) = epsilon.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, expm1, log, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.diffusion.timesteps import Sigmas, TimestepGrid, sampling_levels

# Steps from a level of almost pure noise are first order: sigma / alpha is in the thousands there, and a second-order
# slope would amplify the network's error as much.
SMALLEST_ALPHA = 1e-3
Denoiser = Callable[[Tensor, NoiseLevel], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Unit Gaussian noise [B, *shape], image i from generators[i].

    Generated on the CPU in float32 and then moved, so that an image gets the same numbers alone or in a batch, on any
    device, and in any dtype up to rounding.
    """
    noise = [torch.randn(*shape, generator=g, device="cpu", dtype=torch.float32) for g in generators]
    return torch.stack(noise).to(device, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler class and its registry

# steps(context, x, **options): makes one step after another; yields the new x and the x0 used to compute it.
Steps = Callable[..., Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Sampler:
    """A named sampler: a function with the signature above, and the noise levels it runs on.

    steps: the generator function that makes its steps.
    grid: the timesteps that it uses (see `timesteps`), unless its levels are spaced by noise.
    diffusers_class, diffusers_keys: the diffusers scheduler that makes the same steps, and its config.
    ends_at_schedule: whether it ends at schedule.final_alpha_cumprod instead of at clean data.
    """

    name: str
    steps: Steps
    grid: TimestepGrid
    diffusers_class: str
    diffusers_keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ends_at_schedule: bool = False

    def levels(
        self, schedule: NoiseSchedule, num_inference_steps: int, sigmas: Sigmas = "schedule"
    ) -> list[NoiseLevel]:
        """The num_inference_steps + 1 noise levels of a run; ValueError as in sampling_levels."""
        levels = sampling_levels(schedule, num_inference_steps, self.grid, sigmas)
        if self.ends_at_schedule:
            abar = schedule.final_alpha_cumprod
            last = NoiseLevel(-1, sqrt(abar), sqrt(1 - abar))
            # A run that already is at t = 0 stays there.
            levels[-1] = last if last.sigma < levels[-2].sigma else levels[-2]
        return levels

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: NoiseSchedule,
        levels: Sequence[NoiseLevel],
        generators: Sequence[torch.Generator],
        callback: Callback | None = None,
        **options: float,
    ) -> Tensor:
        assert len(generators) == len(x) and len(levels) >= 2
        assert all(after.sigma <= level.sigma for level, after in pairwise(levels))
        shape, device, dtype = x.shape[1:], x.device, x.dtype
        context = Context(denoise, schedule, levels, lambda: randn(shape, generators, device, dtype))
        for step, (following, x0) in enumerate(self.steps(context, x, **options)):
            x = following
            if callback is not None:
                callback(step, levels[step].timestep, x, x0)
        return x


class Context(NamedTuple):
    """What the steps of a sampler need. noise() returns fresh unit Gaussian noise like x."""

    denoise: Denoiser
    schedule: NoiseSchedule
    levels: Sequence[NoiseLevel]
    noise: Callable[[], Tensor]

    def steps(self) -> Iterator[tuple[NoiseLevel, NoiseLevel]]:
        """The start and the end of each step."""
        return pairwise(self.levels)


SAMPLERS: dict[str, Sampler] = {}


def _sampler(name: str, diffusers_class: str, *, grid: TimestepGrid, **options: Any) -> Callable[[Steps], Sampler]:
    def register(steps: Steps) -> Sampler:
        sampler = Sampler(name, steps, grid, diffusers_class, **options)
        SAMPLERS[name] = sampler
        return sampler

    return register


def get_sampler(name: str) -> Sampler:
    """The sampler with that name; ValueError that lists the known ones otherwise."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, must be one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


# ----------------------------------------------------------------------------------------------------------------------
# Steps that several samplers share


def _epsilon(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The noise in x, given the clean latents x0."""
    return (x - level.alpha * x0) / level.sigma


def _towards(x: Tensor, x0: Tensor, level: NoiseLevel, after: NoiseLevel, sigma: float | None = None) -> Tensor:
    """First order: keep x0 and the noise, use alpha and sigma of `after` (Song et al. 2021, eq. 12).

    sigma: how much of the old noise is kept if the step adds fresh noise; default after.sigma.
    """
    scale = (after.sigma if sigma is None else sigma) / level.sigma
    return torch.add(scale * x, x0, alpha=after.alpha - level.alpha * scale)


def _along(x: Tensor, slope: Tensor, level: NoiseLevel, after: NoiseLevel) -> Tensor:
    """Follow d(x / alpha) / d(sigma_karras) = slope in a straight line from `level` to `after`."""
    return torch.add(
        (after.alpha / level.alpha) * x, slope, alpha=after.alpha * (after.sigma_karras - level.sigma_karras)
    )


def _fresh_sigma(level: NoiseLevel, after: NoiseLevel) -> float:
    """Standard deviation of the noise that a step of the reverse Markov chain adds (Ho et al. 2020, eq. 7)."""
    # 1 - abar / abar_after of the respaced chain, in a form that is exact for close levels and for pure noise
    beta = (level.sigma**2 * after.alpha**2 - level.alpha**2 * after.sigma**2) / after.alpha**2
    return after.sigma / level.sigma * sqrt(max(beta, 0.0))


# ----------------------------------------------------------------------------------------------------------------------
# First order


@_sampler("ddpm", "DDPMScheduler", grid="ddim")
def ddpm(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, eq. 6-7; diffusers' "fixed_small").

    With fewer than T steps, alpha = abar / abar_next is the one of the respaced chain (Nichol & Dhariwal 2021, eq. 19).
    """
    return _ancestral(context, x, eta=1.0)


@_sampler("ddim", "DDIMScheduler", grid="ddim", ends_at_schedule=True)
def ddim(context: Context, x: Tensor, *, eta: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    eta in [0, 1] scales the fresh noise: 0 is deterministic and uses no random numbers, 1 is ddpm. ValueError
    for other values.

    diffusers steps from t to t - T // n rather than to the next timestep of its own list. The two agree for "leading"
    spacing, and for "trailing" if the number of steps n divides T. Otherwise diffusers' x is not at the noise level
    of the timestep that the network gets next.
    """
    return _ancestral(context, x, eta)


@_sampler("euler", "EulerDiscreteScheduler", grid="euler")
def euler(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler steps of the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn).

    The same step as ddim's with eta = 0, on another grid of timesteps.

    For "linspace" and "trailing" spacing diffusers starts from noise of standard deviation sigma / alpha in x / alpha,
    as its other schedulers that keep x / alpha do. In x that is sigma of the first level (0.998 for Stable Diffusion)
    instead of 1.
    """
    return _ancestral(context, x, eta=0.0)


@_sampler("euler_ancestral", "EulerAncestralDiscreteScheduler", grid="euler")
def euler_ancestral(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler steps to below the next level, then fresh noise up to it (k-diffusion): ddpm's steps on euler's grid.

    With levels spaced by noise it equals k-diffusion's sampler; diffusers' class has no such levels.
    """
    return _ancestral(context, x, eta=1.0)


def _ancestral(context: Context, x: Tensor, eta: float) -> Iterator[tuple[Tensor, Tensor]]:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, must be in [0, 1]")
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        last = step == len(context.levels) - 2
        fresh = 0.0 if last else eta * _fresh_sigma(level, after)
        x = _towards(x, x0, level, after, sqrt(after.sigma**2 - fresh**2))
        if fresh > 0:
            x = x + fresh * context.noise()
        yield x, x0


# ----------------------------------------------------------------------------------------------------------------------
# Higher order by a second evaluation within the step


@_sampler("heun", "HeunDiscreteScheduler", grid="euler")
def heun(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Second order: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1 without churn).

    Two evaluations per step, one in the last.
    """
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        predicted = _towards(x, x0, level, after)
        if after.sigma > 0 and level.alpha > SMALLEST_ALPHA:
            slope = (_epsilon(x, x0, level) + _epsilon(predicted, context.denoise(predicted, after), after)) / 2
            predicted = _along(x, slope, level, after)
        x = predicted
        yield x, x0


@_sampler("dpm2", "KDPM2DiscreteScheduler", grid="euler")
def dpm2(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Second order: the slope at the middle of the step in log(sigma / alpha) (k-diffusion's DPM2).

    The idea is that of Karras et al. 2022, algorithm 2, without churn. Two evaluations per step, one in the last.

    diffusers rounds the timesteps of Karras sigmas, but not those of the midpoints; here no timestep is rounded.
    """
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        if after.sigma > 0:
            x = _midpoint(context, x, x0, level, after)
        else:
            x = _towards(x, x0, level, after)
        yield x, x0


@_sampler("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", grid="euler")
def dpm2_ancestral(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """dpm2 to below the next level, then fresh noise up to it (k-diffusion). For diffusers see dpm2."""
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        if after.sigma > 0:
            fresh = _fresh_sigma(level, after)
            # x / alpha goes to below the next level's sigma / alpha, then the noise is added to it.
            below = context.schedule.level_of_sigma_karras(sqrt(after.sigma**2 - fresh**2) / after.alpha)
            x = _midpoint(context, x, x0, level, below)
            x = (after.alpha / below.alpha) * x + fresh * context.noise()
        else:
            x = _towards(x, x0, level, after)
        yield x, x0


def _midpoint(context: Context, x: Tensor, x0: Tensor, level: NoiseLevel, after: NoiseLevel) -> Tensor:
    if level.alpha <= SMALLEST_ALPHA:
        return _towards(x, x0, level, after)
    middle = context.schedule.level_of_sigma_karras(sqrt(level.sigma_karras * after.sigma_karras))
    inside = _towards(x, x0, level, middle)
    return _along(x, _epsilon(inside, context.denoise(inside, middle), middle), level, after)


@_sampler("dpm++2s", "DPMSolverSinglestepScheduler", grid="dpmsolver")
def dpm_solver_pp_2s(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2S): second order over pairs of steps, the first one being the inner evaluation (Lu et al. 2022b).

    Algorithm 1, with one evaluation per step, as diffusers counts steps. The last step, or the last two, are first
    order. diffusers' scheduler uses the steps of "linspace" for every timestep_spacing.
    """
    steps = list(context.steps())
    start, x_start, d_start = steps[0][0], x, x  # set by every first step of a pair
    for step, (level, after) in enumerate(steps):
        d = context.denoise(x, level)
        if step % 2 == 0 or step == len(steps) - 1:
            start, x_start, d_start = level, x, d
            x = _towards(x, d, level, after)
        else:
            h, h_inner = _log_step(start, after), _log_step(start, level)
            x = _solver_step(x_start, d_start + h / (2 * h_inner) * (d - d_start), start, after)
        yield x, d


# ----------------------------------------------------------------------------------------------------------------------
# Higher order by the evaluations of earlier steps


@_sampler("pndm", "PNDMScheduler", grid="ddim", diffusers_keys={"skip_prk_steps": True}, ends_at_schedule=True)
def pndm(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pseudo linear multistep, PLMS (Liu et al. 2022, eq. 9 and 12; Stable Diffusion 1's default sampler).

    Fourth-order Adams-Bashforth on epsilon, transferred by DDIM's step. Instead of the paper's Runge-Kutta steps the
    first step is repeated with the mean of the slopes at both ends: n + 1 evaluations for n steps.

    diffusers averages the network's outputs, which is the same for "epsilon" only, and steps from t to t - T // n (see
    ddim). ValueError if the first level is pure noise, where epsilon says nothing about x0.
    """
    if context.levels[0].alpha == 0:
        raise ValueError("pndm cannot start from zero terminal SNR (rescale_betas_zero_snr): use ddim or dpm++2m")
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    slopes: list[Tensor] = []
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        slopes = [_epsilon(x, x0, level), *slopes[:3]]
        slope = sum((w * s for w, s in zip(weights[len(slopes) - 1], slopes, strict=True)), torch.zeros_like(x))
        if step == 0 and len(context.levels) > 2:
            tried = _along(x, slope, level, after)
            slope = (slope + _epsilon(tried, context.denoise(tried, after), after)) / 2
        x = _along(x, slope, level, after)
        yield x, x0


@_sampler("lms", "LMSDiscreteScheduler", grid="euler")
def lms(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Linear multistep of order up to 4 (k-diffusion): epsilon as a polynomial in sigma / alpha, integrated exactly."""
    return _adams_bashforth(context, x, 4, lambda sigma_karras: sigma_karras)


@_sampler("deis", "DEISMultistepScheduler", grid="dpmsolver")
def deis(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Diffusion exponential integrator, "log-rho" of order 2 (Zhang & Chen 2023, tAB-DEIS).

    epsilon as a polynomial in log(sigma / alpha), integrated over sigma / alpha; the logarithm is integrable down to
    zero. With fewer than 15 steps the last one is first order, as in diffusers.

    The last step goes to clean data. In diffusers it goes to the noise of t = 0, which stays in the image; with levels
    spaced by noise, diffusers' last step changes nothing.
    """
    return _adams_bashforth(context, x, 2, log, first_order_end=len(context.levels) - 1 < 15)


def _adams_bashforth(
    context: Context,
    x: Tensor,
    order: int,
    variable: Callable[[float], float],
    *,
    first_order_end: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Adams-Bashforth on epsilon as a polynomial in variable(sigma_karras), of order up to `order`.

    first_order_end: whether the last step is first order.
    """
    slopes: list[Tensor] = []
    sigmas = [level.sigma_karras for level in context.levels]
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        slopes = [_epsilon(x, x0, level), *slopes[: order - 1]]
        used = 1 if first_order_end and step == len(sigmas) - 2 else len(slopes)
        weights = _lagrange_integrals(sigmas[step::-1][:used], sigmas[step + 1], variable)
        change = sum(weight * slope for weight, slope in zip(weights, slopes, strict=False))
        x = (after.alpha / level.alpha) * x + after.alpha * change
        yield x, x0


def _lagrange_integrals(nodes: Sequence[float], end: float, variable: Callable[[float], float]) -> list[float]:
    """Integrals over sigma_karras, from nodes[0] to `end`, of the Lagrange polynomials in `variable` of the nodes."""
    # Gauss-Legendre after the substitution sigma_karras = end + (start - end) u^2, which removes the logarithm's
    # singularity at zero
    u, w = np.polynomial.legendre.leggauss(48)
    u, w = (u + 1) / 2, w / 2
    width = nodes[0] - end
    points = np.array([variable(end + width * v**2) for v in u])
    positions = [variable(node) for node in nodes]
    integrals = []
    for j, position in enumerate(positions):
        others = [p for k, p in enumerate(positions) if k != j]
        values = np.prod([(points - p) / (position - p) for p in others], axis=0) if others else np.ones_like(points)
        integrals.append(float(-(w * 2 * u * width * values).sum()))
    return integrals


@_sampler("dpm++2m", "DPMSolverMultistepScheduler", grid="dpmsolver")
def dpm_solver_pp_2m(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M), deterministic, second order from the second step on (Lu et al. 2022b, algorithm 2).

    The last step, to sigma = 0, is first order, as in diffusers' DPMSolverMultistepScheduler.
    """
    return _multistep(context, x, order=2, stochastic=False)


@_sampler(
    "dpm++2m_sde",
    "DPMSolverMultistepScheduler",
    grid="dpmsolver",
    diffusers_keys={"algorithm_type": "sde-dpmsolver++"},
)
def dpm_solver_pp_2m_sde(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """SDE-DPM-Solver++(2M), second order from the second step on (Lu et al. 2022b, section 4.3 and appendix)."""
    return _multistep(context, x, order=2, stochastic=True)


@_sampler(
    "dpm++3m_sde",
    "DPMSolverMultistepScheduler",
    grid="dpmsolver",
    diffusers_keys={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
)
def dpm_solver_pp_3m_sde(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """SDE-DPM-Solver++ with the x0 of three steps (k-diffusion's 3M SDE).

    With fewer than 15 steps the last but one is second order, as in diffusers; the last one is first order.

    diffusers weights the second difference of x0 by (1 - e^-z - z) / z^2 - 1/2, z = 2h, where k-diffusion has + 1/2:
    about -1 instead of z / 6. This makes the variance of its samples too large, increasingly so with more steps (1.4
    at 40 steps for data of variance 1). Otherwise the steps are the same.
    """
    return _multistep(context, x, order=3, stochastic=True)


def _multistep(context: Context, x: Tensor, order: int, *, stochastic: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++ with divided differences of x0 over lambda = log(alpha / sigma); the SDE doubles lambda's step."""
    levels, denoised = context.levels, []
    steps = len(levels) - 1
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        denoised = [x0, *denoised[: order - 1]]
        used = min(len(denoised), steps - step if order == 2 or steps < 15 or step == steps - 1 else order)
        h = _log_step(level, after)
        z = 2 * h if stochastic else h
        d = x0
        if used == 2:
            d = x0 + h / (2 * _log_step(levels[step - 1], level)) * (x0 - denoised[1])
        elif used == 3:
            r0, r1 = _log_step(levels[step - 1], level) / h, _log_step(levels[step - 2], levels[step - 1]) / h
            near, far = (x0 - denoised[1]) / r0, (denoised[1] - denoised[2]) / r1
            curve = (near - far) / (r0 + r1)
            # k-diffusion's phi_2 and -phi_3, over 1 - e^-z
            first, second = (expm1(-z) / z + 1) / -expm1(-z), (0.5 - (expm1(-z) + z) / z**2) / -expm1(-z)
            d = x0 + first * (near + r0 * curve) + second * curve
        x = _solver_step(x, d, level, after, doubled=stochastic)
        if stochastic and after.sigma > 0:
            x = x + after.sigma * sqrt(-expm1(-2 * h)) * context.noise()
        yield x, x0


def _log_step(level: NoiseLevel, after: NoiseLevel) -> float:
    """The difference in lambda = log(alpha / sigma), above zero; infinite if `after` is clean data."""
    return after.half_log_snr - level.half_log_snr


def _solver_step(x: Tensor, d: Tensor, level: NoiseLevel, after: NoiseLevel, *, doubled: bool = False) -> Tensor:
    """x' = sigma' / sigma x + alpha' (1 - e^-h) d; for the SDE ("doubled") with e^-2h (Lu et al. 2022b)."""
    if not doubled:
        return _towards(x, d, level, after)
    h = _log_step(level, after)
    return (after.sigma / level.sigma * exp(-h)) * x - after.alpha * expm1(-2 * h) * d


@_sampler("unipc", "UniPCMultistepScheduler", grid="dpmsolver")
def unipc(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """UniPC-2 with B(h) = e^h - 1: a predictor and a corrector that reuses its evaluation (Zhao et al. 2023).

    Algorithms 1 and 2 for predicted x0, one evaluation per step.
    """
    levels, denoised = context.levels, []
    start = x  # x at the start of the previous step
    for step, level in enumerate(levels[:-1]):
        x0 = context.denoise(x, level)
        if step > 0:
            used = min(len(denoised), len(levels) - step)
            x = _unipc_step(start, denoised[:used], levels[step - used : step + 1], corrected=x0)
        denoised = [x0, *denoised[:1]]
        start = x
        used = min(len(denoised), len(levels) - 1 - step)
        x = _unipc_step(start, denoised[:used], levels[step - used + 1 : step + 2], corrected=None)
        yield x, x0


def _unipc_step(
    x: Tensor, denoised: Sequence[Tensor], levels: Sequence[NoiseLevel], corrected: Tensor | None
) -> Tensor:
    """A step from levels[-2] to levels[-1].

    denoised: x0 at levels[-2] and before, newest first. corrected: x0 at levels[-1], in the corrector's step only.
    """
    level, after = levels[-2:]
    h, m0 = _log_step(level, after), denoised[0]
    differences: list[tuple[float, Tensor]] = []  # (position in units of h, divided difference)
    for earlier, m in zip(levels[-3::-1], denoised[1:], strict=True):
        r = _log_step(level, earlier) / h
        differences.append((r, (m - m0) / r))
    if corrected is not None:
        differences.append((1.0, corrected - m0))
    d = m0
    if differences:
        for weight, (_, difference) in zip(_unipc_weights(h, [r for r, _ in differences]), differences, strict=True):
            d = d + weight * difference
    return _towards(x, d, level, after)


def _unipc_weights(h: float, positions: Sequence[float]) -> Sequence[float]:
    """The weights of the differences, which make the step exact for polynomials (Zhao et al. 2023, theorem 3.1)."""
    if len(positions) == 1:
        return (0.5,)  # the paper's choice for one difference, which keeps the order
    phi = expm1(-h) / -h - 1
    b, factorial = [], 1
    for k in range(1, len(positions) + 1):
        b.append(phi * factorial / expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve([[r**k for r in positions] for k in range(len(positions))], b).tolist()
