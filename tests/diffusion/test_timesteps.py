"""Where sampling steps lie: timesteps and noise against diffusers' schedulers, the last level, and what is refused."""

import copy
from functools import cache

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentdiff.diffusion.timesteps import sampling_levels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy

SPACINGS = ["leading", "linspace", "trailing"]
STEPS = [1, 2, 3, 7, 20, 48, 61]
INTEGER = ["DDPM", "DDIM", "PNDM"]
REAL = ["EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete"]
INTERVAL = ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"]
LAYOUTS = [("integer", name) for name in INTEGER] + [("real", name) for name in REAL]
LAYOUTS += [("real", "EulerAncestralDiscrete")] + [("interval", name) for name in INTERVAL]


@cache
def built(name: str):
    """diffusers' scheduler; KDPM2's takes 0.2 s to build."""
    config = NoiseSchedule().to_scheduler_config() | ({"skip_prk_steps": True} if name == "PNDM" else {})
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def reference(name: str, schedule: NoiseSchedule, num_steps: int, sigmas: str = "schedule"):
    """diffusers' scheduler after set_timesteps, with our float64 table of abar; see the test of its own one."""
    result = copy.copy(built(name))
    result.register_to_config(timestep_spacing=schedule.timestep_spacing, beta_schedule=schedule.beta_schedule)
    if sigmas != "schedule":
        result.register_to_config(**{f"use_{sigmas}_sigmas": True})
    result.alphas_cumprod = schedule.alphas_cumprod.clone()
    if schedule.rescale_betas_zero_snr:
        result.alphas_cumprod[-1] = 2**-24
    result.set_timesteps(num_steps)
    return result


def their_timesteps(name: str, scheduler) -> list[float]:
    """One a step, without the evaluations within steps; without the extra -1 that rounding can add to "trailing"."""
    timesteps = scheduler.timesteps.tolist()
    if name == "PNDM":
        timesteps = timesteps[:1] + timesteps[2:]
    elif scheduler.order == 2:
        timesteps = timesteps[::2]
    return timesteps[:-1] if timesteps[-1] == -1 else timesteps


def their_ratios(scheduler) -> list[float]:
    """sigma / alpha, one a step; Heun and DPM2 have those between the first and the last twice."""
    sigmas = scheduler.sigmas.tolist()
    return [sigmas[0], *sigmas[1:-1:2]] if scheduler.order == 2 else sigmas[:-1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
def test_levels_equal_diffusers(layout, name, spacing):
    for beta_schedule in ("scaled_linear", "cosine"):
        schedule = NoiseSchedule(timestep_spacing=spacing, beta_schedule=beta_schedule)
        for num_steps in STEPS:
            if name == "PNDM" and num_steps == 1:
                continue  # its list of a single step has no second entry to leave out
            *levels, last = sampling_levels(schedule, num_steps, layout)
            assert last == CLEAN and last.sigma_karras == 0 and len(levels) == num_steps
            scheduler = reference(name, schedule, num_steps)
            assert [level.timestep for level in levels] == pytest.approx(their_timesteps(name, scheduler), abs=1e-3)
            if layout == "integer":
                assert all(type(level.timestep) is int for level in levels)
                ratios = [((1 - a) / a) ** 0.5 for a in schedule.alphas_cumprod[[v.timestep for v in levels]].tolist()]
            else:
                ratios = their_ratios(scheduler)[:num_steps]
            assert [level.sigma_karras for level in levels] == pytest.approx(ratios, rel=1e-5)
            assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14) for level in levels)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(("layout", "name"), [pair for pair in LAYOUTS if pair[1] in REAL + INTERVAL])
def test_levels_by_noise_equal_diffusers(layout, name, sigmas, spacing):
    """Timesteps differ where diffusers cuts their fraction off (and ours are rounded), or rounds (ours are not)."""
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for num_steps in (1, 2, 5, 20):
        levels = sampling_levels(schedule, num_steps, layout, sigmas)[:-1]
        scheduler = reference(name, schedule, num_steps, sigmas)
        assert [level.sigma_karras for level in levels] == pytest.approx(their_ratios(scheduler)[:num_steps], rel=1e-5)
        ours, theirs = (np.array(t) for t in ([v.timestep for v in levels], their_timesteps(name, scheduler)))
        exact = np.array([schedule.level_of_sigma_karras(level.sigma_karras).timestep for level in levels])
        if layout == "interval":
            assert all(type(level.timestep) is int for level in levels)
            assert np.abs(ours - exact).max() <= 0.5
            off = theirs - exact
            assert (np.abs(off if sigmas == "karras" else off + 0.5) <= 0.5 + 1e-6).all()
        else:
            np.testing.assert_allclose(ours, exact, atol=1e-9)
            rounds = sigmas == "karras" and name.startswith("KDPM2")
            np.testing.assert_allclose(theirs, exact.round() if rounds else exact, atol=1e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_equal_diffusers_own_table(spacing):
    """As it comes, in float32: at t = 0 1 - abar is 8.5e-4, known to 3e-8."""
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for layout, cls in (("real", diffusers.EulerDiscreteScheduler), ("interval", diffusers.UniPCMultistepScheduler)):
        scheduler = cls.from_config(schedule.to_scheduler_config())
        scheduler.set_timesteps(20)
        levels = sampling_levels(schedule, 20, layout)
        assert [level.sigma_karras for level in levels[:-1]] == pytest.approx(their_ratios(scheduler), rel=4e-5)


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(name, beta_schedule):
    """sigma / alpha would be infinite; that of abar = 2^-24 is taken. The other layouts start at pure noise."""
    layout = "real" if name in REAL else "interval"
    for spacing in SPACINGS:
        schedule = NoiseSchedule(
            beta_schedule=beta_schedule,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing=spacing,
        )
        for sigmas in ("schedule", "karras", "exponential"):
            levels = sampling_levels(schedule, 20, layout, sigmas)[:-1]
            scheduler = reference(name, schedule, 20, sigmas)
            assert [level.sigma_karras for level in levels] == pytest.approx(their_ratios(scheduler), rel=1e-5)
        if spacing != "leading":
            assert levels[0].sigma_karras == pytest.approx(4096, rel=1e-6)
            assert sampling_levels(schedule, 20, "integer")[0] == NoiseLevel(999, 0.0, 1.0)
            assert sampling_levels(schedule, 20, layout)[0].timestep == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 64])
def test_every_number_of_steps(spacing, num_train_timesteps):
    """The integer timesteps are DDIM's, and noise decreases strictly in every layout up to T steps."""
    schedule = NoiseSchedule(timestep_spacing=spacing, num_train_timesteps=num_train_timesteps)
    scheduler = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
    with_an_extra_step = []
    for num_steps in range(1, num_train_timesteps + 1, 1 if num_train_timesteps == 64 else 30):
        scheduler.set_timesteps(num_steps)
        if scheduler.timesteps[-1] == -1:
            with_an_extra_step.append(num_steps)
        levels = sampling_levels(schedule, num_steps, "integer")
        assert [level.timestep for level in levels[:-1]] == their_timesteps("DDIM", scheduler)
        for layout in ("integer", "real", "interval"):
            if layout == "interval" and num_steps == num_train_timesteps and spacing != "trailing":
                continue
            levels = sampling_levels(schedule, num_steps, layout)
            assert len(levels) == num_steps + 1 and levels[-1] == CLEAN
            assert all(after.sigma < level.sigma for level, after in zip(levels, levels[1:], strict=False))
            assert 0 <= levels[-2].timestep and levels[0].timestep < num_train_timesteps
    assert (61 in with_an_extra_step) == (spacing == "trailing" and num_train_timesteps == 1000)


def test_stable_diffusion_timesteps():
    def timesteps(schedule: NoiseSchedule, name: str) -> list[float]:
        return [level.timestep for level in get_sampler(name).levels(schedule, 50)][:-1]

    leading = NoiseSchedule(timestep_spacing="leading", steps_offset=1)
    assert timesteps(leading, "ddim") == timesteps(leading, "euler") == list(range(981, 0, -20))
    assert timesteps(leading, "dpm++2m") == list(range(951, 1, -19))
    assert timesteps(NoiseSchedule(), "ddim") == timesteps(NoiseSchedule(), "dpm++2m") == list(range(999, 0, -20))


def test_karras_by_hand():
    """Karras et al. 2022, eq. 5, between the noise of the first and of the last timestep of the spacing."""
    schedule = NoiseSchedule(timestep_spacing="linspace")
    high, low = (schedule.level(t).sigma_karras ** (1 / 7) for t in (999, 0))
    ratios = [level.sigma_karras for level in sampling_levels(schedule, 4, "real", "karras")]
    assert ratios == pytest.approx([(high + i / 3 * (low - high)) ** 7 for i in range(4)] + [0], rel=1e-12)


def test_lcm_timesteps_equal_diffusers():
    for total in (1000, 500):
        schedule = NoiseSchedule(num_train_timesteps=total)
        scheduler = diffusers.LCMScheduler.from_config(schedule.to_scheduler_config())
        for num_steps in (1, 2, 4, 7, 8, 50):
            scheduler.set_timesteps(num_steps)
            levels = sampling_levels(schedule, num_steps, "lcm")
            assert [level.timestep for level in levels[:-1]] == scheduler.timesteps.tolist()
    short = sampling_levels(NoiseSchedule(num_train_timesteps=10), 10, "lcm")
    assert [level.timestep for level in short[:-1]] == list(range(9, -1, -1))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_ends(name):
    """All samplers end at clean data, but ddim and pndm at abar[0] where the schedule says so."""
    sampler = get_sampler(name)
    assert sampler.levels(NoiseSchedule(), 4)[-1] == CLEAN
    last = sampler.levels(NoiseSchedule(set_alpha_to_one=False), 4)[-1]
    assert last.sigma == pytest.approx(0.00085**0.5 if name in ("ddim", "pndm") else 0, rel=1e-12)


def test_schedule_of_one_timestep():
    schedule = NoiseSchedule(num_train_timesteps=1)
    for layout in ("integer", "real", "interval", "lcm"):
        assert [level.timestep for level in sampling_levels(schedule, 1, layout)] == [0, -1]
    for sigmas in ("karras", "exponential", "beta"):
        assert [level.timestep for level in sampling_levels(schedule, 1, "real", sigmas)] == [0, -1]


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert sampling_levels(NoiseSchedule(beta_end=0.0121), 3)[0].timestep == 999


def test_bad_arguments():
    def says(match, schedule=None, *args):
        with pytest.raises(ValueError, match=match) as error:
            sampling_levels(schedule or NoiseSchedule(), *args)
        assert "\n" not in str(error.value)

    leading = NoiseSchedule(timestep_spacing="leading", steps_offset=1)
    for num_steps in (0, -3, 1001):
        says(rf"num_inference_steps is {num_steps}, must be in 1 .. 1000 \(num_train_timesteps\)", None, num_steps)
    says("num_inference_steps is 51, must be in 1 .. 50 for LCM", None, 51, "lcm")
    says("sigmas is 'lu', must be one of schedule, karras, exponential, beta", None, 5, "real", "lu")
    says("sigmas is 'karras', but LCM has steps of its own: must be schedule", None, 5, "lcm", "karras")
    says("steps_offset 1 moves the first of 1000 steps to timestep 1000, past the last one, 999", leading, 1000)
    for spacing in ("leading", "linspace"):
        says(
            f"num_inference_steps is 1000, too many for this sampler with {spacing} spacing: timesteps .* and .* do "
            "not differ in noise; must be less",
            NoiseSchedule(timestep_spacing=spacing),
            1000,
            "interval",
        )
        assert len(sampling_levels(NoiseSchedule(timestep_spacing=spacing), 999, "interval")) == 1000
    with pytest.raises(AssertionError):
        sampling_levels(NoiseSchedule(), 5, "flow")
