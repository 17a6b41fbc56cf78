"""Samplers: functions that turn unit Gaussian noise into latents. All have one signature:

    sampler(denoise, x, schedule, levels, generators, callback=None, **options) -> x

denoise(x, level) -> x0: the predicted clean latents, in the shape and dtype of x. Guidance and the conversion from
    the network's output (schedule.predict_x0) are the caller's.
x: [B, C, h, w], unit Gaussian noise (or latents noised to levels[0]), left unchanged. The result has its shape, dtype
    and device.
levels: n + 1 noise levels of n steps, noise strictly decreasing; as from `sampler.levels(schedule, n)`.
generators: one torch.Generator per image, on the CPU; see randn.
callback(step_index, timestep, x, x0): called after each step with the new x and the x0 it was made with. What it raises
    ends the sampling.

Every step goes from its level to the next one in the list. Coefficients are computed in float64 on the host, then
applied in x's dtype. Nothing is recorded for autograd.

In the code: a level has alpha and sigma (x = alpha x0 + sigma epsilon), ratio = sigma / alpha and half_log_snr =
log(alpha / sigma) ("lambda"). x / alpha = x0 + ratio * epsilon is the x of Karras et al. 2022, where the
probability-flow ODE is d(x / alpha) / d(ratio) = epsilon.
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
from latentdiff.diffusion.timesteps import Layout, Sigmas, sampling_levels

# From a level that is all but pure noise a step is first order: slopes are taken at a ratio of thousands there, which
# makes as much of the network's error.
SMALLEST_ALPHA = 1e-3
Denoiser = Callable[[Tensor, NoiseLevel], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Unit Gaussian noise [B, *shape], image i drawn from generators[i].

    Drawn on the CPU in float32 and then moved, so that an image gets the same numbers alone or in a batch, on any
    device, and in any dtype up to rounding.
    """
    noise = [torch.randn(*shape, generator=g, device="cpu", dtype=torch.float32) for g in generators]
    return torch.stack(noise).to(device, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What a sampler is

# One step after the other: yields the new x and the x0 it was made with. `noise()` draws fresh noise like x.
Steps = Callable[..., Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name; call it as the module says.

    layout: how its steps are laid out (see `spacing`), unless by noise.
    diffusers_class: the scheduler of diffusers that steps in the same way, with these `diffusers_keys`.
    stochastic: whether it draws noise between steps.
    ends_at_schedule: whether it ends at schedule.final_alpha_cumprod instead of at clean data.
    """

    name: str
    steps: Steps
    layout: Layout
    diffusers_class: str
    diffusers_keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    stochastic: bool = False
    ends_at_schedule: bool = False

    def levels(
        self, schedule: NoiseSchedule, num_inference_steps: int, sigmas: Sigmas = "schedule"
    ) -> list[NoiseLevel]:
        """The noise levels of a run of so many steps, with the last one; ValueError as sampling_levels."""
        levels = sampling_levels(schedule, num_inference_steps, self.layout, sigmas)
        if self.ends_at_schedule:
            abar = schedule.final_alpha_cumprod
            last = NoiseLevel(-1, sqrt(abar), sqrt(1 - abar))
            # From t = 0 there is nothing left to do then.
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
    """What a sampler's steps are made with."""

    denoise: Denoiser
    schedule: NoiseSchedule
    levels: Sequence[NoiseLevel]
    noise: Callable[[], Tensor]

    def steps(self) -> Iterator[tuple[NoiseLevel, NoiseLevel]]:
        """Where each step starts and ends."""
        return pairwise(self.levels)


SAMPLERS: dict[str, Sampler] = {}


def _sampler(name: str, layout: Layout, diffusers_class: str, **options: Any) -> Callable[[Steps], Sampler]:
    def register(steps: Steps) -> Sampler:
        sampler = Sampler(name, steps, layout, diffusers_class, **options)
        SAMPLERS[name] = sampler
        return sampler

    return register


def get_sampler(name: str) -> Sampler:
    """The sampler of that name; ValueError listing the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, must be one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


# ----------------------------------------------------------------------------------------------------------------------
# Steps that several samplers share


def _epsilon(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The noise in x, if x0 is the data."""
    return (x - level.alpha * x0) / level.sigma


def _towards(x: Tensor, x0: Tensor, level: NoiseLevel, after: NoiseLevel, sigma: float | None = None) -> Tensor:
    """First order: keep x0 and the noise, take alpha and sigma of `after` (Song et al. 2021, eq. 12).

    `sigma` is how much of the old noise is kept, where the step adds fresh noise.
    """
    scale = (after.sigma if sigma is None else sigma) / level.sigma
    return torch.add(scale * x, x0, alpha=after.alpha - level.alpha * scale)


def _along(x: Tensor, slope: Tensor, level: NoiseLevel, after: NoiseLevel) -> Tensor:
    """Follow d(x / alpha) / d(ratio) = slope in a straight line from `level` to `after`."""
    return torch.add(
        (after.alpha / level.alpha) * x, slope, alpha=after.alpha * (after.sigma_karras - level.sigma_karras)
    )


def _fresh_sigma(level: NoiseLevel, after: NoiseLevel) -> float:
    """Standard deviation of the noise that a step of the reverse Markov chain adds (Ho et al. 2020, eq. 7)."""
    # 1 - abar / abar_after of the respaced chain, written so that it is exact for close levels and for pure noise
    beta = (level.sigma**2 * after.alpha**2 - level.alpha**2 * after.sigma**2) / after.alpha**2
    return after.sigma / level.sigma * sqrt(max(beta, 0.0))


# ----------------------------------------------------------------------------------------------------------------------
# First order


@_sampler("ddpm", "integer", "DDPMScheduler", stochastic=True)
def ddpm(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, eq. 6-7; diffusers' "fixed_small").

    With fewer than T steps, alpha = abar / abar_next is that of the respaced chain (Nichol & Dhariwal 2021, eq. 19).
    """
    return _ancestral(context, x, eta=1.0)


@_sampler("ddim", "integer", "DDIMScheduler", ends_at_schedule=True)
def ddim(context: Context, x: Tensor, *, eta: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    eta in [0, 1] scales the fresh noise: 0 is deterministic and draws none, 1 is ddpm. ValueError outside.

    diffusers steps from t to t - T // n rather than to the next timestep of its own list. The two agree for "leading"
    spacing, and for "trailing" when the number of steps n divides T; elsewhere diffusers' x is at another noise level
    than the timestep it is next denoised at.
    """
    return _ancestral(context, x, eta)


@_sampler("euler", "real", "EulerDiscreteScheduler")
def euler(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler steps of the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn).

    The same step as ddim's with eta = 0; what differs is how the steps are laid out.

    Like the other schedulers that keep x / alpha, diffusers' starts from noise of sigma / alpha instead of unit noise
    for "linspace" and "trailing" spacing: scaled by sigma of the first level, 0.998 for Stable Diffusion.
    """
    return _ancestral(context, x, eta=0.0)


@_sampler("euler_ancestral", "real", "EulerAncestralDiscreteScheduler", stochastic=True)
def euler_ancestral(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler steps to below the next level and fresh noise up to it (k-diffusion): ddpm's steps, laid out as euler's.

    Steps laid out by noise are k-diffusion's; diffusers' class does not have them.
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


@_sampler("heun", "real", "HeunDiscreteScheduler")
def heun(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Second order: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1 without churn).

    Two evaluations a step, one in the last.
    """
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        predicted = _towards(x, x0, level, after)
        if after.sigma > 0 and level.alpha > SMALLEST_ALPHA:
            slope = (_epsilon(x, x0, level) + _epsilon(predicted, context.denoise(predicted, after), after)) / 2
            predicted = _along(x, slope, level, after)
        x = predicted
        yield x, x0


@_sampler("dpm2", "real", "KDPM2DiscreteScheduler")
def dpm2(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Second order: the slope in the middle of the step, by the logarithm of the ratio (k-diffusion's DPM2).

    The idea is that of Karras et al. 2022, algorithm 2, without churn. Two evaluations a step, one in the last.

    diffusers rounds the timesteps of Karras sigmas, but not those of the middles; here no timestep is rounded.
    """
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        if after.sigma > 0:
            x = _midpoint(context, x, x0, level, after)
        else:
            x = _towards(x, x0, level, after)
        yield x, x0


@_sampler("dpm2_ancestral", "real", "KDPM2AncestralDiscreteScheduler", stochastic=True)
def dpm2_ancestral(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """dpm2 to below the next level and fresh noise up to it (k-diffusion). For diffusers see dpm2."""
    for level, after in context.steps():
        x0 = context.denoise(x, level)
        if after.sigma > 0:
            fresh = _fresh_sigma(level, after)
            # x / alpha is stepped to below the next level's ratio, and the noise is added to it.
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


@_sampler("dpm++2s", "interval", "DPMSolverSinglestepScheduler")
def dpm_solver_pp_2s(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2S): second order over pairs of steps, whose first one is the inner evaluation (Lu et al. 2022b).

    Algorithm 1, with one evaluation a step as diffusers counts them; the last step, or the last two, are first order.
    diffusers' scheduler takes the steps of "linspace" whatever the timestep_spacing.
    """
    steps = list(context.steps())
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
# Higher order by what earlier steps evaluated


@_sampler("pndm", "integer", "PNDMScheduler", diffusers_keys={"skip_prk_steps": True}, ends_at_schedule=True)
def pndm(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pseudo linear multistep, PLMS (Liu et al. 2022, eq. 9 and 12; Stable Diffusion 1's default sampler).

    Fourth-order Adams-Bashforth on epsilon, transferred by DDIM's step. The first step is made twice, with the slope
    at both ends, instead of the paper's Runge-Kutta steps: n + 1 evaluations of n steps.

    diffusers averages the network's outputs, which is the same for "epsilon" alone, and steps from t to t - T // n; see
    ddim. ValueError if the first level is pure noise, which epsilon does not describe.
    """
    if context.levels[0].alpha == 0:
        raise ValueError("pndm can't start from a terminal SNR of zero (rescale_betas_zero_snr): take ddim or dpm++2m")
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    slopes: list[Tensor] = []
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        slopes = [_epsilon(x, x0, level), *slopes[:3]]
        slope = sum(w * s for w, s in zip(weights[len(slopes) - 1], slopes, strict=True))
        if step == 0 and len(context.levels) > 2:
            tried = _along(x, slope, level, after)
            slope = (slope + _epsilon(tried, context.denoise(tried, after), after)) / 2
        x = _along(x, slope, level, after)
        yield x, x0


@_sampler("lms", "real", "LMSDiscreteScheduler")
def lms(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Linear multistep of order up to 4 (k-diffusion): epsilon as a polynomial of the ratio, integrated exactly."""
    return _adams_bashforth(context, x, 4, lambda ratio: ratio)


@_sampler("deis", "interval", "DEISMultistepScheduler")
def deis(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Diffusion exponential integrator, "log-rho" of order 2 (Zhang & Chen 2023, tAB-DEIS).

    epsilon as a polynomial of the ratio's logarithm, integrated over the ratio. The last step is first order if there
    are fewer than 15, as in diffusers; at a ratio of zero the logarithm is integrable.

    The last step goes to clean data. In diffusers it goes to the noise of t = 0, which is left in; with steps laid out
    by noise, its last step stays where it is.
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
    slopes: list[Tensor] = []
    ratios = [level.sigma_karras for level in context.levels]
    for step, (level, after) in enumerate(context.steps()):
        x0 = context.denoise(x, level)
        slopes = [_epsilon(x, x0, level), *slopes[: order - 1]]
        used = 1 if first_order_end and step == len(ratios) - 2 else len(slopes)
        weights = _lagrange_integrals(ratios[step::-1][:used], ratios[step + 1], variable)
        change = sum(weight * slope for weight, slope in zip(weights, slopes, strict=False))
        x = (after.alpha / level.alpha) * x + after.alpha * change
        yield x, x0


def _lagrange_integrals(nodes: Sequence[float], end: float, variable: Callable[[float], float]) -> list[float]:
    """Integrals from nodes[0] to `end` of the Lagrange polynomials, in `variable`, over the nodes."""
    # Gauss-Legendre after the substitution ratio = end + (start - end) u^2, which tames the logarithm's end at zero
    u, w = np.polynomial.legendre.leggauss(48)
    u, w = (u + 1) / 2, w / 2
    width = nodes[0] - end
    points = np.array([variable(end + width * v**2) for v in u])
    places = [variable(node) for node in nodes]
    integrals = []
    for j, place in enumerate(places):
        others = [p for k, p in enumerate(places) if k != j]
        values = np.prod([(points - p) / (place - p) for p in others], axis=0) if others else np.ones_like(points)
        integrals.append(float(-(w * 2 * u * width * values).sum()))
    return integrals


@_sampler("dpm++2m", "interval", "DPMSolverMultistepScheduler")
def dpm_solver_pp_2m(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M), deterministic, second order from the second step on (Lu et al. 2022b, algorithm 2).

    The last step, to sigma = 0, is first order, as in diffusers' DPMSolverMultistepScheduler.
    """
    return _multistep(context, x, order=2, stochastic=False)


@_sampler(
    "dpm++2m_sde",
    "interval",
    "DPMSolverMultistepScheduler",
    diffusers_keys={"algorithm_type": "sde-dpmsolver++"},
    stochastic=True,
)
def dpm_solver_pp_2m_sde(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """SDE-DPM-Solver++(2M), second order from the second step on (Lu et al. 2022b, section 4.3 and appendix)."""
    return _multistep(context, x, order=2, stochastic=True)


@_sampler(
    "dpm++3m_sde",
    "interval",
    "DPMSolverMultistepScheduler",
    diffusers_keys={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    stochastic=True,
)
def dpm_solver_pp_3m_sde(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """SDE-DPM-Solver++ with the x0 of three steps (k-diffusion's 3M SDE).

    With fewer than 15 steps the last but one is second order, as in diffusers; the last one is first order.

    diffusers weighs the second difference of x0 with (1 - e^-z - z) / z^2 - 1/2, z = 2h, where k-diffusion has
    + 1/2: near -1 instead of z / 6. Its samples come out too spread for that, the more so with more steps (at 40
    steps a variance of 1.4 for data of variance 1). Otherwise the steps are the same.
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
    """The step of lambda = log(alpha / sigma), above zero; infinite to clean data."""
    return after.half_log_snr - level.half_log_snr


def _solver_step(x: Tensor, d: Tensor, level: NoiseLevel, after: NoiseLevel, *, doubled: bool = False) -> Tensor:
    """x' = sigma' / sigma x + alpha' (1 - e^-h) d; of the SDE ("doubled") with e^-2h (Lu et al. 2022b)."""
    if not doubled:
        return _towards(x, d, level, after)
    h = _log_step(level, after)
    return (after.sigma / level.sigma * exp(-h)) * x - after.alpha * expm1(-2 * h) * d


@_sampler("unipc", "interval", "UniPCMultistepScheduler")
def unipc(context: Context, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """UniPC-2 with B(h) = e^h - 1: a predictor and a corrector that reuses its evaluation (Zhao et al. 2023).

    Algorithms 1 and 2 for predicted x0; no further evaluations than one a step.
    """
    levels, denoised = context.levels, []
    start = x  # where the step before this one began
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
    """From levels[-2] to levels[-1] with x0 there and before (newest first), and at the end too if `corrected`."""
    level, after = levels[-2:]
    h, m0 = _log_step(level, after), denoised[0]
    differences: list[tuple[float, Tensor]] = []  # place in units of h, divided difference
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


def _unipc_weights(h: float, places: Sequence[float]) -> Sequence[float]:
    """The weights of the differences, which make the step exact for polynomials (Zhao et al. 2023, theorem 3.1)."""
    if len(places) == 1:
        return (0.5,)  # the paper's choice for one difference, which keeps the order
    phi = expm1(-h) / -h - 1
    b, factorial = [], 1
    for k in range(1, len(places) + 1):
        b.append(phi * factorial / expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve([[r**k for r in places] for k in range(len(places))], b).tolist()
