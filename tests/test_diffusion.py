"""The noise schedule, its conversions and its loss, against diffusers and against formulas written out by hand."""

import copy
import dataclasses
import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from tiny import SD1_SCHEDULER

from latentdiff.diffusion import NoiseSchedule, drop_captions, sampling_timesteps

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
    empty_ids = torch.tensor([90, 91, 92, 93, 94])
    uniform = torch.tensor([0.0, 0.1, 0.0999, 0.7])
    before = input_ids.clone()
    dropped = drop_captions(input_ids, empty_ids, 0.1, uniform)
    assert dropped.tolist() == [empty_ids.tolist(), before[1].tolist(), empty_ids.tolist(), before[3].tolist()]
    assert torch.equal(input_ids, before) and dropped.dtype == torch.int64
    uniform[0], uniform[3] = 0.0, 1 - 2**-24  # both ends of what torch.rand returns
    assert torch.equal(drop_captions(input_ids, empty_ids, 0.0, uniform), input_ids)
    assert torch.equal(drop_captions(input_ids, empty_ids, 1.0, uniform), empty_ids.expand(4, 5))


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


# --- sampling timesteps ---


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 64])
def test_sampling_timesteps_equal_diffusers(spacing, num_train_timesteps):
    """Every possible number of steps."""
    schedule = NoiseSchedule(timestep_spacing=spacing, num_train_timesteps=num_train_timesteps)
    reference = diffusers.DDIMScheduler.from_config(schedule.to_scheduler_config())
    with_an_extra_step = []
    for num_steps in range(1, num_train_timesteps + 1):
        reference.set_timesteps(num_steps)
        theirs = reference.timesteps.tolist()
        if theirs[-1] == -1:
            with_an_extra_step.append(num_steps)
            theirs.pop()
        ours = sampling_timesteps(schedule, num_steps)
        assert ours == theirs
        assert len(ours) == num_steps and 0 <= ours[-1] and ours[0] < num_train_timesteps
        assert all(first > second for first, second in zip(ours, ours[1:], strict=False))
        assert all(type(t) is int for t in ours)
    assert (61 in with_an_extra_step) == (spacing == "trailing" and num_train_timesteps == 1000)


def test_stable_diffusion_timesteps():
    schedule = NoiseSchedule(timestep_spacing="leading", steps_offset=1)
    assert sampling_timesteps(schedule, 50) == list(range(981, 0, -20))
    assert sampling_timesteps(NoiseSchedule(), 50) == list(range(999, 0, -20))


def test_bad_num_inference_steps():
    for num_steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps is {num_steps}, must be in 1 .. 1000"):
            sampling_timesteps(NoiseSchedule(), num_steps)
    with pytest.raises(ValueError, match="steps_offset 1 moves the first of 1000 steps to timestep 1000"):
        sampling_timesteps(NoiseSchedule(timestep_spacing="leading", steps_offset=1), 1000)


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
    reference.set_timesteps(20)
    assert sampling_timesteps(schedule, 20) == reference.timesteps.tolist()
    # Every key of the class is written and none is unknown to it: nothing is left to diffusers' defaults.
    assert set(config) - {"_class_name"} == set(inspect.signature(diffusers.DDIMScheduler).parameters)
    # And back, through the file that diffusers writes.
    reference.save_pretrained(tmp_path)
    assert NoiseSchedule.from_scheduler_config(diffusers.DDIMScheduler.load_config(tmp_path)) == schedule


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy
@pytest.mark.parametrize(
    "name",
    "DDIM DDPM PNDM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete "
    "HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete UniPCMultistep".split(),
)
def test_missing_keys_take_the_class_defaults(name):
    """A config with nothing but the class name is that class built without arguments."""
    reference = getattr(diffusers, f"{name}Scheduler")()
    schedule = NoiseSchedule.from_scheduler_config({"_class_name": f"{name}Scheduler"})
    for field in dataclasses.fields(NoiseSchedule):
        if field.name in reference.config:
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
        ("rescale_betas_zero_snr", True),
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
