"""Whether generated images match their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.shapes import Shape
from latentdiff.evaluation.metrics import nearest_images, psnr, stack_pixels
from latentdiff.images import to_images
from latentdiff.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class PromptFidelity:
    """Training images beside what the pipeline generates for their captions."""

    prompts: list[str]  # the captions of these images
    nearest: list[str]  # the caption of the training image nearest to each generated one
    originals: list[Image.Image]  # without captions, the training images nearest to the generated ones
    generated: list[Image.Image]

    @property
    def hits(self) -> int:
        """For how many the nearest training image has the prompt as its caption."""
        return sum(prompt == nearest for prompt, nearest in zip(self.prompts, self.nearest, strict=True))

    @property
    def psnr(self) -> float:
        """Mean PSNR of the generated images against those beside them, dB."""
        return psnr(stack_pixels(self.originals), stack_pixels(self.generated)).mean().item()


def prompt_fidelity(
    pipeline: LatentDiffusionPipeline,
    images: CaptionedImages,
    num_prompts: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> PromptFidelity:
    """Generate from the captions of `num_prompts` training images, spread evenly over the set; find the nearest images.

    With the pipeline's own defaults; image i has seed + i. Without captions any number can be generated. Images are
    compared in one shape, the training size.
    Raises ValueError if there are fewer images.
    """
    captioned = images.captioned
    if num_prompts < 1 or (captioned and num_prompts > len(images)):
        raise ValueError(f"{num_prompts} prompts asked for, must be in 1 .. {len(images)}, the number of images")
    images = images.in_one_shape()
    indices = [i * len(images) // num_prompts for i in range(num_prompts)]
    captions = images.captions
    reference = torch.cat([pixels for _, pixels in images.batches(batch_size)])
    prompts = [captions[i] for i in indices]
    generated = generate(pipeline, prompts, images.config.shape, seed, batch_size, progress)
    nearest = nearest_images(stack_pixels(generated), reference).tolist()
    shown = indices if captioned else nearest
    return PromptFidelity(prompts, [captions[i] for i in nearest], to_images(reference[shown]), generated)


def generate(
    pipeline: LatentDiffusionPipeline,
    prompts: Sequence[str],
    shape: Shape,
    seed: int,
    batch_size: int,
    progress: bool,
    **options: Any,
) -> list[Image.Image]:
    """An image for each prompt, which is read as a caption is in training.

    shape: height and width, pixels. Image i has seed + i. options: of the pipeline's call.
    """
    height, width = shape
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(prompts), batch_size), "generate", unit="batch", disable=not progress, leave=False):
        batch = list(prompts[first : first + batch_size])
        context = pipeline.encode_captions(batch)
        images += pipeline(
            prompt_embeds=context, height=height, width=width, seed=seed + first, progress=False, **options
        ).images
    return images
