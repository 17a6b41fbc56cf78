"""What is measured during the training of stage 1."""

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.distributed import chunks, gather_rows, shared_indices
from latentdiff.evaluation.metrics import psnr, ssim
from latentdiff.evaluation.reconstruction import reconstruct
from latentdiff.figures.grids import image_grid
from latentdiff.images import to_images
from latentdiff.models.autoencoder import AutoencoderKL, Posterior


@torch.no_grad()
def validate_vae(
    vae: AutoencoderKL, held_out: CaptionedImages, batch_size: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Means over the held-out images: MSE, PSNR (dB), SSIM, and the KL in nats an image; from posterior means,
    in the weights' own precision (bf16 would blur the flat parts that SSIM looks at)."""
    assert len(held_out) > 0
    scores = []
    for indices in chunks(shared_indices(len(held_out), accelerator), batch_size):
        pixels = torch.stack([held_out.pixels(i) for i in indices]).to(vae.device)
        moments = vae.encode(pixels)
        reconstruction = vae.decode(vae.sample(moments))
        mse = (reconstruction - pixels).square().mean(dim=(1, 2, 3))
        kl = Posterior(moments).kl()
        scores.append(torch.stack([mse, psnr(pixels, reconstruction), ssim(pixels, reconstruction), kl], dim=1))
    rows = gather_rows(torch.cat(scores), len(held_out), accelerator)
    return dict(zip(("mse", "psnr", "ssim", "kl"), rows.double().mean(dim=0).tolist(), strict=True))


@torch.no_grad()
def reconstruction_grid(vae: AutoencoderKL, pixels: Tensor) -> Image.Image:
    """Originals [B, C, H, W] over their reconstructions."""
    reconstruction = reconstruct(vae, pixels.to(vae.device))
    return image_grid([*to_images(pixels), *to_images(reconstruction)], columns=len(pixels))
