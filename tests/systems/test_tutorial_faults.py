"""Faults that are common in public tutorials on diffusion models, one test each: this project does not have them.

The tutorials: an autoencoder at 512 px and its sequel, a text-conditioned UNet on its latents; pixel-space models of
folders of 64 px images and, two of them, of Fashion-MNIST; a workshop on classifier-free guidance.
"""

import json
import math
import os
import pickle
import shutil
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cached import means
from PIL import Image
from safetensors.torch import load_file
from scripts import ROOT, TINY_UNET, TINY_VAE, metrics, run_unet, run_vae
from tiny import (
    UNET,
    VAE,
    LargestOutput,
    normal,
    perturb,
    relative_error,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    tokenizer,
)
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.modules.module import register_module_forward_pre_hook

import train_unet
import train_vae
from latentdiff.config import (
    AutoencoderKLConfig,
    DataConfig,
    OptimizerConfig,
    UNetConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
    load_config,
)
from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.data.latent_cache import LatentCache
from latentdiff.diffusion.objective import Objective, diffusion_loss, drop_captions
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.layers import Attention, AttentionBlock, TimestepEmbedding
from latentdiff.models.pixel_space import Autoencoder, PixelSpace
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.guidance import Guidance, GuidedDenoiser
from latentdiff.randomness import Stream, seed_for, spread_timesteps, uniform
from latentdiff.randomness import normal as noise_for
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.unet_inputs import caption_dropout_at
from latentdiff.training.unet_model import build_text_encoder
from latentdiff.training.vae_model import initial_autoencoder

DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # of Ho et al. 2020, and of the tutorials
DDPM_SCHEDULE = NoiseSchedule(**DDPM, num_train_timesteps=1000)


def variances(total: int) -> tuple[np.ndarray, np.ndarray]:
    """beta and abar of DDPM's schedule with `total` timesteps, by the formula."""
    betas = np.array([1e-4 + (0.02 - 1e-4) * t / (total - 1) for t in range(total)])
    return betas, np.array([math.prod(1 - betas[: t + 1]) for t in range(total)])


def generators(seed: int, count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# A training run in pixel space, and what the network was given in it


@dataclass
class Recording:
    """A run's folder and the calls of its TextConditionedUNet in training, and its time features in sampling."""

    run: Path
    training: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # noisy images, timesteps, input_ids
    sampling: list[Tensor] = field(default_factory=list)  # sine and cosine of the timesteps, a row each

    @property
    def config(self) -> UNetTrainingConfig:
        return load_config(UNetTrainingConfig, self.run / "config.yaml")

    @property
    def sample_indices(self) -> range:
        return range(self.config.train.batch_size)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Six steps on colour images of 16 px whose captions are dropped less and less, and preview images."""
    made = Recording(tmp_path_factory.mktemp("pixel_space") / "run")
    within_model = False

    def record(module: nn.Module, inputs: tuple) -> None:
        nonlocal within_model
        if isinstance(module, TextConditionedUNet):
            within_model = True
            if torch.is_grad_enabled():
                made.training.append(tuple(tensor.clone() for tensor in inputs))
        elif isinstance(module, TimestepEmbedding):
            if not within_model:
                made.sampling.append(inputs[0].clone())
            within_model = False

    pixel_space = ["model.in_channels=3", "model.out_channels=3", "model.sample_size=16"]
    hook = register_module_forward_pre_hook(record)
    try:
        run_unet(made.run, "null", *pixel_space, "train.caption_dropout=[1.0, 0.1]")
    finally:
        hook.remove()
    assert len(made.training) == made.config.train.steps == 6 and made.sampling
    return made


def images_of(config: DataConfig, channels: int) -> CaptionedImages:
    return open_images(config, channels, seed=0, progress=False)[0]


def write_image(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Sub-modules in a plain list


def used_leaves(output: Tensor) -> dict[int, Tensor]:
    """Every tensor with a gradient that the output was computed from, by its id."""
    leaves, seen, stack = {}, set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack += [following for following, _ in node.next_functions]
    return leaves


def forward_of(name: str) -> tuple[nn.Module, Tensor]:
    """A model, not built on the meta device, and what its forward pass returns."""
    unet = UNet(UNetConfig.from_diffusers({**UNET, "layers_per_block": 2}, "unet"))
    if name == "autoencoder":
        vae = AutoencoderKL(AutoencoderKLConfig.from_diffusers(VAE, "vae"))
        return vae, vae(normal(2, 3, 16, 16), normal(2, 4, 8, 8, seed=1))[0]
    if name == "unet":
        return unet, unet(normal(2, 4, 8, 8), torch.tensor([3, 999]), normal(2, 5, 16, seed=1))
    model = TextConditionedUNet(unet, tiny_text_encoder().train())
    return model, model(normal(2, 4, 8, 8), torch.tensor([3, 999]), tokenizer()(["red apple", ""]))


@pytest.mark.parametrize("name", ["autoencoder", "unet", "unet-and-text-encoder"])
def test_no_submodule_in_a_plain_list(name: str) -> None:
    """A DDPM tutorial keeps blocks in a list, which trains and saves none of them: what forward uses is registered."""
    model, output = forward_of(name)
    registered = {id(parameter): key for key, parameter in model.named_parameters()}
    assert used_leaves(output).keys() == registered.keys()
    groups = build_optimizer(model, OptimizerConfig(lr=1e-3)).param_groups
    assert sorted(id(parameter) for group in groups for parameter in group["params"]) == sorted(registered)
    output.square().mean().backward()
    assert [registered[id(p)] for p in model.parameters() if p.grad is None] == []
    assert set(registered.values()) <= model.state_dict().keys()


@pytest.mark.runs
def test_every_weight_is_trained_and_saved(recording: Recording) -> None:
    """The same of a training run: after six steps no tensor is as it was, and all are in the published files."""
    config = recording.config
    start = TextConditionedUNet(
        UNet.from_config(config.model, seed_for(config.train.seed, Stream.INIT)),
        build_text_encoder(config.text, seed_for(config.train.seed, Stream.TEXT_INIT)),
    )
    trained = load_file(recording.run / "checkpoints" / "step_00000006" / "model.safetensors")
    before = start.state_dict()
    assert {key for key, _ in start.named_parameters()} <= trained.keys() == before.keys()
    untouched = [key for key, parameter in start.named_parameters() if torch.equal(parameter, trained[key])]
    # A key's bias shifts all scores of a query equally, which changes nothing: its gradient is rounding.
    assert [key for key in untouched if not key.endswith("k_proj.bias")] == []
    averages = load_file(recording.run / "checkpoints" / "step_00000006" / "ema.safetensors")
    published = load_file(recording.run / "unet" / "diffusion_pytorch_model.safetensors")
    assert published.keys() == start.unet.state_dict().keys()
    for key, value in published.items():
        assert torch.equal(value, averages[f"unet.{key}"]), key


# ----------------------------------------------------------------------------------------------------------------------
# The noise


def test_noise_is_scaled_by_the_root_of_the_variance() -> None:
    """A DDPM tutorial multiplies noise by its variance: here noise of variance 1 gets the variance of the formula."""
    total = 1000
    betas, abar = variances(total)
    noise = normal(1, 1, 256, 256)
    for t in (0, 1, 99, 500, 999):
        noisy = DDPM_SCHEDULE.add_noise(torch.zeros_like(noise), noise, torch.tensor([t]))
        assert noisy.double().var().item() == pytest.approx((1 - abar[t]) * noise.double().var().item(), rel=1e-5)

    # A whole chain of ddpm, for Gaussian data of variance v, whose best estimate of x0 is a multiple of x.
    v = 0.25
    expected = 1.0
    for t in reversed(range(total)):  # Ho et al. 2020, eq. 7, on variances
        before = abar[t - 1] if t else 1.0
        gain = v * math.sqrt(abar[t]) / (abar[t] * v + 1 - abar[t])
        kept = math.sqrt(before) * betas[t] / (1 - abar[t]) * gain
        kept += math.sqrt(1 - betas[t]) * (1 - before) / (1 - abar[t])
        expected = kept**2 * expected + betas[t] * (1 - before) / (1 - abar[t])
    assert expected == pytest.approx(v, rel=0.05)

    sampler = get_sampler("ddpm")
    x = sampler(
        lambda x, level: x * (v * level.alpha / (level.alpha**2 * v + level.sigma**2)),
        normal(2, 1, 96, 96),
        DDPM_SCHEDULE,
        sampler.levels(DDPM_SCHEDULE, total),
        generators(0, 2),
    )
    assert x.var().item() == pytest.approx(expected, rel=0.06)  # 18,432 values: a standard error of 1 %


def test_noise_of_a_step_is_that_of_its_own_beta() -> None:
    """A guidance workshop samples with beta of t - 1: here a step is that of eq. 6 and 7, by hand."""
    total = 150
    schedule = NoiseSchedule(**DDPM, num_train_timesteps=total)
    betas, abar = variances(total)
    x, x0 = normal(1, 1, 8, 8).double(), normal(1, 1, 8, 8, seed=1).double()
    for t in (1, 2, 75, 149):
        levels = [schedule.level(t), schedule.level(t - 1), CLEAN]
        after = []  # the x after each step; the second is the last, without noise

        def keep(step: int, timestep: float, x: Tensor, x0: Tensor, after: list[Tensor] = after) -> None:
            after.append(x)

        get_sampler("ddpm")(lambda x, level: x0, x, schedule, levels, generators(2), keep)
        noise = torch.randn(1, 8, 8, generator=generators(2)[0])[None]
        sigma = math.sqrt(betas[t] * (1 - abar[t - 1]) / (1 - abar[t]))
        mean = math.sqrt(abar[t - 1]) * betas[t] / (1 - abar[t]) * x0
        mean = mean + math.sqrt(1 - betas[t]) * (1 - abar[t - 1]) / (1 - abar[t]) * x
        assert relative_error(after[0] - mean, sigma * noise) <= 1e-6


def test_last_step_adds_no_noise() -> None:
    """A Fashion-MNIST tutorial adds noise at t = 0 too: here two generators make one image from the last state."""
    sampler, x = get_sampler("ddpm"), normal(2, 1, 8, 8)
    levels = sampler.levels(DDPM_SCHEDULE, 1000)

    def ends(levels: list[NoiseLevel]) -> list[Tensor]:
        return [sampler(lambda x, level: 0.5 * x, x, DDPM_SCHEDULE, levels, generators(seed, 2)) for seed in (0, 10)]

    last, other = ends(levels[-2:])
    assert torch.equal(last, other) and torch.equal(last, 0.5 * x)  # x0 itself
    two, other = ends(levels[-3:])
    assert not torch.equal(two, other)  # the step before the last one does add noise


@pytest.mark.parametrize("total", [150, 200, 500, 1000])
def test_alpha_bar_includes_its_own_beta(total: int) -> None:
    """A Fashion-MNIST tutorial is off by one in alpha-bar: here abar[t] is the product over s <= t, as in diffusers."""
    abar = NoiseSchedule(**DDPM, num_train_timesteps=total).alphas_cumprod
    assert abar[0].item() == 1 - 1e-4
    np.testing.assert_allclose(abar, variances(total)[1], rtol=1e-12)
    reference = diffusers.DDPMScheduler(num_train_timesteps=total, **DDPM)
    torch.testing.assert_close(abar.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)  # a product in float32
    latents, noise, timesteps = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0, 1, 70, total - 1])
    noisy = NoiseSchedule(**DDPM, num_train_timesteps=total).add_noise(latents, noise, timesteps)
    assert relative_error(noisy, reference.add_noise(latents, noise, timesteps)) <= 1e-5


@pytest.mark.runs
def test_the_network_is_trained_on_minus_one_to_one_under_the_noise_of_the_formula(recording: Recording) -> None:
    """A Fashion-MNIST tutorial trains on [0, 1]: what the network got, less its noise, are 8-bit values in [-1, 1]."""
    config = recording.config
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    plan = BatchPlan(config.train.batch_size, config.train.batch_size, 1)
    batches = StepBatches(len(images), plan, 0, config.train.seed, 0, config.train.steps)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.from_numpy(np.cumprod(1 - betas))
    for step, (noisy, timesteps, _) in enumerate(recording.training):
        noise = noise_for((3, 16, 16), config.train.seed, Stream.NOISE, step, recording.sample_indices)
        alpha, sigma = (factor[timesteps].sqrt().view(-1, 1, 1, 1) for factor in (abar, 1 - abar))
        seen = (noisy.double() - sigma * noise) / alpha
        # The background is white.
        assert seen.amax().item() == pytest.approx(1.0, abs=1e-4) and -1 - 1e-4 <= seen.amin() < -0.5
        values = (seen + 1) * 127.5
        assert (values - values.round()).abs().max() <= 0.01
        expected = torch.stack([images.pixels(i) for i in batches.global_batch(step)])
        assert relative_error(seen, expected.double()) <= 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Timesteps


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_the_last_step_at_t_0_is_made(name: str) -> None:
    """A DDPM tutorial stops before t = 0: here T steps visit T - 1 .. 0, and the result is what is predicted at 0."""
    schedule = NoiseSchedule(**DDPM, num_train_timesteps=50)
    visited, estimates = [], []

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        visited.append(level.timestep)
        estimates.append(0.9 * x.clamp(-1, 1))
        return estimates[-1]

    sampler = get_sampler(name)
    x = sampler(denoise, normal(1, 1, 8, 8), schedule, sampler.levels(schedule, 50), generators(0))
    assert visited == list(range(49, -1, -1))
    assert relative_error(x, estimates[-1]) <= 1e-6


def test_training_samples_both_ends_of_the_schedule() -> None:
    """The same in training: t = 0 and t = T - 1 occur, each timestep equally often."""
    draws = torch.cat([spread_timesteps(10, 0, step, range(4), 4) for step in range(1000)])
    assert torch.bincount(draws, minlength=10).tolist() == pytest.approx([400] * 10, abs=60)  # 3 standard deviations
    draws = torch.cat([spread_timesteps(1000, 0, step, range(8), 8) for step in range(1500)])
    assert (draws.min(), draws.max()) == (0, 999)


@pytest.mark.runs
def test_each_image_of_a_batch_has_its_own_timestep(recording: Recording) -> None:
    """A text-to-image tutorial uses one timestep per batch: here there is one in each eighth of the schedule."""
    for _, timesteps, _ in recording.training:
        assert timesteps.dtype == torch.int64
        assert sorted((timesteps * 8 // 1000).tolist()) == list(range(8))
    assert len({tuple(timesteps.tolist()) for _, timesteps, _ in recording.training}) == 6


@pytest.mark.runs
def test_timesteps_are_on_one_scale_in_training_and_sampling(recording: Recording) -> None:
    """A guidance workshop uses t / T in one place and t in another: here all use 0 .. T - 1, embedded in one way."""
    schedule = recording.config.diffusion
    trained = torch.cat([timesteps for _, timesteps, _ in recording.training])
    assert 0 <= trained.min() < 125 and 875 <= trained.max() < 1000
    # Three steps of two guided images, four rows a call, after steps 3 and 6. The first frequency is 1.
    previews = torch.stack([features[:, 0] for features in recording.sampling])
    expected = torch.tensor(2 * [999.0, 666.0, 332.0]).cos()[:, None].expand(6, 4)
    torch.testing.assert_close(previews, expected, atol=1e-4, rtol=0)

    unet, embedded = tiny_unet(), []
    hook = unet.time_embedding.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    latents, context = normal(1, 4, 8, 8), normal(1, 5, 16)
    for guidance in (Guidance(), Guidance(scale=3.0)):
        denoise = GuidedDenoiser(unet, schedule, context, -context, guidance)
        for t in (0, 1, 332, 999):
            embedded.clear()
            noise = torch.zeros_like(latents)
            with torch.no_grad():
                diffusion_loss(unet, schedule, latents, context, noise, torch.tensor([t]))
                denoise(latents, schedule.level(t))
            assert torch.equal(embedded[0].expand_as(embedded[1]), embedded[1])
            assert embedded[0][0, 0].item() == pytest.approx(math.cos(t), abs=1e-4)  # the first frequency is 1
            # And the noise level that goes with it is the same.
            alpha, sigma = schedule.alpha_sigma(torch.tensor([t]), latents)
            level = schedule.level(t)
            assert (alpha.item(), sigma.item()) == pytest.approx((level.alpha, level.sigma), rel=1e-6)
    hook.remove()


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("error", ["mse", "huber"])
@pytest.mark.parametrize("weighting", ["p2", "min_snr"])
def test_loss_is_weighted_before_it_is_averaged(error: str, weighting: str) -> None:
    """A Fashion-MNIST tutorial averages the errors, then weighs them: here each sample's error has its own weight."""
    schedule = NoiseSchedule(**DDPM, num_train_timesteps=200)
    objective = Objective(loss_type=error, weighting=weighting, p2_gamma=1.0, min_snr_gamma=5.0)
    latents, noise, timesteps = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1), torch.tensor([0, 20, 90, 199])
    output = torch.arange(4).view(4, 1, 1, 1) * normal(4, 1, 8, 8, seed=2)
    losses = diffusion_loss(lambda *_: output, schedule, latents, torch.empty(4, 0), noise, timesteps, objective)
    abar = variances(200)[1][timesteps]
    snr = abar / (1 - abar)
    weights = 1 / (1 + snr) if weighting == "p2" else np.minimum(snr, 5.0) / snr
    d = (output - noise).double().numpy()
    errors = (d**2 if error == "mse" else np.where(abs(d) < 1, d**2 / 2, abs(d) - 0.5)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses, weights * errors, rtol=1e-5)
    assert losses.mean().item() == pytest.approx((weights * errors).mean(), rel=1e-5)
    assert abs(losses.mean().item() / (weights.mean() * errors.mean()) - 1) > 0.1  # what the tutorial computes


# ----------------------------------------------------------------------------------------------------------------------
# The networks


def test_attention_is_divided_by_the_root_of_its_heads_width() -> None:
    """A DDPM tutorial divides by another dimension: here it is softmax(q k^T / sqrt(C / heads)) v, written out."""
    width, tokens, words = 12, 5, 7  # all different, so that no other divisor will do
    for heads in (1, 2, 3, 4):
        for upcast in (False, True):
            attention = perturb(Attention(width, heads=heads, context_width=10, upcast=upcast), scale=1.0)
            x, context = normal(2, tokens, width), normal(2, words, 10, seed=1)
            with torch.no_grad():
                q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
                parts = []
                for c in torch.arange(width).chunk(heads):
                    scores = torch.einsum("bnc,blc->bnl", q[..., c], k[..., c]) / math.sqrt(width / heads)
                    parts.append(torch.einsum("bnl,blc->bnc", scores.softmax(dim=2), v[..., c]))
                expected = attention.to_out[0](torch.cat(parts, dim=2))
                assert relative_error(attention(x, context), expected) <= 1e-5


def test_autoencoder_attention_takes_any_batch_and_builds_no_square_matrix() -> None:
    """A VAE tutorial builds the N x N matrix, for one image: here batches equal one by one, and none is built."""
    block = perturb(AttentionBlock(16, groups=4, eps=1e-6), scale=0.5)
    x = normal(3, 16, 24, 32)
    with torch.no_grad():
        with LargestOutput() as seen:
            together = block(x)
        for i in range(3):
            assert relative_error(together[i : i + 1], block(x[i : i + 1])) <= 1e-5
        tokens = block.group_norm(x).flatten(2).transpose(1, 2)
        scores = block.to_q(tokens) @ block.to_k(tokens).transpose(1, 2) / math.sqrt(16)
        h = block.to_out[0](scores.softmax(dim=2) @ block.to_v(tokens))
        assert relative_error(together, x + h.transpose(1, 2).unflatten(2, (24, 32))) <= 1e-5
    assert x.numel() <= seen.elements <= 3 * x.numel() < (24 * 32) ** 2


SYSTEMS = sorted((ROOT / "configs" / "systems").glob("*/unet.yaml"))


@pytest.mark.parametrize("path", SYSTEMS, ids=[path.parent.name for path in SYSTEMS])
def test_blocks_have_the_widths_of_the_config(path: Path) -> None:
    """A Fashion-MNIST tutorial garbles its blocks' constructor: every weight has the shape that diffusers gives it."""
    config = load_config(UNetTrainingConfig, path).model
    keys = json.loads(json.dumps(config.to_diffusers()).replace("LinearAttn", "CrossAttn"))  # ours, of the same weights
    with torch.device("meta"):
        ours = UNet(config)
        theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in keys.items() if not k.startswith("_")})
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    for block, width in zip(ours.down_blocks, config.block_out_channels, strict=True):
        assert [resnet.conv2.out_channels for resnet in block.resnets] == [width] * config.layers_per_block


# ----------------------------------------------------------------------------------------------------------------------
# Sizes other than the trained one


@pytest.mark.parametrize("size", [(8, 24), (24, 8)])
def test_the_networks_equal_diffusers_where_height_is_not_width(size: tuple[int, int]) -> None:
    """A DDPM tutorial's images deform at sizes other than the trained one: both networks against diffusers' there."""
    theirs = perturb(diffusers.UNet2DConditionModel(**UNET)).eval()
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config), "unet"))
    ours.load_state_dict(theirs.state_dict())
    x, t, context = normal(2, 4, *size), torch.tensor([0, 999]), normal(2, 5, 16, seed=1)
    with torch.no_grad():
        assert relative_error(ours(x, t, context), theirs(x, t, context).sample) <= 1e-5

    theirs = perturb(diffusers.AutoencoderKL(**VAE)).eval()
    ours = AutoencoderKL(AutoencoderKLConfig.from_diffusers(dict(theirs.config), "vae"))
    ours.load_state_dict(theirs.state_dict())
    pixels = normal(2, 3, *size)
    with torch.no_grad():
        assert relative_error(ours.encode(pixels), theirs.encode(pixels).latent_dist.parameters) <= 1e-5
        latents = normal(2, 4, *size)
        decoded = theirs.decode(latents / VAE["scaling_factor"]).sample
        assert relative_error(ours.decode(latents), decoded) <= 1e-5


PERIOD = 4  # pixels


@pytest.fixture(scope="module")
def stripes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet with attention in its lower level, trained in pixel space on grey, vertical stripes of 16 px."""
    folder = tmp_path_factory.mktemp("stripes")
    for phase in range(PERIOD):
        row = np.where((np.arange(16) + phase) % PERIOD < PERIOD / 2, 255, 0)
        write_image(folder / "images" / f"{phase}.png", np.tile(row, (16, 1)))
    return run_unet(
        folder / "run",
        "null",
        *(f"data.source={folder / 'images'}", "data.captions=none", "data.holdout=0", "data.repeat=4"),
        *("model.in_channels=1", "model.out_channels=1", "model.sample_size=16"),
        "text.config={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "max_position_embeddings: 4}",
        *("diffusion.num_train_timesteps=100", "diffusion.beta_schedule=cosine", "diffusion.prediction_type=sample"),
        *("train.caption_dropout=0", "validation.guidance_scale=1", "validation.prompts=['']"),
        *("train.steps=200", "optimizer.lr=3.0e-3", "optimizer.warmup_steps=10", "ema.decay=0.95", "logging.every=50"),
        *("validation.every=200", "validation.sample_every=200", "output.checkpoint_every=200"),
    )


@pytest.mark.runs
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 16)])
def test_a_trained_model_keeps_its_images_at_other_sizes(size: tuple[int, int], stripes_run: Path) -> None:
    """The same of a trained model: stripes stay vertical and keep their period, wide or high."""
    height, width = size
    pipeline = LatentDiffusionPipeline.from_pretrained(stripes_run)
    images = pipeline([""] * 8, height=height, width=width, num_inference_steps=20, seed=0, progress=False).images
    assert {image.size for image in images} == {(width, height)}
    values = np.stack([np.asarray(image) for image in images]) / 127.5 - 1

    def correlation(axis: int, lag: int) -> float:
        moved = np.moveaxis(values, axis, 0)
        return float((moved[lag:] * moved[:-lag]).mean() / (values**2).mean())

    assert (values**2).mean() > 0.7  # black and white
    assert min(correlation(1, lag) for lag in (1, 2, PERIOD)) > 0.7  # down the image nothing changes
    assert correlation(2, PERIOD // 2) < -0.7 and correlation(2, PERIOD) > 0.7  # across, the trained period


# ----------------------------------------------------------------------------------------------------------------------
# Files: nothing of a config or of weights is run


@pytest.mark.runs
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_config_is_not_evaluated(stage: str, tmp_path: Path) -> None:
    """A DDPM tutorial calls eval() on a value of its YAML: here code is text, or an error, in files and overrides."""
    kind = VAETrainingConfig if stage == "vae" else UNetTrainingConfig
    path, touched = ROOT / f"configs/demo/{stage}.yaml", tmp_path / "touched"
    code = f'__import__("os").system("touch {touched}")'
    apply = f"!!python/object/apply:os.system ['touch {touched}']"
    assert load_config(kind, path, [f"output.folder='{code}'"]).output.folder == code
    assert load_config(kind, path, [f"output.folder={code}"]).output.folder == code
    with pytest.raises(ValueError, match="train.seed: Input should be a valid integer"):
        load_config(kind, path, [f"train.seed='{code}'"])
    with pytest.raises(ValueError, match="is not a YAML value"):
        load_config(kind, path, [f"train.seed={apply}"])
    text = path.read_text()
    for value, problem in [(f"'{code}'", "Input should be a valid integer"), (apply, "is not YAML")]:
        poisoned = tmp_path / "poisoned.yaml"
        poisoned.write_text(text.replace("train:", f"train:\n  seed: {value}", 1))
        with pytest.raises(ValueError, match=problem):
            load_config(kind, poisoned)
    with pytest.raises(ValueError, match="train.seed: Input should be a valid integer"):
        main, arguments = (train_vae.main, TINY_VAE) if stage == "vae" else (train_unet.main, TINY_UNET)
        main([*arguments, f"train.seed='{code}'"])
    assert not touched.exists()


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.runs
def test_weights_are_never_pickled(tmp_path: Path, vae_run: Path, unet_run: Path, recording: Recording) -> None:
    """Two tutorials pickle their weights: a run has none, by name and by content, and pickles are refused unread."""
    for run in (vae_run, unet_run, recording.run):
        files = [path for path in run.rglob("*") if path.is_file()]
        kinds = {".safetensors", ".json", ".jsonl", ".yaml", ".txt", ".png", ".html", ".md"}
        assert {path.suffix for path in files} <= kinds
        assert len({path.name for path in files if path.suffix == ".safetensors"}) >= 4  # weights, averages, optimiser
        for path in files:
            head = path.read_bytes()[:9]
            assert not head.startswith((b"\x80", b"PK", b"\x1f\x8b", b"\x93NUMPY")), path
            if path.suffix == ".safetensors":
                size = int.from_bytes(head[:8], "little")
                assert isinstance(json.loads(path.read_bytes()[8 : 8 + size]), dict)

    touched = tmp_path / "touched"
    for part, stem, old in [
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model", "pytorch_model.bin"),
    ]:
        folder = shutil.copytree(unet_run, tmp_path / part, ignore=shutil.ignore_patterns("checkpoints", "latents"))
        weights = folder / part / f"{stem}.safetensors"
        torch.save(load_file(weights), folder / part / old)
        weights.unlink()
        with pytest.raises(ValueError, match="safetensors"):
            LatentDiffusionPipeline.from_pretrained(folder)
        for name in (old, weights.name):
            (folder / part / name).write_bytes(pickle.dumps({"weight": _Trap(touched)}))
            with pytest.raises(ValueError, match="safetensors"):
                LatentDiffusionPipeline.from_pretrained(folder)
    assert not touched.exists()
    pickle.loads((tmp_path / "vae/vae/diffusion_pytorch_model.bin").read_bytes())
    assert touched.exists()  # the trap works


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.fixture
def flat_images(tmp_path: Path) -> Path:
    """A black, a grey and a white image."""
    for name, value in [("0_black", 0), ("1_grey", 51), ("2_white", 255)]:
        write_image(tmp_path / "flat" / f"{name}.png", np.full((8, 8), value))
    return tmp_path / "flat"


def cache_of(folder: Path, images: CaptionedImages, vae: Autoencoder) -> LatentCache:
    return LatentCache.open(folder, "train", images, vae, tokenizer(), None, 2, Accelerator(cpu=True), False, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_between_minus_one_and_one(channels: int, flat_images: Path, tmp_path: Path) -> None:
    """A Fashion-MNIST tutorial has [0, 1] where its noise process assumes [-1, 1]: here black is -1, white 1."""
    images = images_of(DataConfig(holdout=0, source=str(flat_images), size=8, captions="none"), channels)
    pixels = images.first(3)
    expected = torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1, 1).expand(3, channels, 8, 8)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-7)
    vae = PixelSpace(channels)
    assert torch.equal(vae.sample(vae.encode(pixels)), pixels)
    cache = cache_of(tmp_path / "cache", images, vae)
    assert torch.equal(means(cache, vae), pixels)
    # In the noise process they keep these values, and sampling keeps to them.
    noisy = DDPM_SCHEDULE.add_noise(pixels, torch.zeros_like(pixels), torch.tensor([0, 500, 999]))
    roots = torch.from_numpy(np.sqrt(variances(1000)[1][[0, 500, 999]])).float().view(3, 1, 1, 1)
    assert relative_error(noisy, roots * expected) <= 1e-6
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    pipeline = LatentDiffusionPipeline(vae, unet, tiny_text_encoder(), tokenizer(), DDPM_SCHEDULE)
    for image, value in zip(pipeline.decode(pixels), (0, 51, 255), strict=True):
        assert set(np.asarray(image).flatten()) == {value}
    output = pipeline("", seed=0, num_inference_steps=4, guidance_scale=1.0, progress=False)
    assert -1 <= output.latents.min() < -0.5 and 0.5 < output.latents.max() <= 1


def test_no_decoded_image_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE tutorial writes float tensors into the dataset cache: here none; the latent cache has 8-bit values."""
    size, count = 64, 6
    generator = np.random.default_rng(0)
    for i in range(count):
        write_image(tmp_path / "images" / f"{i}.png", generator.integers(0, 256, (size, size, 3)))
    datasets_cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)
    images = images_of(DataConfig(holdout=0, source=str(tmp_path / "images"), size=size, captions="none"), 3)
    pixels = images.first(count)
    for _ in images.batches(4):
        pass
    cache = cache_of(tmp_path / "latents", images, PixelSpace(3))

    values = 3 * size * size
    # The index of a folder: names, sizes, digests.
    assert sum(path.stat().st_size for path in datasets_cache.rglob("*") if path.is_file()) < values
    shards = [path.stat().st_size for path in cache.latents[0].folder.glob("*.safetensors")]
    assert count * values <= sum(shards) <= count * values + 1024
    assert torch.equal(means(cache, PixelSpace(3)), pixels)
    moments = cache_of(tmp_path / "latents", images, tiny_vae())
    shards = [path.stat().st_size for path in moments.latents[0].folder.glob("*.safetensors")]
    assert sum(shards) <= count * 8 * (size // 2) ** 2 * 4 + 1024  # mean and log-variance, float32


# ----------------------------------------------------------------------------------------------------------------------
# The autoencoder


@pytest.mark.runs
def test_stage_1_has_a_kl_term(tmp_path: Path) -> None:
    """A VAE tutorial has none: here the loss contains the KL of the formula, and a step on it makes the KL smaller."""
    run = run_vae(tmp_path / "run", "loss.kl_weight=100.0", "train.steps=1", "output.checkpoint_every=1")
    config = load_config(VAETrainingConfig, run / "config.yaml")
    vae = initial_autoencoder(config)
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    batches = StepBatches(len(images), BatchPlan(8, 8, 1), 0, config.train.seed, 0, 1)
    pixels = torch.stack([images.pixels(i) for i in batches.global_batch(0)])

    mean, log_variance = vae.encode(pixels).chunk(2, dim=1)
    kl = kl_divergence(Normal(mean, torch.exp(log_variance / 2)), Normal(0.0, 1.0)).sum() / pixels.numel()
    assert metrics(run, "kl")[1] == pytest.approx(kl.item(), rel=1e-5)
    expected = metrics(run, "reconstruction")[1] + 100 * kl.item()
    assert metrics(run, "loss")[1] == pytest.approx(expected, rel=1e-5)

    kl.backward()  # with this weight the reconstruction does not count
    trained = load_file(run / "checkpoints" / "step_00000001" / "model.safetensors")
    moved = trained["quant_conv.bias"] - vae.quant_conv.bias.detach()
    assert torch.equal(moved.sign(), -vae.quant_conv.bias.grad.sign()) and (moved != 0).all()


def test_forward_samples_the_posterior() -> None:
    """A VAE tutorial hands the decoder all eight channels of the moments: here it gets four, mean + std * noise."""
    vae = tiny_vae()
    pixels, noise = normal(2, 3, 16, 16), normal(2, 4, 8, 8, seed=1)
    decoded = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0]))
    with torch.no_grad():
        reconstruction, moments = vae(pixels, noise)
        of_mean, _ = vae(pixels)
    hook.remove()
    mean, log_variance = moments[:, :4], moments[:, 4:]
    assert [tuple(z.shape) for z in decoded] == [(2, 4, 8, 8)] * 2
    weight, bias = vae.post_quant_conv.weight[:, :, 0, 0], vae.post_quant_conv.bias
    for z, latents in zip(decoded, [mean + torch.exp(log_variance / 2) * noise, mean], strict=True):
        assert relative_error(z, torch.einsum("oc,bchw->bohw", weight, latents) + bias[:, None, None]) <= 1e-5
    assert relative_error(reconstruction, of_mean) > 0.01
    assert vae.decoder.conv_in.in_channels == 4 and vae.encoder.conv_out.out_channels == 8


@pytest.mark.runs
def test_the_latent_scale_is_measured(vae_run: Path) -> None:
    """A VAE tutorial and its sequel take another model's 0.18215: here training makes it right for its own images."""
    config = load_config(VAETrainingConfig, vae_run / "config.yaml")
    vae = AutoencoderKL.from_pretrained(vae_run)
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    with torch.no_grad():
        posterior = Posterior(vae.encode(images.first(len(images))).double())
    mean = vae.config.scaling_factor * posterior.mean
    variance = vae.config.scaling_factor**2 * posterior.log_variance.exp()
    by_channel = (0, 2, 3)
    assert mean.mean(by_channel).abs().max() < 1e-4
    # The variance of a sample: that of the means and that around them.
    spread = mean.var(by_channel, unbiased=False) + variance.mean(by_channel)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-3, atol=0)
    # The convolutions make it right: before, their scale was another.
    raw = load_file(vae_run / "checkpoints" / "step_00000006" / "ema.safetensors")["quant_conv.weight"]
    assert relative_error(vae.quant_conv.weight.detach(), raw) > 0.1
    assert vae.config.scaling_factor == 0.18215


# ----------------------------------------------------------------------------------------------------------------------
# Captions and guidance


def test_whole_captions_are_dropped() -> None:
    """A guidance workshop masks single elements of its one-hot classes: here a sample keeps all of its row or none."""
    count, fraction = 4000, 0.3
    draws = torch.rand(count, generator=generators(0)[0])
    for shape in [(7,), (7, 5)]:
        kept, empty = torch.ones(count, *shape), torch.zeros(*shape)
        result = drop_captions(kept, empty, fraction, draws).flatten(1)
        assert (result == result[:, :1]).all()
        assert torch.equal(result[:, 0] == 0, draws < fraction)
        assert result[:, 0].mean().item() == pytest.approx(1 - fraction, abs=4 * math.sqrt(0.3 * 0.7 / count))


@pytest.mark.runs
def test_captions_are_dropped_in_training(recording: Recording) -> None:
    """A text-to-image tutorial never trains the unconditional prompt: here each step drops a fraction of them."""
    config = recording.config
    total, seed = config.train.steps, config.train.seed
    fractions = np.linspace(1.0, 0.1, total)
    empty = tokenizer()([""])[0]
    length = empty.shape[0]
    images, _ = open_images(config.data, 3, seed, progress=False)
    assert "" not in images.captions
    batches = StepBatches(len(images), BatchPlan(8, 8, 1), 0, seed, 0, total)
    dropped_at = []
    for step, (_, _, input_ids) in enumerate(recording.training):
        own = tokenizer()([images.captions[i] for i in batches.global_batch(step)])
        draws = uniform(seed, Stream.CAPTION_DROPOUT, step, recording.sample_indices)
        dropped = (input_ids == empty).all(dim=1)
        assert torch.equal(input_ids[~dropped], own[~dropped]) and input_ids.shape == (8, length)
        assert torch.equal(dropped, draws < fractions[step])
        dropped_at.append(int(dropped.sum()))
    assert dropped_at[0] == 8 and dropped_at[-1] < 8  # all at 1.0, few at 0.1
    # The numbers are uniform in [0, 1): over 200 steps a fraction of 0.1, the demo's, is dropped.
    draws = torch.cat([uniform(seed, Stream.CAPTION_DROPOUT, step, range(32)) for step in range(200)])
    assert (draws < 0.1).float().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 6400))


@pytest.mark.runs
def test_guidance_without_a_trained_unconditional_prompt_is_refused(tmp_path: Path) -> None:
    """The same as an error: guided previews of a run that never drops a caption are refused before it starts."""
    path = ROOT / "configs/demo/unet.yaml"
    for dropout in ("0", "0.0", "[0, 0]"):
        overrides = [f"train.caption_dropout={dropout}", "validation.guidance_scale=7.5"]
        with pytest.raises(
            ValueError, match="guidance_scale is 7.5, which needs the unconditional prompt, but it is never"
        ):
            load_config(UNetTrainingConfig, path, overrides)
        with pytest.raises(
            ValueError, match="guidance_scale is 7.5, which needs the unconditional prompt, but it is never"
        ):
            train_unet.main([*TINY_UNET, "vae=null", f"output.folder={tmp_path / 'run'}", *overrides])
        assert not (tmp_path / "run").exists()
        overrides[1] = "validation.guidance_scale=1.0"
        load_config(UNetTrainingConfig, path, overrides)


def test_dropout_falls_on_a_line_over_the_run() -> None:
    """A guidance workshop lowers the fraction from 1.0 to 0.1 by epoch: here by step, linearly, both ends included."""
    fractions = [caption_dropout_at(step, 31, (1.0, 0.1)) for step in range(31)]
    assert (fractions[0], fractions[10], fractions[30]) == pytest.approx((1.0, 0.7, 0.1), rel=1e-12)
    assert [a - b for a, b in pairwise(fractions)] == pytest.approx([0.03] * 30, rel=1e-9)
    assert caption_dropout_at(17, 31, 0.1) == 0.1
    config = load_config(UNetTrainingConfig, ROOT / "configs/demo/unet.yaml", ["train.caption_dropout=[1.0, 0.1]"])
    assert config.train.caption_dropout == (1.0, 0.1)


def test_guidance_mixes_both_predictions() -> None:
    """A guidance workshop's e = w e_cond + (1 - w) e_uncond: so does a guided step, from two separate calls by hand."""
    schedule, unet = NoiseSchedule(prediction_type="epsilon"), tiny_unet()
    x, level = normal(2, 4, 8, 8), schedule.level(600)
    context, negative = normal(2, 5, 16, seed=1), normal(2, 5, 16, seed=2)
    t = torch.tensor([600, 600])
    with torch.no_grad():
        conditional, unconditional = unet(x, t, context), unet(x, t, negative)
        assert relative_error(conditional, unconditional) > 0.01
        for w in (0.0, 0.5, 1.0, 2.0, 7.5):
            epsilon = w * conditional + (1 - w) * unconditional
            assert relative_error(Guidance(w).apply(conditional, unconditional), epsilon) <= 1e-5
            x0 = (x - level.sigma * epsilon) / level.alpha
            guided = GuidedDenoiser(unet, schedule, context, negative, Guidance(w))(x, level)
            assert relative_error(guided, x0) <= 1e-4
