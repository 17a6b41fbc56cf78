"""The autoencoder's posterior, its latent scale, and files of old versions."""

import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from model_pairs import assert_same_weights
from safetensors.torch import load_file, save_file
from tiny import (
    normal,
    relative_error,
    tiny_vae,
)
from torch import Tensor

from latentdiff.config import STABLE_DIFFUSION_SCALING_FACTOR
from latentdiff.models.autoencoder import AutoencoderKL, Posterior


def test_attention_names_of_old_autoencoders_load(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        for new, old in old_names.items():
            key = key.replace(f".{new}.", f".{old}.")
        weights[key] = value
    assert sum(".proj_attn." in key or ".query." in key for key in weights) == 8  # weight and bias, up and down
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert_same_weights(loaded, vae)


def test_kl_is_that_of_torch_distributions() -> None:
    moments = normal(3, 8, 4, 6)
    mean, log_variance = moments[:, :4], moments[:, 4:]
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, p).sum(dim=(1, 2, 3))
    assert relative_error(Posterior(moments).kl(), expected) <= 1e-6
    assert torch.equal(Posterior(torch.zeros(2, 8, 4, 6)).kl(), torch.zeros(2))


def test_posterior_sample_has_its_standard_deviation() -> None:
    moments = torch.cat([torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), math.log(0.25))], dim=1)
    posterior = Posterior(moments)
    assert torch.allclose(posterior.sample(torch.ones(1, 1, 2, 2)), torch.tensor(3.5))  # std 0.5, variance 0.25
    assert torch.allclose(posterior.sample(-2 * torch.ones(1, 1, 2, 2)), torch.tensor(2.0))
    assert torch.equal(posterior.sample(torch.zeros(1, 1, 2, 2)), posterior.mean)
    samples = posterior.sample(normal(10_000, 1, 2, 2))
    assert samples.mean().item() == pytest.approx(3, abs=0.02) and samples.std().item() == pytest.approx(0.5, rel=0.02)


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([0.0, -1000.0, 0.0, 1000.0, 0.0, 7.0]).view(3, 2, 1, 1)
    posterior = Posterior(moments)
    assert posterior.log_variance.flatten().tolist() == [-30.0, 20.0, 7.0]
    assert posterior.sample(torch.ones(3, 1, 1, 1)).isfinite().all() and posterior.kl().isfinite().all()


def latents_of(vae: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents sampled from the posterior, [C, all other dimensions]."""
    return vae.sample(vae.encode(pixels), noise).transpose(0, 1).flatten(1)


@torch.no_grad()
def test_latent_statistics_are_folded_in(tmp_path: Path) -> None:
    vae = tiny_vae(scaling_factor=1.0)
    pixels, noise = normal(16, 3, 16, 16), normal(16, 4, 8, 8, seed=1)
    before = latents_of(vae, pixels, noise)
    posterior, reconstruction = Posterior(vae.encode(pixels)), vae(pixels, noise)[0]
    mean, std = before.mean(dim=1), before.std(dim=1)
    assert mean.abs().max() > 0.1 and (std / std[0] - 1).abs().max() > 0.1  # there is something to normalise

    vae.set_latent_statistics(mean, std)
    after = latents_of(vae, pixels, noise)
    assert after.mean(dim=1).abs().max() < 1e-5
    assert torch.allclose(after.std(dim=1), torch.ones(4), atol=1e-5)
    assert vae.config.scaling_factor == STABLE_DIFFUSION_SCALING_FACTOR == 0.18215

    # The same samples in other units: what is decoded does not change.
    changed_reconstruction = vae(pixels, noise)[0]
    assert (changed_reconstruction - reconstruction).abs().max() <= 1e-5
    changed = Posterior(vae.encode(pixels))
    expected = (posterior.mean - mean[:, None, None]) / std[:, None, None]
    deviation = (posterior.log_variance / 2).exp() / std[:, None, None]
    assert relative_error(after, (before - mean[:, None]) / std[:, None]) <= 1e-5
    assert relative_error(changed.mean * 0.18215, expected) <= 1e-5
    assert relative_error((changed.log_variance / 2).exp() * 0.18215, deviation) <= 1e-5
    unit = vae.unit_posterior(vae.encode(pixels))
    assert relative_error(unit.mean, expected) <= 1e-5
    assert relative_error((unit.log_variance / 2).exp(), deviation) <= 1e-5

    # The same in diffusers, which reads the factor, and in tools that have 0.18215 fixed.
    vae.save_pretrained(tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == 0.18215
    drawn = theirs.encode(pixels).latent_dist
    sampled = ((drawn.mean + drawn.std * noise) * 0.18215).transpose(0, 1).flatten(1)
    assert sampled.mean(dim=1).abs().max() < 1e-5
    assert torch.allclose(sampled.std(dim=1), torch.ones(4), atol=1e-5)
    latents = drawn.mode() * 0.18215
    assert relative_error(latents, vae.sample(vae.encode(pixels))) <= 1e-5
    assert relative_error(theirs.decode(latents / 0.18215).sample, vae(pixels)[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("absent", [("use_quant_conv", "use_post_quant_conv"), ("use_post_quant_conv",)])
def test_latent_statistics_without_quant_convs_are_one_factor(tmp_path: Path, absent: tuple[str, ...]) -> None:
    vae = tiny_vae(scaling_factor=1.0, **dict.fromkeys(absent, False))
    pixels, noise = normal(16, 3, 16, 16), normal(16, 4, 8, 8, seed=1)
    before, reconstruction = latents_of(vae, pixels, noise), vae(pixels, noise)[0]
    weights = {key: value.clone() for key, value in vae.state_dict().items()}

    vae.set_latent_statistics(before.mean(dim=1), before.std(dim=1))
    assert vae.config.scaling_factor == pytest.approx(1 / before.std().item(), rel=1e-3)
    assert latents_of(vae, pixels, noise).std().item() == pytest.approx(1, rel=1e-3)
    assert all(torch.equal(weights[key], value) for key, value in vae.state_dict().items())
    assert (vae(pixels, noise)[0] - reconstruction).abs().max() <= 1e-5

    vae.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["scaling_factor"] == vae.config.scaling_factor
    assert AutoencoderKL.from_pretrained(tmp_path).config == vae.config


def test_latent_statistics_of_scaled_latents_are_refused() -> None:
    with pytest.raises(AssertionError, match="already scaled"):
        tiny_vae(scaling_factor=0.5).set_latent_statistics(torch.zeros(4), torch.ones(4))
