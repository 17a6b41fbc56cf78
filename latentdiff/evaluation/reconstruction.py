"""Reconstructions over a set of images: their quality, and the statistics of the latents."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.distributed import chunks, shared_indices
from latentdiff.evaluation.metrics import psnr, ssim
from latentdiff.images import to_images
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.pixel_space import Autoencoder


@dataclass(frozen=True)
class Reconstruction:
    """A batch of images and what the autoencoder makes of them, all on its device."""

    indices: list[int]  # of the images in their set
    pixels: Tensor  # [B, C, H, W] in [-1, 1]
    moments: Tensor  # [B, 2C, h, w]
    latents: Tensor  # [B, C, h, w], the posterior means at unit scale
    reconstruction: Tensor  # [B, C, H, W] of these latents, float32, not clamped


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, C, H, W] -> their reconstruction from the posterior mean, not clamped."""
    return vae.decode(vae.sample(vae.encode(pixels)))


@torch.no_grad()
def reconstructed_images(vae: Autoencoder, pixels: Tensor, batch_size: int) -> list[Image.Image]:
    """The reconstructions of pixels [N, C, H, W] from the posterior means, as images."""
    assert isinstance(vae, AutoencoderKL)
    batches = (reconstruct(vae, batch.to(vae.device)).float().cpu() for batch in pixels.split(batch_size))
    return [image for batch in batches for image in to_images(batch)]


@torch.no_grad()
def reconstructions(
    vae: AutoencoderKL, images: CaptionedImages, batch_size: int, accelerator: Accelerator | None = None
) -> Iterator[Reconstruction]:
    """The undistorted images, batch by batch, and their reconstructions from the posterior means.

    A batch has one shape, and the images of each shape come in order. With an accelerator only this process's
    `shared_indices` of each shape: gather the results with `gather_rows`.
    """
    for group in images.by_shape():
        for places in chunks(shared_indices(len(group), accelerator), batch_size):
            indices = [group[place] for place in places]
            pixels = torch.stack([images.pixels(i) for i in indices]).to(vae.device)
            moments = vae.encode(pixels)
            latents = vae.sample(moments)
            yield Reconstruction(indices, pixels, moments, latents, vae.decode(latents).float())


@dataclass(frozen=True)
class ReconstructionQuality:
    """Means over a set of images."""

    psnr: float  # dB
    ssim: float
    colour_error: float  # mean absolute difference of an image's mean R, G and B, in 0..255


@torch.no_grad()
def reconstruction_quality(vae: AutoencoderKL, images: CaptionedImages, batch_size: int) -> ReconstructionQuality:
    """How well the autoencoder reconstructs images from the posterior means, clamped to [-1, 1]."""
    scores = []
    for batch in reconstructions(vae, images, batch_size):
        pixels, reconstruction = batch.pixels, batch.reconstruction.clamp(-1, 1)
        colour = (reconstruction - pixels).mean(dim=(2, 3)).abs().mean(dim=1) * 127.5
        scores.append(torch.stack([psnr(pixels, reconstruction), ssim(pixels, reconstruction), colour]).cpu())
    return ReconstructionQuality(*torch.cat(scores, dim=1).double().mean(dim=1).tolist())


# ----------------------------------------------------------------------------------------------------------------------
# Latents


class LatentStatistics:
    """Statistics per channel of latents sampled from the posteriors of a set of images, computed without sampling.

    They are means over latent values, so an image counts by the size of its latents.
    A sample is z = mean + exp(log_variance / 2) * noise, so E[z] = E[mean] and E[z^2] = E[mean^2 + exp(log_variance)].
    """

    def __init__(self, channels: int) -> None:
        # Sums of the mean, of mean^2 + variance and of the log-variance, and the number of values: each [C].
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def add(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add the posteriors of a batch: [B, C, h, w] float64, on the CPU."""
        self.sums[0] += mean.sum(dim=(0, 2, 3))
        self.sums[1] += (mean.square() + log_variance.exp()).sum(dim=(0, 2, 3))
        self.sums[2] += log_variance.sum(dim=(0, 2, 3))
        self.sums[3] += mean[:, 0].numel()

    @property
    def mean(self) -> Tensor:
        """E[z], [C] float64 like all of these."""
        return self.sums[0] / self.sums[3]

    @property
    def square(self) -> Tensor:
        """E[z^2]."""
        return self.sums[1] / self.sums[3]

    @property
    def variance(self) -> Tensor:
        """The variance of z."""
        return self.square - self.mean.square()

    @property
    def log_variance(self) -> Tensor:
        """The mean log-variance of the posteriors."""
        return self.sums[2] / self.sums[3]

    @property
    def kl(self) -> Tensor:
        """KL divergence of the posterior from the unit Gaussian, in nats per latent value."""
        return (self.square - 1 - self.log_variance) / 2

    @property
    def information(self) -> Tensor:
        """KL divergence of the posterior from the Gaussian of mean E[z] and variance Var[z], in nats per latent value.

        An upper bound of the mutual information with the image. It is 0 if and only if all posteriors are the same,
        and does not depend on the scale of the latents.
        """
        return (self.variance.log() - self.log_variance) / 2


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[tuple[list[int], Tensor]], accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [C] float64, of the latents before any scaling.

    batches: (indices, pixels) of this process; the statistics are over the batches of all processes.
    """
    statistics = LatentStatistics(vae.config.latent_channels)
    for _, pixels in batches:
        posterior = Posterior(vae.encode(pixels.to(vae.device)).cpu().double())
        statistics.add(posterior.mean, posterior.log_variance)
    if accelerator.num_processes > 1:  # not otherwise: MPS has no float64, but never runs several processes
        total: Any = accelerator.reduce(statistics.sums.to(vae.device))
        statistics.sums = total.cpu()
    return statistics.mean, statistics.variance.sqrt()
