"""Metrics of images: PSNR, SSIM, the nearest image. (MS-SSIM, which is also a loss, is in models.perceptual.)"""

import torch
from torch import Tensor

MAX_PSNR = 100.0  # dB; without it one exact reconstruction would make the mean over a set infinite


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [B], at most 100.

    Both [B, C, H, W] in [-1, 1], clamped to it: the peak is 2.
    """
    error = (pixels.clamp(-1, 1) - reconstruction.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4.0 / error)).clamp(max=MAX_PSNR)


def ssim(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, [B] (Wang et al. 2004); both [B, C, H, W] in [-1, 1], clamped."""
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        reconstruction.clamp(-1, 1), pixels.clamp(-1, 1), data_range=(-1.0, 1.0), reduction="none"
    )
    assert isinstance(values, Tensor)
    return values


def nearest_images(generated: Tensor, reference: Tensor) -> Tensor:
    """For each generated image the index of the nearest reference image by pixel MSE: [N, ...], [M, ...] -> [N]."""
    return torch.cdist(generated.flatten(1), reference.flatten(1)).argmin(dim=1)
