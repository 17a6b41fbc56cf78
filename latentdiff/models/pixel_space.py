"""Pixel space: stands in for the autoencoder if the UNet works on the images themselves."""

from typing import Literal

import torch
from torch import Tensor, nn

from latentdiff.config import Section
from latentdiff.images import from_bytes, to_bytes
from latentdiff.models.autoencoder import AutoencoderKL


class PixelSpaceConfig(Section):
    """The keys of an autoencoder's config that other code reads: the same `channels` everywhere, no downsampling."""

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
        """Channels of the latents, which are the images."""
        return self.channels

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, along a side."""
        return 1


class PixelSpace(nn.Module):
    """An autoencoder that does nothing: latents are the pixels [B, C, H, W] in [-1, 1], C from 1 to 4.

    It has no weights and no folder. Its `moments` are the images' 8-bit values, so that a cache of them is no larger
    than the images, and decoding returns every bit that was encoded.
    """

    is_pixel_space: Literal[True] = True
    dtype = torch.float32
    _device: Tensor
    moments_dtype = torch.uint8

    def __init__(self, channels: int) -> None:
        """Raises ValueError for other numbers of channels."""
        super().__init__()
        if not 1 <= channels <= 4:
            raise ValueError(f"pixel space has {channels} channels, must have the 1 to 4 of an image")
        self.config = PixelSpaceConfig(channels=channels)
        # Moves with the module, so that `device` is known; an integer, so that no cast to another dtype changes it.
        self.register_buffer("_device", torch.empty(0, dtype=torch.uint8), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device on which images are expected."""
        return self._device.device

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
        """Latents [B, C, H, W] in [-1, 1], float32. There is no posterior: `noise` is ignored."""
        return from_bytes(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents are the pixels."""
        return latents


Autoencoder = AutoencoderKL | PixelSpace
