"""Whether generated images match their prompts."""

from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.metrics import nearest_images, psnr
from latentdiff.images import to_images, to_pixels
from latentdiff.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class PromptFidelity:
    """Training images beside what the pipeline draws for their captions."""

    prompts: list[str]  # the captions of these images, which were drawn
    nearest: list[str]  # the caption of the training image nearest to each drawn one
    originals: list[Image.Image]  # without captions, the training images nearest to the drawn ones
    generated: list[Image.Image]

    @property
    def hits(self) -> int:
        """For how many the nearest training image is one with the prompt as its caption."""
        return sum(prompt == nearest for prompt, nearest in zip(self.prompts, self.nearest, strict=True))

    @property
    def psnr(self) -> float:
        """Mean PSNR of the drawn images against those beside them, dB; each counts as 100 at most."""
        drawn, beside = (
            torch.stack([to_pixels(image) for image in images]) for images in (self.generated, self.originals)
        )
        return psnr(beside, drawn).clamp(max=100).mean().item()


def prompt_fidelity(
    pipeline: LatentDiffusionPipeline,
    images: CaptionedImages,
    num_prompts: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> PromptFidelity:
    """Draw the captions of `num_prompts` training images, spread evenly over the set; find the nearest of them all.

    Drawn with the pipeline's own defaults; image i has seed + i. Without captions any number can be drawn. Raises
    ValueError if there are fewer images.
    """
    captioned = images.config.caption_column is not None
    if num_prompts < 1 or (captioned and num_prompts > len(images)):
        raise ValueError(f"{num_prompts} prompts asked for, must be in 1 .. {len(images)}, the training images")
    indices = [i * len(images) // num_prompts for i in range(num_prompts)]
    captions = images.captions
    reference = torch.cat([pixels for _, pixels in images.batches(batch_size)])
    generated: list[Image.Image] = []
    for first in tqdm(range(0, num_prompts, batch_size), "draw", unit="batch", disable=not progress, leave=False):
        batch = [captions[i] for i in indices[first : first + batch_size]]
        size = images.config.size
        generated += pipeline(batch, height=size, width=size, seed=seed + first, progress=False).images
    drawn = torch.stack([to_pixels(image) for image in generated])
    nearest = nearest_images(drawn, reference).tolist()
    shown = indices if captioned else nearest
    return PromptFidelity(
        [captions[i] for i in indices], [captions[i] for i in nearest], to_images(reference[shown]), generated
    )
