"""The training loss, its weights and caption dropout, against torch, diffusers and formulas written out by hand."""

import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from diffusion_batch import PREDICTION_TYPES, batch

from latentdiff.diffusion.objective import Objective, diffusion_loss, drop_captions
from latentdiff.diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_by_hand(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, timesteps = batch()
    context = torch.randn(6, 5, 3)

    def model(noisy_latents, timesteps, context):
        return 0.5 * noisy_latents + context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + 0.001 * timesteps.view(-1, 1, 1, 1)

    loss = diffusion_loss(model, schedule, latents, context, noise, timesteps)
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
    loss = diffusion_loss(perfect, schedule, latents, torch.zeros(6, 1, 1), noise, timesteps)
    assert loss.max().item() < 1e-9


def test_loss_of_a_sample_does_not_depend_on_the_others():
    schedule = NoiseSchedule()
    latents, noise, timesteps = batch()
    context = torch.zeros(6, 1, 1)

    def model(noisy_latents, timesteps, context):
        return noisy_latents.tanh()

    together = diffusion_loss(model, schedule, latents, context, noise, timesteps)
    for i in range(6):
        parts = (part[i : i + 1] for part in (latents, context, noise, timesteps))
        alone = diffusion_loss(model, schedule, *parts)
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-6)
    assert together.unique().numel() == 6


@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_errors_are_those_of_torch(loss_type):
    output, target = torch.randn(4, 3, 5, 5) * 3, torch.randn(4, 3, 5, 5)
    objective = Objective(loss_type=loss_type, huber_delta=0.7)
    expected = {
        "mse": lambda a, b: F.mse_loss(a, b),
        "l1": lambda a, b: F.l1_loss(a, b),
        "huber": lambda a, b: 0.7 * F.smooth_l1_loss(a, b, beta=0.7),
    }[loss_type]
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
    """The weighted loss of one and the same guess of x0 does not depend on the network's parameterisation.

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
    loss = diffusion_loss(lambda x, t, c: output, schedule, latents, torch.zeros(6, 1, 1), noise, timesteps, objective)
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
    weights = Objective(weighting="min_snr").weights(schedule)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=0)
    assert (Objective().weights(schedule) == 1).all()


def test_p2_weight_of_epsilon_by_hand():
    """(1 + abar / (1 - abar))^-gamma."""
    schedule = NoiseSchedule(num_train_timesteps=200, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
    weights = Objective(weighting="p2", p2_gamma=0.5).weights(schedule).numpy()
    np.testing.assert_allclose(weights, (1 + abar / (1 - abar)) ** -0.5, rtol=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "l2"}, "loss_type is 'l2', must be one of mse, l1, huber"),
        ({"weighting": "snr"}, "weighting is 'snr', must be one of constant, min_snr, p2"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0, must be above 0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma is -1.0, must be above 0"),
        ({"p2_gamma": -0.1}, "p2_gamma is -0.1, must be at least 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Objective(**fields)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_reaches_the_model(prediction_type):
    """d loss / d w of a model that returns w everywhere is 2 * mean(w - target), also after sampling built a table.

    A table first built under inference_mode must not poison training, as happens when validation runs before step 1.
    """
    schedule = NoiseSchedule(prediction_type=prediction_type, beta_end=0.0123)  # a schedule of its own: a fresh table
    latents, noise, timesteps = batch()
    with torch.inference_mode():
        schedule.alpha_sigma(timesteps, latents)
    w = torch.tensor(0.3, requires_grad=True)
    diffusion_loss(
        lambda x, t, context: w.expand_as(x), schedule, latents, torch.zeros(6, 1, 1), noise, timesteps
    ).mean().backward()
    target = schedule.target(latents, noise, timesteps)
    assert w.grad.item() == pytest.approx(2 * (0.3 - target).mean().item(), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_host_does_not_wait_for_cuda(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    expected = diffusion_loss(lambda x, t, context: x.square(), schedule, *_with_context(*batch()))
    arguments = [part.cuda() for part in _with_context(*batch())]
    schedule.alpha_sigma(arguments[-1], arguments[0])  # uploads the table
    level = schedule.level(500)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = diffusion_loss(lambda x, t, context: x.square(), schedule, *arguments)
        schedule.predict_x0(arguments[0], arguments[0], level)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)


def _with_context(latents, noise, timesteps):
    return latents, torch.zeros(len(latents), 1, 1), noise, timesteps


def test_drop_captions_replaces_whole_rows():
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


def test_drop_captions_has_the_requested_rate():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(2))
    dropped = drop_captions(torch.ones(100_000, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0.1, uniform)
    rows = dropped.sum(dim=1)
    assert set(rows.tolist()) == {0, 3}  # whole captions, never single tokens
    assert (rows == 0).float().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 100_000))
