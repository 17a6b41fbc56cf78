"""Reconstructions over a set of images: their quality, and the statistics of the latents."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.metrics import psnr, ssim
from latentdiff.models.autoencoder import AutoencoderKL, Posterior


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, C, H, W] -> their reconstruction from the posterior mean, not clamped."""
    return vae.decode(vae.sample(vae.encode(pixels)))


@dataclass(frozen=True)
class Reconstruction:
    """Means over the images of a split."""

    psnr: float  # dB
    ssim: float
    colour_error: float  # mean absolute difference of an image's mean R, G and B, in 0..255


@torch.no_grad()
def reconstruction_quality(vae: AutoencoderKL, images: CaptionedImages, batch_size: int) -> Reconstruction:
    """How well the autoencoder gives images back from the posterior mean, as means over images."""
    scores = []
    for _, pixels in images.batches(batch_size):
        pixels = pixels.to(vae.device)
        reconstruction = reconstruct(vae, pixels).float().clamp(-1, 1)
        colour = (reconstruction - pixels).mean(dim=(2, 3)).abs().mean(dim=1) * 127.5
        scores.append(torch.stack([psnr(pixels, reconstruction), ssim(pixels, reconstruction), colour]).cpu())
    return Reconstruction(*torch.cat(scores, dim=1).double().mean(dim=1).tolist())


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[tuple[list[int], Tensor]], accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents per channel, [C] float64, over the batches of all processes.

    E[z] is the mean of the posterior means, E[z^2] that of mean^2 + variance: exact over posterior draws without one.
    """
    channels = vae.config.latent_channels
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64)  # of z, of z^2, and how many values
    for _, pixels in batches:
        posterior = Posterior(vae.encode(pixels.to(vae.device)).cpu().double())
        sums[:channels] += posterior.mean.sum(dim=(0, 2, 3))
        sums[channels:-1] += (posterior.mean.square() + posterior.log_variance.exp()).sum(dim=(0, 2, 3))
        sums[-1] += posterior.mean[:, 0].numel()
    if accelerator.num_processes > 1:  # some devices have no float64, but those come one at a time
        sums = accelerator.reduce(sums.to(vae.device)).cpu()
    mean = sums[:channels] / sums[-1]
    return mean, (sums[channels:-1] / sums[-1] - mean.square()).sqrt()
