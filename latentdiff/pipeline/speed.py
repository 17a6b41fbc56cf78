"""How the networks of a pipeline compute: the fastest way on a device that costs no quality (docs/LOG.md)."""

import torch
from torch import Tensor

from latentdiff.devices import computes_in_bf16
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.models.tiling import decode_in_parts
from latentdiff.models.unet import UNet

AUTO = "auto"  # in place of a type: weights in float32, and what is below
# Channels of the narrowest level of Stable Diffusion's networks
DECODER_WIDTH = 128
UNET_WIDTH = 320


def decode(vae: Autoencoder, latents: Tensor, batch_size: int | None, tile: int | None, *, exact: bool) -> Tensor:
    """Unit-scale latents [B, C, h, w] -> pixels [B, C_out, f * h, f * w], in the type of the weights.

    exact: compute all of it in that type. The convolutions' layout is chosen by the device; it changes rounding only.
    batch_size, tile: see `decode_in_parts`.
    """
    if isinstance(vae, AutoencoderKL):
        # The decoder alone: an encoder in another layout would give other latents, to rounding, than those in a cache.
        vae.decoder.to(memory_format=decoder_layout(vae.device, vae.dtype))
    bf16_products = not exact and bf16_suffices(vae)
    with torch.autocast(latents.device.type, enabled=False):
        latents = latents.to(vae.device, vae.dtype)
        return decode_in_parts(vae, latents, batch_size=batch_size, tile=tile, bf16_products=bf16_products)


def decoder_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """channels_last on CPUs, and on GPUs in 16 bits."""
    faster = device.type == "cpu" or (device.type == "cuda" and dtype.itemsize == 2)
    return torch.channels_last if faster else torch.contiguous_format


def lay_out(unet: UNet) -> None:
    """Move a UNet of at least Stable Diffusion's widths whose weights have 16 bits, which no training has, to
    channels_last.

    In float32 it is not faster, and narrow ones are slower with it.
    """
    if unet.dtype.itemsize == 2 and min(unet.config.block_out_channels) >= UNET_WIDTH:
        unet.to(memory_format=torch.channels_last)


def bf16_suffices(vae: Autoencoder) -> bool:
    """Whether to decode with products in bfloat16: float32 weights, every level as wide as in Stable Diffusion's
    autoencoder, on a CPU that computes in bfloat16. Narrow ones are fast enough, and lose more by rounding.
    """
    if not isinstance(vae, AutoencoderKL) or vae.dtype != torch.float32 or vae.device.type != "cpu":
        return False
    return min(vae.config.block_out_channels) >= DECODER_WIDTH and computes_in_bf16(vae.device)
