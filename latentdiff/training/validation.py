"""What is measured during training, on pictures, noise and timesteps that never change."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from latentdiff.data import CaptionedPictures, to_images
from latentdiff.diffusion import NoiseSchedule
from latentdiff.evaluate import psnr, reconstruct, ssim
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.training.logging import picture_grid
from latentdiff.training.randomness import Purpose, normal

# The validation noise is the same in every run, whatever its seed, so that losses compare between runs.
VALIDATION_SEED = 0


@torch.no_grad()
def validate_vae(vae: AutoencoderKL, held_out: CaptionedPictures, batch_size: int) -> dict[str, float]:
    """Means over the held-out pictures: MSE, PSNR (dB), SSIM, and the KL in nats a picture; from posterior means,
    in the weights' own precision (bf16 would blur the flat parts that SSIM looks at)."""
    scores = []
    for _, pixels in held_out.batches(batch_size):
        pixels = pixels.to(vae.device)
        moments = vae.encode(pixels)
        reconstruction = vae.decode(vae.sample(moments))
        mse = (reconstruction - pixels).square().mean(dim=(1, 2, 3))
        kl = Posterior(moments).kl()
        scores.append(torch.stack([mse, psnr(pixels, reconstruction), ssim(pixels, reconstruction), kl]).cpu())
    mse, psnr_mean, ssim_mean, kl = torch.cat(scores, dim=1).double().mean(dim=1).tolist()
    return {"mse": mse, "psnr": psnr_mean, "ssim": ssim_mean, "kl": kl}


@torch.no_grad()
def reconstruction_grid(vae: AutoencoderKL, pixels: Tensor) -> Image.Image:
    """Originals [B, C, H, W] over their reconstructions."""
    reconstruction = reconstruct(vae, pixels.to(vae.device))
    return picture_grid([*to_images(pixels), *to_images(reconstruction)], columns=len(pixels))


@torch.no_grad()
def validation_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    latents: Tensor,
    condition: Callable[[Sequence[int]], Tensor],
    batch_size: int,
) -> float:
    """The loss on held-out latents [N, C, h, w], each at four fixed timesteps that spread evenly over the schedule.

    condition(indices) gives the condition of those pictures.
    """
    draws, num = 4, len(latents)
    losses = []
    for draw in range(draws):
        for first in range(0, num, batch_size):
            indices = list(range(first, min(first + batch_size, num)))
            noise = normal(latents.shape[1:], VALIDATION_SEED, Purpose.NOISE, draw, indices)
            # Evenly spread over the N * 4 evaluations, so that the mean is over all noise levels.
            places = torch.tensor([(i * draws + draw + 0.5) / (num * draws) for i in indices])
            timesteps = (places * schedule.num_train_timesteps).long().to(latents.device)
            batch = latents[indices]
            losses.append(schedule.loss(model, batch, condition(indices), noise.to(batch), timesteps).cpu())
    return torch.cat(losses).double().mean().item()
