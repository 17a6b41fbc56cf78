"""Reconstruction quality against formulas by hand, and the statistics of the latents."""

import math

import numpy as np
import pytest
import torch
from image_sets import noise_images
from tiny import tiny_vae

from latentdiff.evaluation.metrics import ssim
from latentdiff.evaluation.reconstruction import latent_statistics, reconstruction_quality


def test_reconstruction_quality():
    vae, images = tiny_vae(), noise_images(5)
    quality = reconstruction_quality(vae, images, batch_size=2)  # batches of 2, 2 and 1
    errors, scores, similarities = [], [], []
    for i in range(5):
        pixels = images.pixels(i)
        with torch.no_grad():
            back = vae.decode(vae.sample(vae.encode(pixels[None])))[0].clamp(-1, 1)
        means = [(back[c].mean() - pixels[c].mean()).abs() * 255 / 2 for c in range(3)]
        errors.append(sum(means).item() / 3)
        scores.append(10 * math.log10(4 / (back - pixels).square().mean().item()))
        similarities.append(ssim(pixels[None], back[None]).item())
    assert quality.colour_error == pytest.approx(np.mean(errors), rel=1e-4)
    assert quality.psnr == pytest.approx(np.mean(scores), rel=1e-4)
    assert quality.ssim == pytest.approx(np.mean(similarities), abs=1e-4)
    assert quality.colour_error > 1 and np.std(scores) > 1e-3  # no empty comparison


# --- statistics of the latents ---


def test_latent_statistics_are_those_of_posterior_samples(accelerator):
    vae, images = tiny_vae(scaling_factor=1.0), noise_images(7)
    mean, std = latent_statistics(vae, images.batches(3), accelerator)  # batches of 3, 3 and 1
    assert mean.shape == std.shape == (4,) and mean.dtype == std.dtype == torch.float64
    # However the images are cut into batches.
    for batch_size in (1, 7):
        again = latent_statistics(vae, images.batches(batch_size), accelerator)
        torch.testing.assert_close(torch.stack(again), torch.stack([mean, std]), atol=1e-5, rtol=1e-5)
    # By hand from the moments: the law of total variance.
    with torch.no_grad():
        moments = torch.cat([vae.encode(pixels) for _, pixels in images.batches(7)]).double()
    means, variances = moments[:, :4], moments[:, 4:].exp()
    torch.testing.assert_close(mean, means.mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    total = means.var((0, 2, 3), correction=0) + variances.mean((0, 2, 3))
    torch.testing.assert_close(std, total.sqrt(), atol=1e-6, rtol=1e-6)
    # And from draws themselves: 7 * 64 * 400 a channel.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.cat(
            [vae.sample(moments.float(), torch.randn(means.shape, generator=generator)) for _ in range(400)]
        ).double()
    torch.testing.assert_close(mean, draws.mean((0, 2, 3)), atol=0.01, rtol=0)
    torch.testing.assert_close(std, draws.std((0, 2, 3)), atol=0, rtol=0.01)


def test_latents_are_of_unit_scale_once_the_statistics_are_set(accelerator):
    vae, images = tiny_vae(scaling_factor=1.0), noise_images(7)
    before = latent_statistics(vae, images.batches(4), accelerator)
    assert (before[1] - 1).abs().max() > 0.05 and before[0].abs().max() > 0.05
    vae.set_latent_statistics(*before)
    mean, std = latent_statistics(vae, images.batches(4), accelerator)
    # The statistics are those before the scaling.
    torch.testing.assert_close(mean * 0.18215, torch.zeros(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(std * 0.18215, torch.ones(4).double(), atol=1e-5, rtol=0)
