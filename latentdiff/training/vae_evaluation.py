"""What is measured during the training of stage 1."""

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.distributed import gather_rows
from latentdiff.evaluation.metrics import psnr, ssim
from latentdiff.evaluation.reconstruction import reconstruct, reconstructions
from latentdiff.figures.grids import image_grid
from latentdiff.images import to_images
from latentdiff.models.autoencoder import AutoencoderKL


@torch.no_grad()
def validate_vae(
    vae: AutoencoderKL, held_out: CaptionedImages, batch_size: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Means over the held-out images: MSE, PSNR (dB), SSIM, and the KL in nats per image; the same on every process.

    The KL is that of unit-scale latents. Reconstructions are from the posterior means and not clamped for the MSE. Call
    it without autocast: SSIM in bf16 is too low in flat areas.
    """
    assert len(held_out) > 0
    tables = []
    for group in held_out.by_shape():
        rows = []
        for batch in reconstructions(vae, held_out.select(group), batch_size, accelerator):
            pixels, reconstruction = batch.pixels, batch.reconstruction
            mse = (reconstruction - pixels).square().mean(dim=(1, 2, 3))
            kl = vae.unit_posterior(batch.moments).kl()
            rows.append(torch.stack([mse, psnr(pixels, reconstruction), ssim(pixels, reconstruction), kl], dim=1))
        tables.append(gather_rows(torch.cat(rows), len(group), accelerator))
    table = torch.cat(tables)
    return dict(zip(("mse", "psnr", "ssim", "kl"), table.double().mean(dim=0).tolist(), strict=True))


@torch.no_grad()
def reconstruction_grid(vae: AutoencoderKL, pixels: Tensor) -> Image.Image:
    """Originals [B, C, H, W] above their reconstructions."""
    reconstruction = reconstruct(vae, pixels.to(vae.device))
    return image_grid([*to_images(pixels), *to_images(reconstruction)], columns=len(pixels))
