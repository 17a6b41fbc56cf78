"""The noise schedule and its noise levels, against diffusers and against formulas written out by hand."""

import copy
import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusion_batch import BETA_SCHEDULES, batch

from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentdiff.formats.scheduler_config import write_scheduler_config


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [1, 10, 1000])
def test_alphas_cumprod_equals_diffusers(beta_schedule, num_train_timesteps):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, num_train_timesteps=num_train_timesteps, steps_offset=0)
    reference = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-6, rtol=0)


def test_alphas_cumprod_by_hand():
    linear = NoiseSchedule(beta_schedule="linear", beta_start=0.1, beta_end=0.3, num_train_timesteps=3)
    np.testing.assert_allclose(linear.alphas_cumprod, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=1e-14)
    scaled = NoiseSchedule(beta_start=0.01, beta_end=0.09, num_train_timesteps=3)
    np.testing.assert_allclose(scaled.alphas_cumprod, [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91], rtol=1e-14)
    # Below the cap the product telescopes to the paper's own abar(t) = f(t) / f(0).
    cosine = NoiseSchedule(beta_schedule="cosine")
    f_start, f_middle = (math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0.0, 0.5))
    assert cosine.alphas_cumprod[499].item() == pytest.approx(f_middle / f_start, rel=1e-12)
    assert (1 - cosine.alphas_cumprod[999] / cosine.alphas_cumprod[998]).item() == pytest.approx(0.999, rel=1e-9)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alpha_sigma_are_the_square_roots(beta_schedule):
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    timesteps = torch.arange(1000)
    alpha, sigma = schedule.alpha_sigma(timesteps, like=torch.zeros(1000, 4, 1, 1, dtype=torch.bfloat16))
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), atol=2e-7, rtol=0)
    torch.testing.assert_close(alpha.flatten(), schedule.alphas_cumprod.sqrt().float(), atol=0, rtol=0)
    assert (alpha.diff(dim=0) < 0).all() and (sigma.diff(dim=0) > 0).sum() >= 990  # sigma rounds to 1 at cosine's end


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [2, 10, 1000])
def test_rescale_betas_zero_snr_equals_diffusers(beta_schedule, num_train_timesteps):
    """diffusers rescales in float32, dividing by a difference of square roots: 0.03 for T = 10, hence 3e-6."""
    plain = NoiseSchedule(beta_schedule=beta_schedule, num_train_timesteps=num_train_timesteps)
    schedule = dataclasses.replace(plain, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    reference = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=5e-6, rtol=0)
    # Its function on float64 betas is the same to rounding.
    abar = plain.alphas_cumprod
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(schedule.alphas_cumprod, rescaled, atol=1e-12, rtol=0)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(abar[0].item(), rel=1e-12)
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "rescale_betas_zero_snr is true with prediction_type epsilon, must be with v_prediction or sample"),
        (
            {"prediction_type": "sample", "num_train_timesteps": 1, "steps_offset": 0},
            "needs num_train_timesteps of at least 2, it is 1",
        ),
    ],
)
def test_rescale_betas_zero_snr_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        NoiseSchedule(rescale_betas_zero_snr=True, **fields)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_level_of_a_timestep_and_of_a_sigma_are_inverse(beta_schedule, rescaled):
    """Exactly on trained timesteps; nearly between, where one interpolates sigma / alpha and one its logarithm."""
    schedule = NoiseSchedule(
        beta_schedule=beta_schedule, prediction_type="sample", rescale_betas_zero_snr=rescaled, num_train_timesteps=100
    )
    for timestep in [*range(98), 0.5, 17.25, 96.9]:
        level = schedule.level(timestep)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-14)
        assert math.exp(-level.half_log_snr) == pytest.approx(level.sigma_karras, rel=1e-12)
        back = schedule.level_of_sigma_karras(level.sigma_karras)
        assert back.timestep == pytest.approx(timestep, abs=1e-9 if timestep == int(timestep) else 0.2)
        assert (back.alpha, back.sigma) == pytest.approx((level.alpha, level.sigma), rel=1e-12)
        if timestep == int(timestep):
            assert type(level.timestep) is int
            abar = schedule.alphas_cumprod[timestep].item()
            assert (level.alpha, level.sigma) == pytest.approx((abar**0.5, (1 - abar) ** 0.5), rel=1e-12)
    low, high = schedule.level(17).sigma_karras, schedule.level(18).sigma_karras
    assert schedule.level(17.25).sigma_karras == pytest.approx(0.75 * low + 0.25 * high, rel=1e-12)
    assert schedule.level_of_sigma_karras(low**0.75 * high**0.25).timestep == pytest.approx(17.25, abs=1e-9)


def test_levels_at_the_ends():
    schedule = NoiseSchedule()
    assert CLEAN.sigma_karras == 0 and CLEAN.half_log_snr == math.inf
    assert schedule.largest_sigma_karras == pytest.approx(schedule.level(999).sigma_karras, rel=1e-12)
    # Outside the trained range the noise is the requested one and the timestep the nearest.
    for sigma_karras, timestep in ((1e-3, 0), (1e3, 999)):
        level = schedule.level_of_sigma_karras(sigma_karras)
        assert level.timestep == timestep and level.sigma_karras == pytest.approx(sigma_karras, rel=1e-12)
    # The cosine schedule's last abar is below 2^-24 and stays.
    cosine = NoiseSchedule(beta_schedule="cosine")
    assert cosine.largest_sigma_karras == pytest.approx(cosine.level(999).sigma_karras, rel=1e-12)
    assert cosine.largest_sigma_karras > 2e4
    zero = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="sample")
    assert zero.level(999) == NoiseLevel(999, 0.0, 1.0)
    assert zero.level(999).sigma_karras == math.inf and zero.level(999).half_log_snr == -math.inf
    assert zero.largest_sigma_karras == pytest.approx(math.sqrt(2**24 - 1), rel=1e-12)
    for timestep in (-1, -0.5, 999.5, 1000):
        with pytest.raises(AssertionError):
            schedule.level(timestep)


def test_schedule_is_a_value():
    """Equal fields are equal schedules with one hash, computed table or not; copies and replacements work."""
    first, second = NoiseSchedule(), NoiseSchedule()
    assert first.alphas_cumprod is first.alphas_cumprod
    assert first == second and hash(first) == hash(second) and copy.deepcopy(first) == first
    other = dataclasses.replace(first, beta_schedule="linear")
    assert other != first and not torch.equal(other.alphas_cumprod, first.alphas_cumprod)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.beta_end = 0.5


def test_final_alpha_cumprod_is_one_or_the_first():
    assert NoiseSchedule().final_alpha_cumprod == 1.0
    assert NoiseSchedule(set_alpha_to_one=False).final_alpha_cumprod == pytest.approx(1 - 0.00085, rel=1e-12)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("beta_schedule", "sigmoid", "linear, scaled_linear, cosine"),
        ("prediction_type", "v", "epsilon, v_prediction, sample"),
        ("timestep_spacing", "karras", "leading, linspace, trailing"),
        ("num_train_timesteps", 0, "in 1 .. 100000"),
        ("beta_start", 0.0, "0 < beta_start"),
        ("beta_start", 0.5, "beta_start <= beta_end"),
        ("beta_end", 1.0, "beta_end < 1"),
        ("beta_end", float("nan"), "beta_end < 1"),
        ("steps_offset", -1, "0 .. 999"),
        ("steps_offset", 1000, "0 .. 999"),
        ("steps_offset", 0.5, "must be an integer"),
        ("num_train_timesteps", True, "must be an integer"),
        ("beta_start", {}, "must be a number"),
        ("set_alpha_to_one", 1, "must be true or false"),
    ],
)
def test_bad_fields_are_named(field, value, says):
    with pytest.raises(ValueError) as error:
        NoiseSchedule(**{field: value})
    message = str(error.value)
    assert field in message and str(value) in message and says in message and "\n" not in message


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_add_noise_equals_diffusers(beta_schedule):
    latents, noise, timesteps = batch()
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    reference = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    ours, theirs = schedule.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_add_noise_computes_half_precision_in_float32():
    """bfloat16 in, bfloat16 out, and only one rounding in between."""
    schedule = NoiseSchedule()
    latents, noise, timesteps = batch()
    latents, noise = latents.bfloat16(), noise.bfloat16()
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    assert noisy_latents.dtype == torch.bfloat16
    assert torch.equal(noisy_latents, schedule.add_noise(latents.float(), noise.float(), timesteps).bfloat16())
