"""The noise schedule, its conversions and its loss, against diffusers and against formulas written out by hand."""

import copy
import dataclasses
import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from tiny import SD1_SCHEDULER

from latentdiff.diffusion.objective import Objective, drop_captions
from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule

BETA_SCHEDULES = ["linear", "scaled_linear", "cosine"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise [size, 4, 8, 8] and timesteps that cover both ends."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=generator)
    return latents, noise, torch.linspace(0, 999, size).long()


# --- the schedule ---


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [1, 10, 1000])
def test_alphas_cumprod_equals_diffusers(beta_schedule, num_train_timesteps):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, num_train_timesteps=num_train_timesteps)
    reference = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
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
def test_alpha_sigma(beta_schedule):
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
    reference = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=5e-6, rtol=0)
    # Its function on float64 betas is the same to rounding.
    abar = plain.alphas_cumprod
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(schedule.alphas_cumprod, rescaled, atol=1e-12, rtol=0)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(abar[0].item(), rel=1e-12)
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_training_at_pure_noise():
    """At a terminal SNR of zero the noisy latents are the noise, and v is minus the latents."""
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    latents, noise, _ = batch()
    last = torch.full((6,), 999)
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.target(latents, noise, last), -latents)
    assert torch.equal(schedule.predict_x0(-latents, noise, last), latents)
    assert torch.equal(schedule.predict_epsilon(-latents, noise, last), noise)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "rescale_betas_zero_snr is true with prediction_type epsilon, must be with v_prediction or sample"),
        ({"prediction_type": "sample", "num_train_timesteps": 1}, "needs num_train_timesteps of at least 2, it is 1"),
    ],
)
def test_rescale_betas_zero_snr_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        NoiseSchedule(rescale_betas_zero_snr=True, **fields)
    with pytest.raises(ValueError, match=says):
        NoiseSchedule.from_scheduler_config({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True} | fields)


# --- noise levels ---


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_levels_of_timesteps_and_of_ratios_are_inverse(beta_schedule, rescaled):
    """On the trained timesteps and, as one interpolates the ratio and the other its logarithm, nearly so between."""
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
    # Beyond the trained ones the noise is as asked, the timestep the nearest.
    for ratio, timestep in ((1e-3, 0), (1e3, 999)):
        level = schedule.level_of_sigma_karras(ratio)
        assert level.timestep == timestep and level.sigma_karras == pytest.approx(ratio, rel=1e-12)
    # The cosine schedule's last abar is below 2^-24 and stays.
    cosine = NoiseSchedule(beta_schedule="cosine")
    assert (
        cosine.largest_sigma_karras == pytest.approx(cosine.level(999).sigma_karras, rel=1e-12)
        and cosine.largest_sigma_karras > 2e4
    )
    zero = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="sample")
    assert zero.level(999) == NoiseLevel(999, 0.0, 1.0)
    assert zero.level(999).sigma_karras == math.inf and zero.level(999).half_log_snr == -math.inf
    assert zero.largest_sigma_karras == pytest.approx(math.sqrt(2**24 - 1), rel=1e-12)
    for timestep in (-1, -0.5, 999.5, 1000):
        with pytest.raises(AssertionError):
            schedule.level(timestep)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_at(prediction_type):
    """As predict_x0 on the trained timesteps; between them by hand."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    output, noisy_latents, timesteps = batch()
    for i, timestep in enumerate(timesteps.tolist()):
        ours = schedule.predict_x0(output[i], noisy_latents[i], schedule.level(timestep))
        expected = schedule.predict_x0(output, noisy_latents, timesteps)[i]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
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


def test_schedule_is_a_value():
    """Equal fields are equal schedules with one hash, computed table or not; copies and replacements work."""
    first, second = NoiseSchedule(), NoiseSchedule()
    assert first.alphas_cumprod is first.alphas_cumprod
    assert first == second and hash(first) == hash(second) and copy.deepcopy(first) == first
    other = dataclasses.replace(first, beta_schedule="linear")
    assert other != first and not torch.equal(other.alphas_cumprod, first.alphas_cumprod)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.beta_end = 0.5


def test_final_alpha_cumprod():
    assert NoiseSchedule().final_alpha_cumprod == 1.0
    assert NoiseSchedule(set_alpha_to_one=False).final_alpha_cumprod == pytest.approx(1 - 0.00085, rel=1e-12)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("beta_schedule", "sigmoid", "linear, scaled_linear, cosine"),
        ("prediction_type", "v", "epsilon, v_prediction, sample"),
        ("timestep_spacing", "karras", "leading, linspace, trailing"),
        ("num_train_timesteps", 0, "at least 1"),
        ("beta_start", 0.0, "0 < beta_start"),
        ("beta_start", 0.5, "beta_start <= beta_end"),
        ("beta_end", 1.0, "beta_end < 1"),
        ("beta_end", float("nan"), "beta_end < 1"),
        ("steps_offset", -1, "0 .. 999"),
        ("steps_offset", 1000, "0 .. 999"),
    ],
)
def test_bad_fields_are_named(field, value, says):
    with pytest.raises(ValueError) as error:
        NoiseSchedule(**{field: value})
    message = str(error.value)
    assert field in message and str(value) in message and says in message and "\n" not in message


# --- noising and conversions ---


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_add_noise_and_velocity_equal_diffusers(beta_schedule):
    latents, noise, timesteps = batch()
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type="v_prediction")
    reference = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
    ours, theirs = schedule.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours, theirs = schedule.target(latents, noise, timesteps), reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_conversions_undo_the_target(beta_schedule, prediction_type):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    latents, noise, timesteps = (part.double() for part in batch())
    timesteps = timesteps.long()
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    x0 = schedule.predict_x0(target, noisy_latents, timesteps)
    epsilon = schedule.predict_epsilon(target, noisy_latents, timesteps)
    # v is undone by alpha^2 + sigma^2 = 1, which the float32 table holds to 1e-7; the others are exact inverses.
    torch.testing.assert_close(x0, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(epsilon, noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_in_float32(prediction_type):
    """The default schedule in float32: 1 / alpha <= 15 and 1 / sigma <= 35 bound the loss of digits."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    x0 = schedule.predict_x0(target, noisy_latents, timesteps)
    epsilon = schedule.predict_epsilon(target, noisy_latents, timesteps)
    torch.testing.assert_close(x0, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(epsilon, noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_equal_diffusers_on_a_wrong_output(prediction_type):
    """An arbitrary output, as a real network's: x0 as DDIMScheduler.step reports it, epsilon as it then must be."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    reference = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
    reference.set_timesteps(50)
    output, noisy_latents, timesteps = batch()
    x0 = schedule.predict_x0(output, noisy_latents, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        theirs = reference.step(output[i], timestep, noisy_latents[i]).pred_original_sample
        torch.testing.assert_close(x0[i], theirs, atol=1e-5, rtol=1e-4)
    alpha, sigma = schedule.alpha_sigma(timesteps, output)
    epsilon = schedule.predict_epsilon(output, noisy_latents, timesteps)
    torch.testing.assert_close(alpha * x0 + sigma * epsilon, noisy_latents, atol=1e-5, rtol=0)


def test_half_precision_is_computed_in_float32():
    """bfloat16 in, bfloat16 out, and only one rounding in between."""
    schedule = NoiseSchedule()
    latents, noise, timesteps = batch()
    latents, noise = latents.bfloat16(), noise.bfloat16()
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    assert torch.equal(noisy_latents, schedule.add_noise(latents.float(), noise.float(), timesteps).bfloat16())
    x0 = schedule.predict_x0(noise, noisy_latents, timesteps)
    assert torch.equal(x0, schedule.predict_x0(noise.float(), noisy_latents.float(), timesteps).bfloat16())
    epsilon = schedule.predict_epsilon(noise.float(), noisy_latents, timesteps)
    assert x0.dtype == epsilon.dtype == torch.bfloat16


# --- the loss ---


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_by_hand(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    context = torch.randn(6, 5, 3)

    def model(noisy_latents, timesteps, context):
        return 0.5 * noisy_latents + context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + 0.001 * timesteps.view(-1, 1, 1, 1)

    loss = schedule.loss(model, latents, context, noise, timesteps)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for i, t in enumerate(timesteps.tolist()):
        abar = np.prod(1 - betas[: t + 1])
        x0, epsilon = latents[i].double().numpy(), noise[i].double().numpy()
        output = 0.5 * (abar**0.5 * x0 + (1 - abar) ** 0.5 * epsilon) + context[i].mean().item() + 0.001 * t
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x0
        target = {"epsilon": epsilon, "v_prediction": v, "sample": x0}[prediction_type]
        assert loss[i].item() == pytest.approx(((output - target) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_model_has_no_loss(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    perfect = {
        "epsilon": lambda x, t, context: (x - schedule.alpha_sigma(t, x)[0] * latents) / schedule.alpha_sigma(t, x)[1],
        "sample": lambda x, t, context: latents,
        "v_prediction": lambda x, t, context: (
            (schedule.alpha_sigma(t, x)[0] * x - latents) / schedule.alpha_sigma(t, x)[1]
        ),
    }[prediction_type]
    loss = schedule.loss(perfect, latents, torch.zeros(6, 1, 1), noise, timesteps)
    assert loss.max().item() < 1e-9


def test_loss_of_a_sample_does_not_depend_on_the_others():
    schedule = NoiseSchedule()
    latents, noise, timesteps = batch()
    context = torch.zeros(6, 1, 1)

    def model(noisy_latents, timesteps, context):
        return noisy_latents.tanh()

    together = schedule.loss(model, latents, context, noise, timesteps)
    for i in range(6):
        alone = schedule.loss(model, latents[i : i + 1], context[i : i + 1], noise[i : i + 1], timesteps[i : i + 1])
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-6)
    assert together.unique().numel() == 6


@pytest.mark.parametrize("error", ["mse", "l1", "huber"])
def test_errors_are_those_of_torch(error):
    output, target = torch.randn(4, 3, 5, 5) * 3, torch.randn(4, 3, 5, 5)
    objective = Objective(error=error, huber_delta=0.7)
    expected = {
        "mse": lambda a, b: F.mse_loss(a, b),
        "l1": lambda a, b: F.l1_loss(a, b),
        "huber": lambda a, b: 0.7 * F.smooth_l1_loss(a, b, beta=0.7),
    }[error]
    errors = objective.errors(output, target)
    assert errors.shape == (4,)
    for i in range(4):
        assert errors[i].item() == pytest.approx(expected(output[i], target[i]).item(), rel=1e-6)
    assert objective.errors(output.bfloat16(), target).dtype == torch.float32


def test_huber_by_hand():
    """d^2 / 2 near zero, a line of slope delta from |d| = delta on."""
    output = torch.tensor([0.5, 1.0, 3.0, -4.0]).view(4, 1, 1, 1)
    errors = Objective(loss_type="huber").errors(output, torch.zeros_like(output))
    assert errors.tolist() == [0.125, 0.5, 2.5, 3.5]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("objective", [Objective(weighting="min_snr"), Objective(weighting="p2", p2_gamma=0.8)])
def test_weights_are_one_objective_for_every_prediction(prediction_type, objective):
    """The weighted loss of one and the same guess of x0 does not depend on how the network says it.

    As a function of that guess's error it is min(SNR, gamma) (min-SNR) and SNR / (1 + SNR)^gamma (p2).
    """
    schedule = NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    latents, noise = latents.double(), noise.double()
    guess = latents + 0.1 * torch.randn(latents.shape, dtype=torch.float64)
    abar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    epsilon = (noisy_latents - abar.sqrt() * guess) / (1 - abar).sqrt()
    output = {
        "epsilon": epsilon,
        "v_prediction": abar.sqrt() * epsilon - (1 - abar).sqrt() * guess,
        "sample": guess,
    }[prediction_type]
    loss = schedule.loss(lambda x, t, c: output, latents, torch.zeros(6, 1, 1), noise, timesteps, objective)
    snr = (abar / (1 - abar)).flatten()
    weight = snr.clamp(max=5.0) if objective.weighting == "min_snr" else snr * (1 + snr) ** -0.8
    expected = weight * (guess - latents).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers(prediction_type):
    """Its training scripts divide min(SNR, 5) by SNR for epsilon and by SNR + 1 for v."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    timesteps = torch.arange(1000)
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, timesteps).double()
    expected = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    weights = schedule.loss_weights(Objective(weighting="min_snr"))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=0)
    assert (schedule.loss_weights(Objective()) == 1).all()


def test_p2_weight_of_epsilon_is_the_tutorials():
    """(1 + abar / (1 - abar))^-gamma."""
    schedule = NoiseSchedule(num_train_timesteps=200, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
    weights = schedule.loss_weights(Objective(weighting="p2", p2_gamma=0.5)).numpy()
    np.testing.assert_allclose(weights, (1 + abar / (1 - abar)) ** -0.5, rtol=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"error": "l2"}, "error is 'l2', must be one of mse, l1, huber"),
        ({"weighting": "snr"}, "weighting is 'snr', must be one of constant, min_snr, p2"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0, must be above 0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma is -1.0, must be above 0"),
        ({"p2_gamma": -0.1}, "p2_gamma is -0.1, must be at least 0"),
    ],
)
def test_objective_refuses(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Objective(**fields)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_flows(prediction_type):
    """d loss / d w of a model that returns w everywhere is 2 * mean(w - target), also after a table made for sampling.

    A table first built under inference_mode must not poison training, as happens when validation runs before step 1.
    """
    schedule = NoiseSchedule(prediction_type=prediction_type, beta_end=0.0123)  # a schedule of its own: a fresh table
    latents, noise, timesteps = batch()
    with torch.inference_mode():
        schedule.alpha_sigma(timesteps, latents)
    w = torch.tensor(0.3, requires_grad=True)
    schedule.loss(
        lambda x, t, context: w.expand_as(x), latents, torch.zeros(6, 1, 1), noise, timesteps
    ).mean().backward()
    target = schedule.target(latents, noise, timesteps)
    assert w.grad.item() == pytest.approx(2 * (0.3 - target).mean().item(), rel=1e-4)
    output = torch.zeros_like(latents, requires_grad=True)
    schedule.predict_x0(output, latents, timesteps).sum().backward()
    alpha, sigma = schedule.alpha_sigma(timesteps, latents)
    slope = {"epsilon": -sigma / alpha, "v_prediction": -sigma, "sample": torch.ones_like(sigma)}[prediction_type]
    torch.testing.assert_close(output.grad, slope.expand_as(latents))


@pytest.mark.gpu
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_host_does_not_wait_for_cuda(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    expected = schedule.loss(lambda x, t, context: x.square(), *_with_context(*batch()))
    arguments = [part.cuda() for part in _with_context(*batch())]
    schedule.alpha_sigma(arguments[-1], arguments[0])  # uploads the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = schedule.loss(lambda x, t, context: x.square(), *arguments)
        schedule.predict_x0(arguments[0], arguments[0], arguments[-1])
        schedule.predict_epsilon(arguments[0], arguments[0], arguments[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)


def _with_context(latents, noise, timesteps):
    return latents, torch.zeros(len(latents), 1, 1), noise, timesteps


# --- caption dropout ---


def test_drop_captions():
    input_ids = torch.arange(20).view(4, 5)
    unconditional_ids = torch.tensor([90, 91, 92, 93, 94])
    uniform = torch.tensor([0.0, 0.1, 0.0999, 0.7])
    before = input_ids.clone()
    dropped = drop_captions(input_ids, unconditional_ids, 0.1, uniform)
    assert dropped.tolist() == [
        unconditional_ids.tolist(),
        before[1].tolist(),
        unconditional_ids.tolist(),
        before[3].tolist(),
    ]
    assert torch.equal(input_ids, before) and dropped.dtype == torch.int64
    uniform[0], uniform[3] = 0.0, 1 - 2**-24  # both ends of what torch.rand returns
    assert torch.equal(drop_captions(input_ids, unconditional_ids, 0.0, uniform), input_ids)
    assert torch.equal(drop_captions(input_ids, unconditional_ids, 1.0, uniform), unconditional_ids.expand(4, 5))


def test_drop_captions_of_contexts():
    """[B, L, D], from a frozen text encoder: whole contexts are replaced, the others stay bit for bit."""
    context = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    empty = torch.full((4, 5), 7.0)
    dropped = drop_captions(context, empty, 0.5, torch.tensor([0.5, 0.4999, 0.9]))
    assert dropped.dtype == torch.float32 and dropped.shape == (3, 4, 5)
    assert torch.equal(dropped[[0, 2]], context[[0, 2]]) and torch.equal(dropped[1], empty)
    # Also where batch, length and width are the same number.
    cube = drop_captions(torch.zeros(2, 2, 2), torch.ones(2, 2), 0.5, torch.tensor([0.9, 0.1]))
    assert cube.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    for wrong in (torch.zeros(5), torch.zeros(4), torch.zeros(3, 4, 5)):
        with pytest.raises(AssertionError):
            drop_captions(context, wrong, 0.5, torch.rand(3))
    with pytest.raises(AssertionError):
        drop_captions(context, empty, 0.5, torch.rand(4))


def test_drop_captions_rate():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(2))
    dropped = drop_captions(torch.ones(100_000, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0.1, uniform)
    rows = dropped.sum(dim=1)
    assert set(rows.tolist()) == {0, 3}  # whole captions, never single tokens
    assert (rows == 0).float().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 100_000))


# --- diffusers' scheduler_config.json ---

SCHEDULES = [
    NoiseSchedule(),
    NoiseSchedule(beta_schedule="cosine", prediction_type="v_prediction", timestep_spacing="linspace"),
    NoiseSchedule(
        beta_schedule="linear",
        beta_start=0.0002,
        beta_end=0.03,
        num_train_timesteps=500,
        prediction_type="sample",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    ),
    NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduler_config_round_trip(schedule):
    assert NoiseSchedule.from_scheduler_config(schedule.to_scheduler_config()) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers_reads_our_config(schedule, tmp_path):
    config = schedule.to_scheduler_config()
    reference = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-6, rtol=0)
    assert float(reference.final_alpha_cumprod) == pytest.approx(schedule.final_alpha_cumprod, abs=1e-6)
    # Every key of the class is written and none is unknown to it: nothing is left to diffusers' defaults.
    assert set(config) - {"_class_name"} == set(inspect.signature(diffusers.DDIMScheduler).parameters)
    # And back, through the file that diffusers writes.
    reference.save_pretrained(tmp_path)
    assert NoiseSchedule.from_scheduler_config(diffusers.DDIMScheduler.load_config(tmp_path)) == schedule


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy
@pytest.mark.parametrize(
    "name",
    "DDIM DDPM PNDM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete "
    "HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete UniPCMultistep".split(),
)
def test_missing_keys_take_the_class_defaults(name):
    """A config with nothing but the class name is that class built without arguments."""
    reference = getattr(diffusers, f"{name}Scheduler")()
    schedule = NoiseSchedule.from_scheduler_config({"_class_name": f"{name}Scheduler"})
    for field in dataclasses.fields(NoiseSchedule):
        # Whether to clip is not the config's to say but follows from there being an autoencoder.
        if field.name in reference.config and field.name != "clip_sample":
            assert getattr(schedule, field.name) == reference.config[field.name], field.name
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-6, rtol=0)


def test_stable_diffusion_config():
    """The file that comes with Stable Diffusion 1.5."""
    config = SD1_SCHEDULER | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False}
    expected = NoiseSchedule(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    assert NoiseSchedule.from_scheduler_config(config) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trained_betas", [0.1, 0.2]),
        ("thresholding", True),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_unsupported_configs_name_the_key(key, value):
    with pytest.raises(ValueError, match=key) as error:
        NoiseSchedule.from_scheduler_config({"_class_name": "DDPMScheduler", key: value})
    assert str(value) in str(error.value)
