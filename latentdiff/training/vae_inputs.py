"""The inputs of a stage 1 step: pixels (or random crops of them) and posterior noise, each a function of the seed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.config import VAETrainingConfig
from latentdiff.data.batches import Batch
from latentdiff.data.shapes import Shape
from latentdiff.devices import to_device
from latentdiff.randomness import Stream, generator, normal


class Inputs(NamedTuple):
    """Arguments of the autoencoder for one micro-batch, on the device."""

    pixels: Tensor  # [b, C, H, W] in [-1, 1]
    noise: Tensor  # [b, C, h, w], of the posterior sample


class VAEInputs:
    """Maps a micro-batch of images to the inputs of the autoencoder."""

    def __init__(self, config: VAETrainingConfig, device: torch.device) -> None:
        train = config.train
        self.seed, self.crop_size, self.device = train.seed, train.crop_size, device
        self.crop_steps = 0 if train.crop_size is None else train.steps - train.whole_image_steps
        self.channels, self.latent_channels = config.model.in_channels, config.model.latent_channels
        self.downsampling = config.model.downsampling
        self.only_crops = train.crop_size is not None and not train.whole_image_steps

    def __call__(self, batch: Batch) -> Inputs:
        assert "pixels" in batch
        pixels = to_device(batch["pixels"], self.device)
        step, samples = batch["step"], batch["sample_indices"]
        if self.crop_size is not None and step < self.crop_steps:
            pixels = random_crops(pixels, self.crop_size, self.seed, step, samples)
        noise = normal(self._latent_shape(pixels.shape[-2:]), self.seed, Stream.POSTERIOR, step, samples)
        return Inputs(pixels, to_device(noise, self.device))

    def blank(self, count: int, shape: Shape) -> Inputs:
        """Zeros in the shapes of the largest micro-batch of `count` images, to find out how many fit into memory.

        shape: height and width of the images, pixels.
        """
        if self.only_crops:
            assert self.crop_size is not None
            shape = self.crop_size, self.crop_size
        pixels = torch.zeros(count, self.channels, *shape, device=self.device)
        return Inputs(pixels, torch.zeros(count, *self._latent_shape(shape), device=self.device))

    def _latent_shape(self, sides: Sequence[int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of images of these sides."""
        height, width = (side // self.downsampling for side in sides)
        return self.latent_channels, height, width


def random_crops(pixels: Tensor, size: int, seed: int, step: int, sample_indices: Sequence[int]) -> Tensor:
    """A square [B, C, size, size] of each image [B, C, H, W], at a position given by (seed, step, sample index)."""
    room = torch.tensor([pixels.shape[2] - size, pixels.shape[3] - size])
    crops = []
    for image, index in zip(pixels, sample_indices, strict=True):
        position = torch.rand(2, generator=generator(seed, Stream.TRAINING_CROP, step, index))
        top, left = (position * (room + 1)).long().tolist()
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)
