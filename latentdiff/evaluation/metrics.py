"""Metrics of images: PSNR, SSIM, the nearest image. (MS-SSIM, which is also a loss, is in models.perceptual.)"""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from latentdiff.images import to_pixels

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
    return nearest_in_batches(generated, [reference])


def nearest_in_batches(generated: Tensor, reference: Iterable[Tensor]) -> Tensor:
    """`nearest_images` of a reference that comes in batches; of equally near images the first."""
    images = generated.flatten(1)
    best = images.new_full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    first = 0
    for batch in reference:
        distance, place = torch.cdist(images, batch.flatten(1)).min(dim=1)
        index = torch.where(distance < best, first + place, index)
        best = torch.minimum(best, distance)
        first += len(batch)
    return index


def stack_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as one tensor: [N, C, H, W] in [-1, 1]."""
    return torch.stack([to_pixels(image) for image in images])
