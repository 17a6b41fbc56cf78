"""The network's target and the clean latents that its output implies, against diffusers and by hand."""

import diffusers
import pytest
import torch
from diffusion_batch import BETA_SCHEDULES, PREDICTION_TYPES, batch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.scheduler_config import write_scheduler_config


def predict_x0(schedule: NoiseSchedule, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """schedule.predict_x0, with a timestep per sample."""
    samples = zip(output, noisy_latents, timesteps.tolist(), strict=True)
    return torch.stack([schedule.predict_x0(o, x, schedule.level(t)) for o, x, t in samples])


def implied_noise(schedule: NoiseSchedule, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """The noise that the output implies; a reference."""
    alpha, sigma = schedule.alpha_sigma(timesteps, noisy_latents)
    return {
        "epsilon": output,
        "v_prediction": alpha * output + sigma * noisy_latents,
        "sample": (noisy_latents - alpha * output) / sigma,
    }[schedule.prediction_type]


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_velocity_equals_diffusers(beta_schedule):
    latents, noise, timesteps = batch()
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type="v_prediction")
    reference = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    ours, theirs = schedule.target(latents, noise, timesteps), reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_targets_at_pure_noise():
    """At a terminal SNR of zero the noisy latents are the noise, and v is minus the latents."""
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    latents, noise, _ = batch()
    last = torch.full((6,), 999)
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.target(latents, noise, last), -latents)
    assert torch.equal(schedule.predict_x0(-latents, noise, schedule.level(999)), latents)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_predict_x0_undoes_the_target(beta_schedule, prediction_type):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    latents, noise = latents.double(), noise.double()
    abar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), noisy_latents, atol=1e-6, rtol=0)
    # The target's float32 table holds alpha^2 + sigma^2 = 1, which undoes v, to 1e-7; the others are exact inverses.
    target = schedule.target(latents, noise, timesteps)
    x0 = predict_x0(schedule, target, noisy_latents, timesteps)
    torch.testing.assert_close(x0, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(implied_noise(schedule, target, noisy_latents, timesteps), noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_in_float32(prediction_type):
    """The default schedule: 1 / alpha <= 15 bounds the loss of digits."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    x0 = predict_x0(schedule, target, noisy_latents, timesteps)
    torch.testing.assert_close(x0, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(implied_noise(schedule, target, noisy_latents, timesteps), noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_equals_diffusers_on_a_wrong_output(prediction_type):
    """An arbitrary output, like a real network's: x0 as DDIMScheduler.step reports it."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    reference = diffusers.DDIMScheduler.from_config(write_scheduler_config(schedule, "ddim"))
    reference.set_timesteps(50)
    output, noisy_latents, timesteps = batch()
    x0 = predict_x0(schedule, output, noisy_latents, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        theirs = reference.step(output[i], timestep, noisy_latents[i]).pred_original_sample
        torch.testing.assert_close(x0[i], theirs, atol=1e-5, rtol=1e-4)
    alpha, sigma = schedule.alpha_sigma(timesteps, output)
    noise = implied_noise(schedule, output, noisy_latents, timesteps)
    torch.testing.assert_close(alpha * x0 + sigma * noise, noisy_latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_between_timesteps(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    level = schedule.level(123.4)
    latents, noise = batch()[0].double(), batch()[1].double()
    noisy_latents = level.alpha * latents + level.sigma * noise
    target = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": level.alpha * noise - level.sigma * latents,
    }[prediction_type]
    torch.testing.assert_close(schedule.predict_x0(target, noisy_latents, level), latents, atol=1e-12, rtol=0)
    assert schedule.predict_x0(target.bfloat16(), noisy_latents.bfloat16(), level).dtype == torch.bfloat16


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_of_predict_x0(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, _, timesteps = batch()
    output = torch.zeros_like(latents, requires_grad=True)
    predict_x0(schedule, output, latents, timesteps).sum().backward()
    alpha, sigma = schedule.alpha_sigma(timesteps, latents)
    slope = {"epsilon": -sigma / alpha, "v_prediction": -sigma, "sample": torch.ones_like(sigma)}[prediction_type]
    torch.testing.assert_close(output.grad, slope.expand_as(latents))


def test_predict_x0_keeps_the_dtype_of_the_noisy_latents():
    """bfloat16 noisy latents with a float32 output, as from a network under autocast."""
    for prediction_type in PREDICTION_TYPES:
        schedule = NoiseSchedule(prediction_type=prediction_type)
        output, noisy_latents, _ = batch()
        for timestep in (0, 500, 999):
            x0 = schedule.predict_x0(output.bfloat16(), noisy_latents.bfloat16(), schedule.level(timestep))
            exact = schedule.predict_x0(
                output.bfloat16().double(), noisy_latents.bfloat16().double(), schedule.level(timestep)
            )
            assert x0.dtype == torch.bfloat16
            # Two roundings of 2^-9, each relative to the terms of the sum.
            scale = noisy_latents.abs().max() / (schedule.level(timestep).alpha if prediction_type == "epsilon" else 1)
            assert (x0.double() - exact).abs().max() <= 2**-7 * scale
