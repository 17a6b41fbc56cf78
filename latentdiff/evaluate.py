"""How good a reconstruction and a text-to-image model are: PSNR, SSIM, and whether pictures match their prompts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.data import CaptionedPictures, to_images, to_pixels
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.pipeline import LatentDiffusionPipeline


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [B]; both [B, C, H, W] in [-1, 1], clamped: the peak is 2."""
    error = (pixels.clamp(-1, 1) - reconstruction.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4.0 / error)


def ssim(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each picture, [B] (Wang et al. 2004); both [B, C, H, W] in [-1, 1], clamped."""
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(
        reconstruction.clamp(-1, 1), pixels.clamp(-1, 1), data_range=(-1.0, 1.0), reduction="none"
    )


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, C, H, W] -> their reconstruction from the posterior mean, not clamped."""
    return vae.decode(vae.sample(vae.encode(pixels)))


@dataclass(frozen=True)
class Reconstruction:
    """Means over the pictures of a split."""

    psnr: float  # dB
    ssim: float
    colour_error: float  # mean absolute difference of a picture's mean R, G and B, in 0..255


@torch.no_grad()
def reconstruction_quality(vae: AutoencoderKL, pictures: CaptionedPictures, batch_size: int) -> Reconstruction:
    """How well the autoencoder gives pictures back from the posterior mean, as means over pictures."""
    scores = []
    for _, pixels in pictures.batches(batch_size):
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


def nearest_pictures(generated: Tensor, reference: Tensor) -> Tensor:
    """For each generated picture the index of the nearest reference one by pixel MSE: [N, ...], [M, ...] -> [N]."""
    return torch.cdist(generated.flatten(1), reference.flatten(1)).argmin(dim=1)


@dataclass(frozen=True)
class PromptFidelity:
    """Training pictures beside what the pipeline draws for their captions."""

    prompts: list[str]  # the captions of these pictures, which were drawn
    nearest: list[str]  # the caption of the training picture nearest to each drawn one
    originals: list[Image.Image]  # without captions, the training pictures nearest to the drawn ones
    generated: list[Image.Image]

    @property
    def hits(self) -> int:
        """For how many the nearest training picture is one with the prompt as its caption."""
        return sum(prompt == nearest for prompt, nearest in zip(self.prompts, self.nearest, strict=True))

    @property
    def psnr(self) -> float:
        """Mean PSNR of the drawn pictures against those beside them, dB; each counts as 100 at most."""
        drawn, beside = (
            torch.stack([to_pixels(image) for image in images]) for images in (self.generated, self.originals)
        )
        return psnr(beside, drawn).clamp(max=100).mean().item()


def prompt_fidelity(
    pipeline: LatentDiffusionPipeline,
    pictures: CaptionedPictures,
    num_prompts: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> PromptFidelity:
    """Draw the captions of `num_prompts` training pictures, spread evenly over the set; find the nearest of them all.

    Drawn with the pipeline's own defaults; picture i has seed + i. Without captions any number can be drawn. Raises
    ValueError if there are fewer pictures.
    """
    captioned = pictures.config.caption_column is not None
    if num_prompts < 1 or (captioned and num_prompts > len(pictures)):
        raise ValueError(f"{num_prompts} prompts asked for, must be in 1 .. {len(pictures)}, the training pictures")
    indices = [i * len(pictures) // num_prompts for i in range(num_prompts)]
    captions = pictures.captions
    reference = torch.cat([pixels for _, pixels in pictures.batches(batch_size)])
    generated: list[Image.Image] = []
    for first in tqdm(range(0, num_prompts, batch_size), "draw", unit="batch", disable=not progress, leave=False):
        batch = [captions[i] for i in indices[first : first + batch_size]]
        size = pictures.config.size
        generated += pipeline(batch, height=size, width=size, seed=seed + first, progress=False).images
    drawn = torch.stack([to_pixels(image) for image in generated])
    nearest = nearest_pictures(drawn, reference).tolist()
    shown = indices if captioned else nearest
    return PromptFidelity(
        [captions[i] for i in indices], [captions[i] for i in nearest], to_images(reference[shown]), generated
    )
