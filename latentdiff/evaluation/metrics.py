"""Metrics of images: PSNR, SSIM, MS-SSIM, nearest images."""

import torch
from torch import Tensor


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [B]; both [B, C, H, W] in [-1, 1], clamped: the peak is 2."""
    error = (pixels.clamp(-1, 1) - reconstruction.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4.0 / error)


def ssim(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, [B] (Wang et al. 2004); both [B, C, H, W] in [-1, 1], clamped."""
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(
        reconstruction.clamp(-1, 1), pixels.clamp(-1, 1), data_range=(-1.0, 1.0), reduction="none"
    )


def nearest_images(generated: Tensor, reference: Tensor) -> Tensor:
    """For each generated image the index of the nearest reference one by pixel MSE: [N, ...], [M, ...] -> [N]."""
    return torch.cdist(generated.flatten(1), reference.flatten(1)).argmin(dim=1)


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, from fine to coarse
MS_SSIM_WINDOW = 11  # pixels


def ms_ssim_scales(size: int) -> int:
    """As many scales, at most five, as torchmetrics takes for images of `size` pixels; 0 if not even one.

    n scales need size // (n - 1)^2 > 10, the window less one, and more than half a window on the coarsest scale.
    """
    fitting = [
        n
        for n in range(1, len(MS_SSIM_WEIGHTS) + 1)
        if size // max(1, n - 1) ** 2 >= MS_SSIM_WINDOW and size >> (n - 1) > MS_SSIM_WINDOW // 2
    ]
    return max(fitting, default=0)


def ms_ssim(pixels: Tensor, reconstruction: Tensor, scales: int) -> Tensor:
    """Multi-scale structural similarity of each image, [B] (Wang et al. 2003); both [B, C, H, W] in [-1, 1].

    With fewer than five scales the weights of the finest ones are used, enlarged so that they sum to one.
    """
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = MS_SSIM_WEIGHTS[:scales]
    return multiscale_structural_similarity_index_measure(
        reconstruction.clamp(-1, 1),
        pixels.clamp(-1, 1),
        data_range=(-1.0, 1.0),
        reduction="none",
        betas=tuple(weight / sum(weights) for weight in weights),
    )
