"""The samplers, step by step against diffusers' schedulers, and against the closed-form solution for Gaussian data."""

import math

import diffusers
import pytest
import torch

from latentdiff.diffusion import NoiseSchedule, sampling_timesteps
from latentdiff.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp_2m, get_sampler, randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own use of NumPy

SHAPE = (4, 8, 8)
CPU = torch.device("cpu")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """A fixed non-linear network output f(x, t): random 3x3 convolution, a shift by t, tanh."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(7)) / 6
    return torch.tanh(torch.nn.functional.conv2d(x, weight.to(x), padding=1) + math.sin(timestep / 100)) + 0.3 * x


def denoiser(schedule: NoiseSchedule):
    def denoise(x, timestep):
        return schedule.predict_x0(network(x, timestep), x, torch.full((len(x),), timestep))

    return denoise


def trajectory(sampler, schedule, timesteps, seeds, **options):
    """The initial noise and x after every step."""
    drawn = generators(*seeds)
    states = [randn(SHAPE, drawn, CPU, torch.float32)]
    result = sampler(
        denoiser(schedule), states[0], schedule, timesteps, drawn, lambda i, t, x, x0: states.append(x), **options
    )
    assert result is states[-1] and len(states) == len(timesteps) + 1
    return states


def reference_scheduler(name: str, schedule: NoiseSchedule, timesteps: list[int], abar: torch.Tensor | None = None):
    """diffusers' scheduler over the same timesteps, with its own float32 table unless `abar` is given."""
    cls = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,  # its defaults: dpmsolver++, order 2, midpoint, sigma 0 last
    }[name]
    reference = cls.from_config(schedule.to_scheduler_config())
    if abar is not None:
        reference.alphas_cumprod = abar
    if name == "ddim":
        reference.set_timesteps(len(timesteps))
        assert reference.timesteps.tolist() == timesteps
    else:
        reference.set_timesteps(timesteps=timesteps)
    return reference


def reference_trajectory(name, schedule, timesteps, seeds, eta=0.0, abar=None):
    """The same states by diffusers, drawing the same noise; it runs freely from the shared initial noise."""
    reference = reference_scheduler(name, schedule, timesteps, abar)
    drawn = generators(*seeds)
    states = [torch.stack([torch.randn(SHAPE, generator=generator) for generator in drawn])]
    for timestep in timesteps:
        x = states[-1]
        extra = {}
        if name == "ddpm":
            extra = {"generator": drawn}
        elif eta > 0:
            extra = {"eta": eta, "variance_noise": torch.stack([torch.randn(SHAPE, generator=g) for g in drawn])}
        states.append(reference.step(network(x, timestep), timestep, x, **extra).prev_sample)
    return states


def relative_error(states, expected) -> float:
    """The largest of max|a - b| / max|b| over the steps."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(states, expected, strict=True))


# --- against diffusers ---

CASES = [("ddpm", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0}), ("dpm++2m", {})]


@pytest.mark.parametrize("num_steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_trajectory_equals_diffusers(name, options, prediction_type, beta_schedule, spacing, num_steps):
    """After every step. With cosine and epsilon x grows to 1e4, since alpha is 5e-5 at t = 999; the error is relative.

    One of diffusers' tables is replaced by ours: at t = 0 of the cosine schedule 1 - abar is 4.128e-5, and its float32
    table has 4.131e-5. That alone moves the sigma that DPMSolver steps through by 1.4e-4 of x; see the next test.
    """
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type, timestep_spacing=spacing)
    timesteps = sampling_timesteps(schedule, num_steps)
    coarse = name == "dpm++2m" and beta_schedule == "cosine" and timesteps[-1] == 0
    states = trajectory(get_sampler(name), schedule, timesteps, [3, 4], **options)
    abar = schedule.alphas_cumprod if coarse else None
    expected = reference_trajectory(name, schedule, timesteps, [3, 4], **options, abar=abar)
    assert relative_error(states, expected) <= 1e-4


def test_float32_table_explains_the_cosine_difference():
    """DPM-Solver++ to t = 0 of the cosine schedule: 1.4e-4 from diffusers' float32 table, 1e-6 from a float64 one."""
    schedule = NoiseSchedule(beta_schedule="cosine", prediction_type="sample", timestep_spacing="leading")
    timesteps = sampling_timesteps(schedule, 50)
    states = trajectory(dpm_solver_pp_2m, schedule, timesteps, [3, 4])
    assert relative_error(states, reference_trajectory("dpm++2m", schedule, timesteps, [3, 4])) < 2e-4
    exact = reference_trajectory("dpm++2m", schedule, timesteps, [3, 4], abar=schedule.alphas_cumprod)
    assert relative_error(states, exact) < 5e-6


@pytest.mark.parametrize("num_steps", [7, 30, 48])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddpm", "dpm++2m"])
def test_uneven_steps_equal_diffusers(name, spacing, num_steps):
    """Numbers of steps that do not divide T: these schedulers, too, go to the next timestep of the list."""
    schedule = NoiseSchedule(timestep_spacing=spacing)
    timesteps = sampling_timesteps(schedule, num_steps)
    states = trajectory(get_sampler(name), schedule, timesteps, [5])
    assert relative_error(states, reference_trajectory(name, schedule, timesteps, [5])) <= 1e-4


@pytest.mark.parametrize("num_steps", [7, 30, 48])
def test_uneven_ddim_equals_diffusers_only_with_leading_spacing(num_steps):
    """diffusers' DDIM goes from t to t - T // n, which is the next timestep of a "leading" list only."""
    schedule = NoiseSchedule(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    timesteps = sampling_timesteps(schedule, num_steps)
    states = trajectory(ddim, schedule, timesteps, [5])
    assert relative_error(states, reference_trajectory("ddim", schedule, timesteps, [5])) <= 1e-4
    for spacing in ("trailing", "linspace"):
        schedule = NoiseSchedule(timestep_spacing=spacing)
        timesteps = sampling_timesteps(schedule, num_steps)
        states = trajectory(ddim, schedule, timesteps, [5])
        assert relative_error(states, reference_trajectory("ddim", schedule, timesteps, [5])) > 1e-2


def test_ddim_ends_at_the_first_alpha_cumprod():
    """set_alpha_to_one=False with steps_offset 1, as in Stable Diffusion: the last step leaves abar[0]'s noise in."""
    schedule = NoiseSchedule(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    timesteps = sampling_timesteps(schedule, 20)
    states = trajectory(ddim, schedule, timesteps, [5])
    assert relative_error(states, reference_trajectory("ddim", schedule, timesteps, [5])) <= 1e-4
    to_one = NoiseSchedule(timestep_spacing="leading", steps_offset=1)
    assert relative_error(states, reference_trajectory("ddim", to_one, timesteps, [5])) > 1e-3


# --- against each other ---


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 30, 50])
def test_ddim_with_eta_1_is_ddpm(num_steps, spacing):
    schedule = NoiseSchedule(timestep_spacing=spacing)
    timesteps = sampling_timesteps(schedule, num_steps)
    states = trajectory(ddim, schedule, timesteps, [6, 7], eta=1.0)
    assert relative_error(states, trajectory(ddpm, schedule, timesteps, [6, 7])) < 1e-5


def test_dpm_solver_without_history_is_ddim():
    """Its first and its last step are first order, and first-order DPM-Solver++ is DDIM (Lu et al. 2022b)."""
    schedule = NoiseSchedule()
    first, second = (trajectory(s, schedule, [999, 499], [8]) for s in (dpm_solver_pp_2m, ddim))
    assert relative_error(first, second) < 1e-5
    first, second = (trajectory(s, schedule, [999, 666, 333], [8]) for s in (dpm_solver_pp_2m, ddim))
    assert relative_error(first[:2], second[:2]) < 1e-5 and relative_error(first, second) > 1e-2


# --- against the solution for Gaussian data ---

MEAN, STD = 0.7, 0.4


def gaussian_denoiser(schedule: NoiseSchedule):
    """E[x0 | x] for data N(MEAN, STD^2)."""
    abars = schedule.alphas_cumprod.tolist()

    def denoise(x, timestep):
        abar = abars[timestep]
        gain = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
        return MEAN + gain * (x - math.sqrt(abar) * MEAN)

    return denoise


def gaussian_start(schedule: NoiseSchedule, timestep: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x from the true marginal at `timestep`, and where the probability-flow ODE carries it: the same quantile."""
    abar = schedule.alphas_cumprod[timestep].item()
    quantile = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = math.sqrt(abar) * MEAN + math.sqrt(abar * STD**2 + 1 - abar) * quantile
    return x, MEAN + STD * quantile


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_gaussian_data_is_reproduced(name, beta_schedule):
    """Mean and standard deviation after 500 steps; 20,000 samples have standard errors of 0.0028 and 0.0020."""
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    timesteps = sampling_timesteps(schedule, 500)
    x, _ = gaussian_start(schedule, timesteps[0], 20_000, seed=0)
    x = get_sampler(name)(gaussian_denoiser(schedule), x, schedule, timesteps, generators(1))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.008)
    # The ancestral chain comes out narrow, less so with more steps: by 0.009 here (linear), 0.005 at 1000 steps.
    assert x.std().item() == pytest.approx(STD, abs=0.015 if name == "ddpm" else 0.008)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
def test_second_order_beats_first_order(beta_schedule):
    """Distance to the probability-flow ODE's closed-form solution at 20 steps, and its decrease with more."""
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    errors = {}
    for name in ("ddim", "dpm++2m"):
        for num_steps in (20, 250):
            timesteps = sampling_timesteps(schedule, num_steps)
            x, expected = gaussian_start(schedule, timesteps[0], 1000, seed=2)
            x = get_sampler(name)(gaussian_denoiser(schedule), x, schedule, timesteps, generators(1))
            errors[name, num_steps] = rms(x - expected)
    assert errors["dpm++2m", 20] < 0.8 * errors["ddim", 20]
    assert errors["ddim", 250] < 0.011
    assert errors["dpm++2m", 250] < 0.5 * errors["ddim", 250]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_uneven_ddim_converges(spacing):
    """Why ddim follows its list: at 300 steps, diffusers' t - 3 has drifted from the list and stays 0.05 off the ODE.

    At a few steps the drift can happen to offset DDIM's own error, which has the opposite sign on these data.
    """
    schedule = NoiseSchedule(timestep_spacing=spacing, prediction_type="sample")
    timesteps = sampling_timesteps(schedule, 300)
    x, expected = gaussian_start(schedule, timesteps[0], 1000, seed=3)
    denoise = gaussian_denoiser(schedule)
    ours = ddim(denoise, x, schedule, timesteps, generators(1))
    reference = reference_scheduler("ddim", schedule, timesteps)
    for timestep in timesteps:
        x = reference.step(denoise(x, timestep), timestep, x).prev_sample
    assert rms(ours - expected) < 0.01
    assert rms(x - expected) > 0.03


# --- the contract ---


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_image_does_not_depend_on_its_batch(name, options):
    """Bit for bit, alone and at any position; the denoiser is elementwise, so only the sampler could mix images."""
    schedule = NoiseSchedule()
    timesteps = sampling_timesteps(schedule, 10)

    def sample(*seeds):
        drawn = generators(*seeds)
        x = randn(SHAPE, drawn, CPU, torch.float32)
        return get_sampler(name)(lambda x, t: 0.5 * x - 0.001 * t * x * x, x, schedule, timesteps, drawn, **options)

    alone = {seed: sample(seed)[0] for seed in (11, 12, 13)}
    for order in ((11, 12, 13), (13, 11, 12), (12, 13, 11), (12, 11)):
        for seed, image in zip(order, sample(*order), strict=True):
            assert torch.equal(image, alone[seed])
    assert not torch.equal(alone[11], alone[12])


def test_randn():
    noise = randn(SHAPE, generators(1, 2), CPU, torch.float32)
    assert noise.shape == (2, *SHAPE)
    assert torch.equal(noise[1], torch.randn(SHAPE, generator=generators(2)[0]))
    assert torch.equal(randn(SHAPE, generators(1, 2), "cpu", torch.bfloat16), noise.bfloat16())
    assert torch.equal(randn(SHAPE, generators(1, 2), "cpu", torch.float64), noise.double())
    drawn = generators(1)
    assert not torch.equal(randn(SHAPE, drawn, CPU, torch.float32), randn(SHAPE, drawn, CPU, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), CASES)
def test_cuda_equals_cpu(name, options):
    assert torch.equal(
        randn(SHAPE, generators(1), "cuda", torch.float32).cpu(), randn(SHAPE, generators(1), CPU, torch.float32)
    )
    schedule = NoiseSchedule()
    timesteps = sampling_timesteps(schedule, 20)
    results = []
    for device in ("cpu", "cuda"):
        drawn = generators(1, 2)
        x = randn(SHAPE, drawn, device, torch.float32)
        results.append(get_sampler(name)(lambda x, t: torch.tanh(x), x, schedule, timesteps, drawn, **options).cpu())
    assert relative_error(results[1:], results[:1]) < 1e-5


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_noise_is_drawn_between_steps_only(name, options, num_steps, set_alpha_to_one):
    """One draw per image and step except the last; none by the deterministic samplers."""
    schedule = NoiseSchedule(set_alpha_to_one=set_alpha_to_one)
    drawn, counted = generators(9), generators(9)
    x = randn(SHAPE, drawn, CPU, torch.float32)
    timesteps = sampling_timesteps(schedule, num_steps)
    get_sampler(name)(denoiser(schedule), x, schedule, timesteps, drawn, **options)
    stochastic = name == "ddpm" or options.get("eta") == 1.0
    for _ in range(num_steps if stochastic else 1):
        torch.randn(SHAPE, generator=counted[0])
    assert torch.equal(drawn[0].get_state(), counted[0].get_state())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_last_step_returns_x0(name, options):
    schedule = NoiseSchedule()
    seen = []
    result = get_sampler(name)(
        denoiser(schedule),
        randn(SHAPE, generators(1), CPU, torch.float32),
        schedule,
        [900, 500, 100],
        generators(2),
        lambda *step: seen.append(step),
        **options,
    )
    assert [step[:2] for step in seen] == [(0, 900), (1, 500), (2, 100)]
    torch.testing.assert_close(result, seen[-1][3], atol=1e-6, rtol=0)
    assert result is seen[-1][2] and not torch.allclose(seen[1][2], seen[1][3], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_samplers_keep_dtype_and_input_and_record_no_gradient(name, options, dtype):
    schedule = NoiseSchedule()
    x = randn(SHAPE, generators(1), CPU, dtype)
    before = x.clone()
    weight = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    timesteps = sampling_timesteps(schedule, 4)
    result = get_sampler(name)(lambda x, t: weight * x, x, schedule, timesteps, generators(2), **options)
    assert result.dtype == dtype and result.shape == x.shape and not result.requires_grad
    assert torch.equal(x, before) and result.isfinite().all()


def test_get_sampler():
    assert get_sampler("ddpm") is ddpm and get_sampler("ddim") is ddim and get_sampler("dpm++2m") is dpm_solver_pp_2m
    with pytest.raises(ValueError, match=r"unknown sampler 'euler', must be one of ddpm, ddim, dpm\+\+2m"):
        get_sampler("euler")


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}, must be in"):
        ddim(lambda x, t: x, torch.zeros(1, *SHAPE), NoiseSchedule(), [10], generators(1), eta=eta)


def test_timesteps_that_do_not_descend_are_refused():
    for timesteps in ([], [10, 10], [10, 20], [10, -1]):
        with pytest.raises(AssertionError):
            ddpm(lambda x, t: x, torch.zeros(1, *SHAPE), NoiseSchedule(), timesteps, generators(1))
