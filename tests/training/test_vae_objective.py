"""The loss of stage 1."""

import pytest
import torch
from accelerate import Accelerator
from scripts import ROOT
from tiny import normal, tiny_vae
from torch.distributions import Normal, kl_divergence

from latentdiff.config import VAETrainingConfig, load_config
from latentdiff.training.vae_objective import VAEObjective


def test_the_kl_is_that_of_unit_scale_latents() -> None:
    """So fine-tuning an autoencoder goes on with the KL that it was trained with, whatever its scaling_factor."""
    config = load_config(VAETrainingConfig, ROOT / "configs" / "demo" / "vae.yaml", ["loss.kl_weight=0.5"])
    vae, pixels = tiny_vae(scaling_factor=0.3), normal(2, 3, 16, 16)
    with torch.no_grad():
        reconstruction, moments = vae(pixels)
        objective = VAEObjective(config, vae, Accelerator(cpu=True), smallest_side=64)
        terms = objective(pixels, reconstruction, moments, 0, 1.0)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = Normal(0.3 * mean, 0.3 * (log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum().item() / pixels.numel()
    assert terms["kl"].item() == pytest.approx(expected, rel=1e-5)
    error = terms["reconstruction"].item()
    assert error == pytest.approx((reconstruction - pixels).square().mean().item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(error + 0.5 * expected, rel=1e-5)
