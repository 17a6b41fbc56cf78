"""The levels of a sampling run: timesteps and noise against diffusers' schedulers, the last level, and errors."""

import copy
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule, TimestepSpacing
from latentdiff.diffusion.timesteps import Sigmas, TimestepGrid, sampling_levels
from latentdiff.formats.scheduler_config import write_scheduler_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy

SPACINGS: list[TimestepSpacing] = ["leading", "linspace", "trailing"]
STEPS = [1, 2, 3, 7, 20, 48, 61]
# Every grid's diffusers classes.
CLASSES: dict[TimestepGrid, list[str]] = {
    "ddim": ["DDPM", "DDIM", "PNDM"],
    "euler": [
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "LMSDiscrete",
        "EulerAncestralDiscrete",
    ],
    "dpmsolver": ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"],
}
GRIDS = [(grid, name) for grid, names in CLASSES.items() for name in names]


@cache
def built(name: str) -> Any:
    """diffusers' scheduler; KDPM2's takes 0.2 s to build."""
    config = write_scheduler_config(NoiseSchedule(steps_offset=0), "ddim")
    config |= {"skip_prk_steps": True} if name == "PNDM" else {}
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def reference(name: str, schedule: NoiseSchedule, num_steps: int, sigmas: Sigmas = "schedule") -> Any:
    """diffusers' scheduler after set_timesteps, with our float64 table of abar (its own table has a test below)."""
    assert schedule.steps_offset == 0
    result = copy.copy(built(name))
    result.register_to_config(timestep_spacing=schedule.timestep_spacing, beta_schedule=schedule.beta_schedule)
    if sigmas != "schedule":
        result.register_to_config(**{f"use_{sigmas}_sigmas": True})
    result.alphas_cumprod = schedule.alphas_cumprod.clone()
    if schedule.rescale_betas_zero_snr:
        result.alphas_cumprod[-1] = 2**-24
    result.set_timesteps(num_steps)
    return result


def their_timesteps(name: str, scheduler: Any) -> list[float]:
    """One per step, without the evaluations within steps and the extra -1 that rounding can add to "trailing"."""
    timesteps = scheduler.timesteps.tolist()
    if name == "PNDM":
        timesteps = timesteps[:1] + timesteps[2:]
    elif scheduler.order == 2:
        timesteps = timesteps[::2]
    return timesteps[:-1] if timesteps[-1] == -1 else timesteps


def their_sigmas_karras(scheduler: Any) -> list[float]:
    """sigma / alpha, one per step; Heun and DPM2 list those between the first and the last twice."""
    sigmas = scheduler.sigmas.tolist()
    return [sigmas[0], *sigmas[1:-1:2]] if scheduler.order == 2 else sigmas[:-1]


@pytest.mark.parametrize(("grid", "name"), GRIDS)
def test_levels_equal_diffusers(grid: TimestepGrid, name: str) -> None:
    for spacing in SPACINGS:
        for beta_schedule in ("scaled_linear", "cosine"):
            schedule = NoiseSchedule(timestep_spacing=spacing, beta_schedule=beta_schedule, steps_offset=0)
            for num_steps in STEPS:
                if name == "PNDM" and num_steps == 1:
                    continue  # its list of a single step has no second entry to leave out
                *levels, last = sampling_levels(schedule, num_steps, grid)
                assert last == CLEAN and last.sigma_karras == 0 and len(levels) == num_steps
                scheduler = reference(name, schedule, num_steps)
                assert [level.timestep for level in levels] == pytest.approx(their_timesteps(name, scheduler), abs=1e-3)
                if grid == "ddim":
                    assert all(type(level.timestep) is int for level in levels)
                    abar = schedule.alphas_cumprod[[int(level.timestep) for level in levels]].tolist()
                    expected = [((1 - a) / a) ** 0.5 for a in abar]
                else:
                    expected = their_sigmas_karras(scheduler)[:num_steps]
                assert [level.sigma_karras for level in levels] == pytest.approx(expected, rel=1e-5)
                assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14) for level in levels)


BY_NOISE: list[tuple[TimestepGrid, str, Sigmas, TimestepSpacing]] = [
    (grid, name, sigmas, spacing)
    for grid, name in (("euler", "HeunDiscrete"), ("dpmsolver", "DPMSolverMultistep"))
    for sigmas in ("karras", "exponential", "beta")
    for spacing in SPACINGS
]


@pytest.mark.parametrize(
    ("grid", "name", "sigmas", "spacing"), [*BY_NOISE, ("euler", "KDPM2Discrete", "karras", "linspace")]
)
def test_levels_by_noise_equal_diffusers(
    grid: TimestepGrid, name: str, sigmas: Sigmas, spacing: TimestepSpacing
) -> None:
    """Timesteps differ where diffusers truncates them (ours are rounded), or KDPM2 rounds them (ours are not)."""
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
    for num_steps in (1, 2, 5, 20):
        levels = sampling_levels(schedule, num_steps, grid, sigmas)[:-1]
        scheduler = reference(name, schedule, num_steps, sigmas)
        expected = their_sigmas_karras(scheduler)[:num_steps]
        assert [level.sigma_karras for level in levels] == pytest.approx(expected, rel=1e-5)
        ours, theirs = (np.array(t) for t in ([v.timestep for v in levels], their_timesteps(name, scheduler)))
        exact = np.array([schedule.level_of_sigma_karras(level.sigma_karras).timestep for level in levels])
        if grid == "dpmsolver":
            assert all(type(level.timestep) is int for level in levels)
            assert np.abs(ours - exact).max() <= 0.5
            off = theirs - exact
            assert (np.abs(off if sigmas == "karras" else off + 0.5) <= 0.5 + 1e-6).all()
        else:
            np.testing.assert_allclose(ours, exact, atol=1e-9)
            rounds = sigmas == "karras" and name.startswith("KDPM2")
            np.testing.assert_allclose(theirs, exact.round() if rounds else exact, atol=1e-3)


def test_levels_equal_diffusers_own_table() -> None:
    """With its own table in float32: at t = 0 1 - abar is 8.5e-4, known to 3e-8."""
    for spacing in SPACINGS:
        schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
        config = write_scheduler_config(schedule, "ddim")
        for grid, name in (("euler", "EulerDiscrete"), ("dpmsolver", "UniPCMultistep")):
            scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
            scheduler.set_timesteps(20)
            levels = sampling_levels(schedule, 20, grid)
            expected = their_sigmas_karras(scheduler)
            assert [level.sigma_karras for level in levels[:-1]] == pytest.approx(expected, rel=4e-5)


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_zero_terminal_snr_equals_diffusers(name: str) -> None:
    """sigma / alpha would be infinite; that of abar = 2^-24 is used. The "ddim" grid starts at pure noise."""
    grid: TimestepGrid = "euler" if name in CLASSES["euler"] else "dpmsolver"
    for beta_schedule in ("linear", "scaled_linear"):
        for spacing in SPACINGS:
            schedule = NoiseSchedule(
                beta_schedule=beta_schedule,
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing=spacing,
                steps_offset=0,
            )
            for sigmas in ("schedule", "karras", "exponential"):
                levels = sampling_levels(schedule, 20, grid, sigmas)[:-1]
                expected = their_sigmas_karras(reference(name, schedule, 20, sigmas))
                assert [level.sigma_karras for level in levels] == pytest.approx(expected, rel=1e-5)
            if spacing != "leading":
                assert levels[0].sigma_karras == pytest.approx(4096, rel=1e-6)
                assert sampling_levels(schedule, 20, "ddim")[0] == NoiseLevel(999, 0.0, 1.0)
                assert sampling_levels(schedule, 20, grid)[0].timestep == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 64])
def test_every_number_of_steps_is_possible(spacing: TimestepSpacing, num_train_timesteps: int) -> None:
    """The timesteps of the "ddim" grid are DDIM's, and noise strictly decreases on every grid up to T steps."""
    schedule = NoiseSchedule(timestep_spacing=spacing, num_train_timesteps=num_train_timesteps, steps_offset=0)
    scheduler = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    with_an_extra_step = []
    for num_steps in range(1, num_train_timesteps + 1, 1 if num_train_timesteps == 64 else 30):
        scheduler.set_timesteps(num_steps)
        if scheduler.timesteps[-1] == -1:
            with_an_extra_step.append(num_steps)
        levels = sampling_levels(schedule, num_steps, "ddim")
        assert [level.timestep for level in levels[:-1]] == their_timesteps("DDIM", scheduler)
        for grid in CLASSES:
            if grid == "dpmsolver" and num_steps == num_train_timesteps and spacing != "trailing":
                continue
            levels = sampling_levels(schedule, num_steps, grid)
            assert len(levels) == num_steps + 1 and levels[-1] == CLEAN
            assert all(after.sigma < level.sigma for level, after in zip(levels, levels[1:], strict=False))
            assert 0 <= levels[-2].timestep and levels[0].timestep < num_train_timesteps
    assert (61 in with_an_extra_step) == (spacing == "trailing" and num_train_timesteps == 1000)


def test_stable_diffusion_timesteps() -> None:
    def timesteps(schedule: NoiseSchedule, name: str) -> list[float]:
        return [level.timestep for level in get_sampler(name).levels(schedule, 50)][:-1]

    leading = NoiseSchedule(timestep_spacing="leading")
    assert timesteps(leading, "ddim") == timesteps(leading, "euler") == list(range(981, 0, -20))
    assert timesteps(leading, "dpm++2m") == list(range(951, 1, -19))
    assert timesteps(NoiseSchedule(), "ddim") == timesteps(NoiseSchedule(), "dpm++2m") == list(range(999, 0, -20))


def test_karras_sigmas_by_hand() -> None:
    """Karras et al. 2022, eq. 5, between the noise of the first and of the last timestep of the spacing."""
    schedule = NoiseSchedule(timestep_spacing="linspace")
    high, low = (schedule.level(t).sigma_karras ** (1 / 7) for t in (999, 0))
    ours = [level.sigma_karras for level in sampling_levels(schedule, 4, "euler", "karras")]
    assert ours == pytest.approx([(high + i / 3 * (low - high)) ** 7 for i in range(4)] + [0], rel=1e-12)


def test_all_samplers_end_at_clean_data() -> None:
    """But ddim and pndm at abar[0], if the schedule says so."""
    for name, sampler in SAMPLERS.items():
        assert sampler.levels(NoiseSchedule(), 4)[-1] == CLEAN
        last = sampler.levels(NoiseSchedule(set_alpha_to_one=False), 4)[-1]
        assert last.sigma == pytest.approx(0.00085**0.5 if name in ("ddim", "pndm") else 0, rel=1e-12), name


def test_schedule_of_one_timestep() -> None:
    schedule = NoiseSchedule(num_train_timesteps=1, steps_offset=0)
    for grid in CLASSES:
        assert [level.timestep for level in sampling_levels(schedule, 1, grid)] == [0, -1]
    for sigmas in ("karras", "exponential", "beta"):
        assert [level.timestep for level in sampling_levels(schedule, 1, "euler", sigmas)] == [0, -1]


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert sampling_levels(NoiseSchedule(beta_end=0.0121), 3)[0].timestep == 999


def test_bad_arguments_are_named() -> None:
    def fails(match: str, schedule: NoiseSchedule | None, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=match) as error:
            sampling_levels(schedule or NoiseSchedule(), *arguments)
        assert "\n" not in str(error.value)

    leading = NoiseSchedule(timestep_spacing="leading")
    for num_steps in (0, -3, 1001):
        fails(rf"num_inference_steps is {num_steps}, must be in 1 .. 1000 \(num_train_timesteps\)", None, num_steps)
    fails("sigmas is 'lu', must be one of schedule, karras, exponential, beta", None, 5, "euler", "lu")
    fails("steps_offset 1 moves the first of 1000 steps to timestep 1000, past the last one, 999", leading, 1000)
    for spacing in ("leading", "linspace"):
        schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=0)
        fails(
            f"num_inference_steps is 1000, too many for this sampler with {spacing} spacing: timesteps .* and .* have "
            "the same noise; take fewer steps",
            schedule,
            1000,
            "dpmsolver",
        )
        assert len(sampling_levels(schedule, 999, "dpmsolver")) == 1000
    with pytest.raises(AssertionError):
        sampling_levels(NoiseSchedule(), 5, "flow")
