"""The samplers: every network evaluation against diffusers' schedulers, against each other, and their contract.

Their order of convergence and the distributions that they sample are in test_sampler_order.py.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.prediction import PredictionType
from latentdiff.diffusion.samplers import SAMPLERS, Sampler, ddim, ddpm, dpm_solver_pp_2m, get_sampler, randn
from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule, TimestepSpacing
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.formats.scheduler_config import write_scheduler_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy

SHAPE = (4, 8, 8)
CPU = torch.device("cpu")
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(7)) / 6
PREDICTION_TYPES: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
SPACINGS: list[TimestepSpacing] = ["leading", "linspace", "trailing"]
# Samplers and their options; "ddim" with eta 1 adds noise.
CASES: list[tuple[str, dict[str, float]]] = [(name, {}) for name in SAMPLERS] + [("ddim", {"eta": 1.0})]
STOCHASTIC = ["ddpm", "euler_ancestral", "dpm2_ancestral", "dpm++2m_sde", "dpm++3m_sde"]
# Samplers whose diffusers scheduler keeps x / alpha, as k-diffusion does, and scales it for the network.
UNSCALED = ["euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "lms"]
# What diffusers' classes lack.
NO_SAMPLE_PREDICTION = ["euler_ancestral", "dpm2", "dpm2_ancestral"]
ZERO_SNR = ["ddpm", "ddim", "euler", "euler_ancestral", "dpm++2m", "dpm++2m_sde", "unipc"]
BY_NOISE = [name for name, sampler in SAMPLERS.items() if sampler.grid != "ddim" and name != "euler_ancestral"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(x: Tensor, timestep: float) -> Tensor:
    """A fixed non-linear network output f(x, t): random 3x3 convolution, a shift by t, tanh."""
    shift = math.sin(timestep / 100)
    return torch.tanh(torch.nn.functional.conv2d(x, WEIGHT.to(x), padding=1) + shift) + 0.3 * x


class Run:
    """A sampling run: the network's inputs in order, and the result."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.inputs: list[Tensor] = []
        self.timesteps: list[float] = []
        self.result = torch.empty(0)

    def network(self, x: Tensor, timestep: float) -> Tensor:
        self.inputs.append(x)
        self.timesteps.append(timestep)
        return network(x, timestep)

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.schedule.predict_x0(self.network(x, level.timestep), x, level)

    @property
    def states(self) -> list[Tensor]:
        return [*self.inputs, self.result]


def run(
    sampler: Sampler,
    schedule: NoiseSchedule,
    levels: Sequence[NoiseLevel],
    dtype: torch.dtype = torch.float32,
    **options: float,
) -> Run:
    """A run with two images from fixed seeds."""
    random = generators(3, 4)
    ours = Run(schedule)
    x = randn(SHAPE, random, CPU, dtype)
    ours.result = sampler(ours.denoise, x, schedule, levels, random, **options)
    return ours


class Gap:
    """Given to DDIM and PNDM as num_inference_steps: T // gap, which they subtract from t, is then the gap itself."""

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def __rfloordiv__(self, _: object) -> float:
        return self.gap


class ThirdOrder(diffusers.DPMSolverMultistepScheduler):
    """With + 1/2 instead of - 1/2 in the weight of the second difference, (1 - e^-z - z) / z^2 + 1/2."""

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Any = None, noise: Any = None, **kwargs: Any
    ) -> Tensor:
        x = super().multistep_dpm_solver_third_order_update(model_output_list, *args, sample=sample, noise=noise)
        end, *nodes = (self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + i]) for i in (1, 0, -1, -2))
        h, h_0, h_1 = (
            torch.log(a[0] / a[1]) - torch.log(b[0] / b[1]) for a, b in zip([end, *nodes], nodes, strict=False)
        )
        m0, m1, m2 = model_output_list[::-1]
        r0, r1 = h_0 / h, h_1 / h
        return x + end[0] / (r0 + r1) * ((m0 - m1) / r0 - (m1 - m2) / r1)


@cache
def built(name: str, schedule: NoiseSchedule, sigmas: Sigmas) -> Any:
    """diffusers' scheduler of a sampler, from our config, with our float64 table of abar for the cosine schedule."""
    sampler = get_sampler(name)
    config = write_scheduler_config(schedule, "ddim") | dict(sampler.diffusers_keys)
    if sigmas != "schedule":
        config[f"use_{sigmas}_sigmas"] = True
    cls = ThirdOrder if name == "dpm++3m_sde" else getattr(diffusers, sampler.diffusers_class)
    reference = cls.from_config(config)
    if schedule.beta_schedule == "cosine":
        reference.alphas_cumprod = schedule.alphas_cumprod
    return reference


def scheduler(sampler: Sampler, schedule: NoiseSchedule, num_steps: int, sigmas: Sigmas = "schedule") -> Any:
    """diffusers' scheduler of a sampler, from our config and at our timesteps; the noise levels are its own.

    Its float32 table of abar is replaced by ours for "cosine": see test_float32_table_explains_the_cosine_difference.
    Its timesteps are replaced where it truncates or rounds them, and Singlestep's, which ignores timestep_spacing.
    """
    reference = built(sampler.name, schedule, sigmas)
    timesteps = [level.timestep for level in sampler.levels(schedule, num_steps, sigmas)[:-1]]
    if sampler.name == "ddpm":  # otherwise it steps from t to t - T // n
        reference.set_timesteps(timesteps=timesteps)
        return reference
    reference.set_timesteps(num_steps)
    if sampler.name == "dpm++2s" and sigmas == "schedule":
        reference.set_timesteps(timesteps=timesteps)
    if sigmas != "schedule" and sampler.grid == "dpmsolver":
        reference.timesteps = torch.tensor(timesteps, dtype=torch.float64)
    if sigmas != "schedule" and sampler.name.startswith("dpm2"):
        reference.timesteps[::2] = torch.tensor(timesteps, dtype=torch.float64)  # every second one is a midpoint
    return reference


def run_diffusers(
    sampler: Sampler,
    schedule: NoiseSchedule,
    num_steps: int,
    sigmas: Sigmas = "schedule",
    reference: Any = None,
    gaps: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Run:
    """The same run with diffusers, from the same initial noise and with the same fresh noise."""
    reference = reference or scheduler(sampler, schedule, num_steps, sigmas)
    random = generators(3, 4)
    theirs = Run(schedule)
    x = torch.stack([torch.randn(SHAPE, generator=generator) for generator in random]).to(dtype)
    if sampler.name in UNSCALED:
        x = x * (1 + reference.sigmas[0] ** 2) ** 0.5
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(0)
    if "generator" in inspect.signature(reference.step).parameters:
        options["generator"] = random
    for i, timestep in enumerate(reference.timesteps):
        if gaps is not None:
            reference.num_inference_steps = Gap(gaps[i])
        x_in = reference.scale_model_input(x, timestep)
        output = theirs.network(x_in, timestep.item())
        x = reference.step(output, timestep if sampler.name in UNSCALED else timestep.item(), x, **options).prev_sample
    theirs.result = x
    return theirs


def gaps_of(sampler: Sampler, levels: Sequence[NoiseLevel]) -> list[float]:
    """From each timestep to the next, the last one to below 0; PNDM repeats its first step."""
    timesteps = [level.timestep for level in levels[:-1]]
    gaps = [a - b for a, b in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    return gaps[:1] + gaps if sampler.name == "pndm" and len(gaps) > 1 else gaps


def relative_error(states: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of max|a - b| / max|b| over the states; NaN if there is one."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(states, expected, strict=True)]
    return torch.stack(errors).max().item()


# --- against diffusers ---

# A sampler sees x0 only, so that every prediction type is tested with one spacing.
COMBINATIONS: list[tuple[PredictionType, TimestepSpacing]] = [("epsilon", spacing) for spacing in SPACINGS]
COMBINATIONS += [("v_prediction", "trailing"), ("sample", "trailing")]


@pytest.mark.parametrize(
    ("name", "options", "prediction_type", "spacing"),
    [
        (name, options, prediction_type, spacing)
        for name, options in CASES
        for prediction_type, spacing in COMBINATIONS
        if not (prediction_type == "sample" and name in NO_SAMPLE_PREDICTION)
    ],
)
def test_every_evaluation_equals_diffusers(
    name: str, options: dict[str, float], prediction_type: PredictionType, spacing: TimestepSpacing
) -> None:
    """Every input of the network, and the result: at 5, 20 and 50 steps with epsilon, else at 20.

    DDIM and PNDM get our gaps between timesteps (see ddim). PNDM gets epsilon for every prediction type, because it
    averages the network's outputs, and we average epsilon. DEIS ends at the noise of t = 0, and so does our run here.
    """
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing, steps_offset=0)
    sampler = get_sampler(name)
    for num_steps in (5, 20, 50) if prediction_type == "epsilon" else (20,):
        levels = sampler.levels(schedule, num_steps)
        if name == "deis":
            levels[-1] = schedule.level(0)
            assert levels[-1].sigma < levels[-2].sigma or spacing == "leading"
        gaps = gaps_of(sampler, levels) if name in ("ddim", "pndm") else None
        ours = run(sampler, schedule, levels, **options)
        if name == "pndm" and prediction_type != "epsilon":
            assert gaps is not None
            theirs = run_pndm_on_epsilon(schedule, num_steps, gaps)
        else:
            theirs = run_diffusers(sampler, schedule, num_steps, gaps=gaps, **options)
        assert ours.timesteps == pytest.approx(theirs.timesteps, abs=2e-3)
        assert relative_error(ours.states, theirs.states) <= 1e-4


def run_pndm_on_epsilon(schedule: NoiseSchedule, num_steps: int, gaps: Sequence[float]) -> Run:
    """diffusers' PNDM on the epsilon that the network's output implies."""
    sampler = get_sampler("pndm")
    theirs = Run(schedule)
    reference = scheduler(sampler, replace(schedule, prediction_type="epsilon"), num_steps)
    x = randn(SHAPE, generators(3, 4), CPU, torch.float32)
    for gap, timestep in zip(gaps, reference.timesteps.tolist(), strict=True):
        level = schedule.level(timestep)
        x0 = schedule.predict_x0(theirs.network(x, timestep), x, level)
        epsilon = (x - level.alpha * x0) / level.sigma
        reference.num_inference_steps = Gap(gap)
        x = reference.step(epsilon, timestep, x).prev_sample
    theirs.result = x
    return theirs


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [(name, "karras") for name in BY_NOISE]
    + [(name, sigmas) for sigmas in ("exponential", "beta") for name in ("euler", "dpm++2m")],
)
def test_levels_spaced_by_noise_equal_diffusers(name: str, sigmas: Sigmas) -> None:
    """A sampler sees the levels only, so that "exponential" and "beta" are tested once per grid.

    DEIS stays at the last sigma in its last step; ours goes to clean data, so the results are not compared.
    """
    sampler = get_sampler(name)
    for spacing in SPACINGS[::2] if sampler.grid == "euler" else SPACINGS[2:]:
        schedule = NoiseSchedule(timestep_spacing=spacing, prediction_type="v_prediction", steps_offset=0)
        for num_steps in (5, 20):
            ours = run(sampler, schedule, sampler.levels(schedule, num_steps, sigmas))
            theirs = run_diffusers(sampler, schedule, num_steps, sigmas=sigmas)
            assert ours.timesteps == pytest.approx(theirs.timesteps, abs=2e-2)
            states = "inputs" if name == "deis" else "states"
            assert relative_error(getattr(ours, states), getattr(theirs, states)) <= 1e-4


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in UNSCALED and name != "pndm"])
def test_other_beta_schedules_equal_diffusers(name: str) -> None:
    """With cosine and epsilon x grows to 1e4, since alpha is 5e-5 at t = 999; the error is relative.

    DEIS runs in float64, diffusers' weights too: at that alpha float32 loses four digits of its epsilon.
    """
    sampler = get_sampler(name)
    dtype = torch.float64 if name == "deis" else torch.float32
    for beta_schedule in ("linear", "cosine"):
        for prediction_type in PREDICTION_TYPES:
            schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
            for num_steps in (5, 20):
                levels = sampler.levels(schedule, num_steps)
                if name == "deis":
                    levels[-1] = schedule.level(0)
                ours = run(sampler, schedule, levels, dtype=dtype)
                reference = scheduler(sampler, schedule, num_steps)
                if name == "deis":
                    reference.sigmas = reference.sigmas.double()
                theirs = run_diffusers(sampler, schedule, num_steps, reference=reference, dtype=dtype)
                assert relative_error(ours.states, theirs.states) <= 1e-4


def test_float32_table_explains_the_cosine_difference() -> None:
    """DPM-Solver++ to t = 0 of the cosine schedule: 1e-4 from diffusers' float32 table, 1e-6 from a float64 one.

    There 1 - abar is 4.128e-5, and diffusers' float32 table has 4.131e-5.
    """
    schedule = NoiseSchedule(beta_schedule="cosine", prediction_type="sample", timestep_spacing="linspace")
    sampler = replace(dpm_solver_pp_2m, grid="ddim")  # its last step starts at t = 0
    levels = sampler.levels(schedule, 20)
    assert levels[-2].timestep == 0
    ours = run(sampler, schedule, levels)
    errors = []
    for abar in (None, schedule.alphas_cumprod):
        reference = diffusers.DPMSolverMultistepScheduler.from_config(write_scheduler_config(schedule, "ddim"))
        if abar is not None:
            reference.alphas_cumprod = abar
        reference.set_timesteps(timesteps=ours.timesteps)
        theirs = run_diffusers(sampler, schedule, 20, reference=reference)
        errors.append(relative_error(ours.states, theirs.states))
    assert 5e-5 < errors[0] < 5e-4 and errors[1] < 5e-6


@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr_equals_diffusers(name: str) -> None:
    """From pure noise, for all classes that support it. Euler keeps x / alpha = 4096 x in float32, hence its 6e-5."""
    sampler = get_sampler(name)
    for prediction_type in ("v_prediction", "sample"):
        if prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
            continue
        schedule = NoiseSchedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        for num_steps in (5, 20, 50):
            levels = sampler.levels(schedule, num_steps)
            assert levels[0].timestep == 999
            assert levels[0].alpha == pytest.approx(0 if sampler.grid == "ddim" else 2**-12)
            ours = run(sampler, schedule, levels)
            assert relative_error(ours.states, run_diffusers(sampler, schedule, num_steps).states) <= 1e-4


@pytest.mark.parametrize("num_steps", [7, 30, 48])
def test_uneven_ddim_equals_diffusers_only_with_leading_spacing(num_steps: int) -> None:
    """diffusers' DDIM goes from t to t - T // n, which is the next timestep of a "leading" list only."""
    schedule = NoiseSchedule(timestep_spacing="leading", set_alpha_to_one=False)
    ours = run(ddim, schedule, ddim.levels(schedule, num_steps))
    assert relative_error(ours.states, run_diffusers(ddim, schedule, num_steps).states) <= 1e-4
    for spacing in ("trailing", "linspace"):
        schedule = NoiseSchedule(timestep_spacing=spacing)
        ours = run(ddim, schedule, ddim.levels(schedule, num_steps))
        assert relative_error(ours.states, run_diffusers(ddim, schedule, num_steps).states) > 1e-2


@pytest.mark.parametrize("name", ["ddpm", "dpm++2m", "dpm++2s", "unipc", "euler", "lms"])
def test_uneven_steps_equal_diffusers(name: str) -> None:
    """Numbers of steps that do not divide T: these schedulers, too, go to the next timestep of the list."""
    sampler = get_sampler(name)
    for num_steps in (7, 30):
        for spacing in SPACINGS:
            schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
            ours = run(sampler, schedule, sampler.levels(schedule, num_steps))
            assert relative_error(ours.states, run_diffusers(sampler, schedule, num_steps).states) <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_last_step_ends_at_the_first_alpha_cumprod(name: str) -> None:
    """set_alpha_to_one=False with steps_offset 1, as in Stable Diffusion: the noise of abar[0] stays in the result."""
    sampler = get_sampler(name)
    schedule = NoiseSchedule(timestep_spacing="leading", set_alpha_to_one=False)
    levels = sampler.levels(schedule, 20)
    assert levels[-2].timestep == 1 and levels[-1].sigma == pytest.approx(math.sqrt(0.00085))
    ours = run(sampler, schedule, levels)
    assert relative_error(ours.states, run_diffusers(sampler, schedule, 20).states) <= 1e-4
    to_one = replace(schedule, set_alpha_to_one=True)
    assert relative_error(ours.states, run_diffusers(sampler, to_one, 20).states) > 1e-3
    # The step from t = 0 to t = 0 changes nothing.
    schedule = replace(schedule, steps_offset=0)
    levels = sampler.levels(schedule, 20)
    assert levels[-1].alpha == levels[-2].alpha
    ours = run(sampler, schedule, levels)
    assert relative_error(ours.states, run_diffusers(sampler, schedule, 20).states) <= 1e-4
    torch.testing.assert_close(ours.states[-1], ours.states[-2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_initial_noise_of_diffusers(spacing: TimestepSpacing) -> None:
    """In x, its initial noise has a standard deviation of 1 or, where ours still is 1, of the first sigma."""
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
    for name in UNSCALED:
        first = get_sampler(name).levels(schedule, 20)[0]
        reference = scheduler(get_sampler(name), schedule, 20)
        size = float(reference.init_noise_sigma) * first.alpha
        assert size == pytest.approx(1 if spacing == "leading" else first.sigma, rel=1e-5)


# --- against each other and by hand ---


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_eta_1_is_ddpm(spacing: TimestepSpacing) -> None:
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
    for num_steps in (1, 2, 30, 50):
        levels = ddpm.levels(schedule, num_steps)
        assert relative_error(run(ddim, schedule, levels, eta=1.0).states, run(ddpm, schedule, levels).states) < 1e-5


def test_a_single_step_is_the_same_with_all_samplers() -> None:
    """The x0 predicted from the initial noise."""
    schedule = NoiseSchedule()
    levels = [schedule.level(999), CLEAN]
    expected = run(ddim, schedule, levels).result
    for sampler in SAMPLERS.values():
        torch.testing.assert_close(run(sampler, schedule, levels).result, expected, atol=1e-4, rtol=1e-5)


def test_multistep_solvers_without_history_are_ddim() -> None:
    """Their first step, and DPM-Solver++'s last, are first order, and first-order DPM-Solver++ is DDIM."""
    schedule = NoiseSchedule()
    levels = [*map(schedule.level, (999, 666, 333)), CLEAN]
    expected = run(ddim, schedule, levels).states
    for name in ("dpm++2m", "dpm++2s", "lms", "deis"):
        states = run(get_sampler(name), schedule, levels).states
        assert relative_error(states[:2], expected[:2]) < 1e-5 and relative_error(states, expected) > 1e-2
    levels = [*map(schedule.level, (999, 499)), CLEAN]
    assert relative_error(run(dpm_solver_pp_2m, schedule, levels).states, run(ddim, schedule, levels).states) < 1e-5


def test_ancestral_steps_keep_the_variance() -> None:
    """For data that is all zero x is N(0, sigma^2) at every level; each step with fresh noise must preserve that."""
    schedule = NoiseSchedule()
    for name in STOCHASTIC:
        levels = get_sampler(name).levels(schedule, 10)
        seen: list[Tensor] = []
        x = levels[0].sigma * torch.randn(1, 1, 200, 200, generator=generators(0)[0])
        get_sampler(name)(
            lambda x, level: torch.zeros_like(x),
            x,
            schedule,
            levels,
            generators(1),
            lambda step, timestep, x, x0, seen=seen: seen.append(x),
        )
        sizes = [x.std().item() / level.sigma for x, level in zip(seen, levels[1:-1], strict=False)]
        assert sizes == pytest.approx([1] * 9, abs=0.015), name  # standard error 0.0035


# --- the contract ---


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_image_does_not_depend_on_its_batch(name: str, options: dict[str, float]) -> None:
    """Bit for bit, alone and at any position; the denoiser is elementwise, so only the sampler could mix images."""
    schedule = NoiseSchedule()
    levels = get_sampler(name).levels(schedule, 10)

    def sample(*seeds: int) -> Tensor:
        random = generators(*seeds)
        x = randn(SHAPE, random, CPU, torch.float32)
        return get_sampler(name)(
            lambda x, level: 0.5 * x - 0.001 * level.timestep * x.tanh(), x, schedule, levels, random, **options
        )

    alone = {seed: sample(seed)[0] for seed in (11, 12, 13)}
    for order in ((11, 12, 13), (13, 11, 12), (12, 11)):
        for seed, image in zip(order, sample(*order), strict=True):
            assert torch.equal(image, alone[seed])
    assert not torch.equal(alone[11], alone[12])


def test_randn_gives_each_image_the_noise_of_its_generator() -> None:
    noise = randn(SHAPE, generators(1, 2), CPU, torch.float32)
    assert noise.shape == (2, *SHAPE)
    assert torch.equal(noise[1], torch.randn(SHAPE, generator=generators(2)[0]))
    assert torch.equal(randn(SHAPE, generators(1, 2), "cpu", torch.bfloat16), noise.bfloat16())
    assert torch.equal(randn(SHAPE, generators(1, 2), "cpu", torch.float64), noise.double())
    random = generators(1)
    assert not torch.equal(randn(SHAPE, random, CPU, torch.float32), randn(SHAPE, random, CPU, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), CASES)
def test_cuda_equals_cpu(name: str, options: dict[str, float]) -> None:
    assert torch.equal(
        randn(SHAPE, generators(1), "cuda", torch.float32).cpu(), randn(SHAPE, generators(1), CPU, torch.float32)
    )
    schedule = NoiseSchedule()
    levels = get_sampler(name).levels(schedule, 20)
    results = []
    for device in ("cpu", "cuda"):
        random = generators(1, 2)
        x = randn(SHAPE, random, device, torch.float32)
        results.append(get_sampler(name)(lambda x, level: x.tanh(), x, schedule, levels, random, **options).cpu())
    assert relative_error(results[1:], results[:1]) < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "num_steps", "set_alpha_to_one"),
    [(name, options, 5, True) for name, options in CASES]
    # set_alpha_to_one changes the levels of these samplers only.
    + [(name, options, 5, False) for name, options in CASES if name in ("ddim", "pndm")]
    + [(name, options, 1, True) for name, options in CASES if name in STOCHASTIC or options]
    + [("pndm", {}, 2, True)],
)
def test_fresh_noise_is_used_between_steps_only(
    name: str, options: dict[str, float], num_steps: int, set_alpha_to_one: bool
) -> None:
    """Stochastic samplers use one set of numbers per image and step except the last, deterministic ones none."""
    schedule = NoiseSchedule(set_alpha_to_one=set_alpha_to_one)
    random, counted = generators(9), generators(9)
    sampler = get_sampler(name)
    x = randn(SHAPE, random, CPU, torch.float32)
    sampler(Run(schedule).denoise, x, schedule, sampler.levels(schedule, num_steps), random, **options)
    for _ in range(num_steps if name in STOCHASTIC or options.get("eta") == 1.0 else 1):
        torch.randn(SHAPE, generator=counted[0])
    assert torch.equal(random[0].get_state(), counted[0].get_state())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_callback_sees_every_step(name: str, options: dict[str, float]) -> None:
    """Once per step; the last step of all but the multistep samplers on epsilon returns its x0."""
    schedule = NoiseSchedule()
    levels = [*map(schedule.level, (900, 500, 100)), CLEAN]
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    result = get_sampler(name)(
        Run(schedule).denoise,
        randn(SHAPE, generators(1), CPU, torch.float32),
        schedule,
        levels,
        generators(2),
        lambda *step: seen.append(step),
        **options,
    )
    assert [step[:2] for step in seen] == [(0, 900), (1, 500), (2, 100)]
    assert result is seen[-1][2] and not torch.allclose(seen[1][2], seen[1][3], atol=0.1)
    assert torch.allclose(result, seen[-1][3], atol=1e-5) == (name not in ("lms", "pndm"))


def test_an_exception_of_the_callback_ends_the_run() -> None:
    schedule = NoiseSchedule()
    evaluations = Run(schedule)

    def stop(step: int, timestep: float, x: Tensor, x0: Tensor) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ddim(evaluations.denoise, torch.zeros(1, *SHAPE), schedule, ddim.levels(schedule, 5), generators(1), stop)
    assert len(evaluations.inputs) == 2


@pytest.mark.parametrize(("name", "options"), CASES)
def test_samplers_keep_dtype_and_input_and_record_no_gradient(name: str, options: dict[str, float]) -> None:
    schedule = NoiseSchedule()
    levels = get_sampler(name).levels(schedule, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = randn(SHAPE, generators(1), CPU, dtype)
        before = x.clone()
        weight = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        seen: list[Tensor] = []
        result = get_sampler(name)(
            lambda x, level, weight=weight: weight * x,
            x,
            schedule,
            levels,
            generators(2),
            lambda step, timestep, x, x0, seen=seen: seen.extend([x, x0]),
            **options,
        )
        assert result.dtype == dtype and result.shape == x.shape and not result.requires_grad
        assert torch.equal(x, before) and result.isfinite().all()
        assert len(seen) == 8 and all(t.dtype == dtype and not t.requires_grad for t in seen)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_float32_suffices(name: str) -> None:
    """A run in float32 against the same in float64. From 2^-12 of image in the noise, epsilon loses three digits."""
    for zero_snr in (False,) if name == "pndm" else (False, True):  # pndm does not start from pure noise
        schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
        levels = get_sampler(name).levels(schedule, 10)
        single, double = (run(get_sampler(name), schedule, levels, dtype) for dtype in (torch.float32, torch.float64))
        assert relative_error([single.result.double()], [double.result]) < (1e-4 if zero_snr else 2e-6)


def test_get_sampler_finds_samplers_by_name() -> None:
    assert get_sampler("ddpm") is ddpm and get_sampler("dpm++2m") is dpm_solver_pp_2m
    assert all(get_sampler(name).name == name for name in SAMPLERS)
    assert all(hasattr(diffusers, sampler.diffusers_class) for sampler in SAMPLERS.values())
    with pytest.raises(ValueError, match=r"unknown sampler 'euler_a', must be one of ddpm, ddim, euler, .*unipc"):
        get_sampler("euler_a")


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_ddim_rejects_eta_outside_0_to_1(eta: float) -> None:
    schedule = NoiseSchedule()
    with pytest.raises(ValueError, match=f"eta is {eta}, must be in"):
        ddim(lambda x, level: x, torch.zeros(1, *SHAPE), schedule, ddim.levels(schedule, 2), generators(1), eta=eta)


def test_pndm_rejects_pure_noise() -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pndm = get_sampler("pndm")
    with pytest.raises(ValueError, match=r"pndm cannot start from zero terminal SNR \(rescale_betas_zero_snr\)"):
        pndm(lambda x, level: x, torch.zeros(1, *SHAPE), schedule, pndm.levels(schedule, 5), generators(1))


def test_samplers_assert_descending_levels_and_one_generator_per_image() -> None:
    schedule = NoiseSchedule()
    up = [schedule.level(10), schedule.level(20), CLEAN]
    for levels in ([], [CLEAN], up):
        with pytest.raises(AssertionError):
            ddpm(lambda x, level: x, torch.zeros(1, *SHAPE), schedule, levels, generators(1))
    with pytest.raises(AssertionError):
        ddpm(lambda x, level: x, torch.zeros(2, *SHAPE), schedule, ddpm.levels(schedule, 2), generators(1))


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_ancestral", "euler", "dpm++2m", "unipc", "lms"])
def test_error_of_the_network_at_pure_noise_does_not_grow(name: str) -> None:
    """With zero terminal SNR: a denoiser that is off by a tenth must not end at latents of ten."""
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    sampler = get_sampler(name)
    random = generators(1, 2, 3, 4)
    x = randn(SHAPE, random, CPU, torch.float32)
    shift = 0.1 * torch.sin(torch.arange(x[0].numel()).float()).view(SHAPE)
    result = sampler(
        lambda x, level: level.alpha * x + shift * level.sigma, x, schedule, sampler.levels(schedule, 5), random
    )
    assert result.std() < 2
