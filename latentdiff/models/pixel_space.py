"""Pixel space: what stands in the autoencoder's place where the UNet works on the images themselves."""

import torch
from torch import Tensor, nn

from latentdiff.config import Section
from latentdiff.images import from_bytes, to_bytes
from latentdiff.models.autoencoder import AutoencoderKL


class PixelSpaceConfig(Section):
    """The keys of an autoencoder's config that others ask for: `channels` of them all, and nothing is compressed."""

    channels: int

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.channels

    @property
    def out_channels(self) -> int:
        """Channels of an image."""
        return self.channels

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, which are the image."""
        return self.channels

    @property
    def downsampling(self) -> int:
        """Pixels a latent pixel, on a side."""
        return 1


class PixelSpace(nn.Module):
    """The autoencoder that does nothing: latents are the pixels [B, C, H, W] in [-1, 1], C from 1 to 4.

    It has no weights and no folder. Its `moments` are the 8-bit values of the images, so that a cache of them is no
    larger than the images, and what comes out of it is bit for bit what went in.
    """

    bounded = True  # clean latents lie in [-1, 1]
    dtype = torch.float32
    moments_dtype = torch.uint8

    def __init__(self, channels: int) -> None:
        """ValueError for other numbers of channels."""
        super().__init__()
        if not 1 <= channels <= 4:
            raise ValueError(f"pixel space has {channels} channels, must have the 1 to 4 of an image")
        self.config = PixelSpaceConfig(channels=channels)
        # Goes where the module goes, so that `device` is known; not of a floating type, so that no cast changes it.
        self.register_buffer("_place", torch.empty(0, dtype=torch.uint8), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        return self._place.device

    @property
    def moments_channels(self) -> int:
        """Channels of what `encode` returns."""
        return self.config.channels

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, C, H, W] of 8-bit images, in [-1, 1] -> their values 0 .. 255, uint8.

        Raises ValueError if the channels are not the pipeline's.
        """
        if pixels.shape[1] != self.config.channels:
            raise ValueError(f"pixels have {pixels.shape[1]} channels, but this pixel space has {self.config.channels}")
        return to_bytes(pixels)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, H, W] in [-1, 1], float32. An image has no posterior: the noise makes no difference."""
        return from_bytes(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents are the pixels."""
        return latents


Autoencoder = AutoencoderKL | PixelSpace
