"""The autoencoder on a few images, or a part of an image, at a time: less memory, for more computing.

Slicing (`batch_size`) changes nothing but rounding. Tiling (`tile`) is an approximation, as the autoencoder looks at
the whole image: its GroupNorm layers divide by statistics over all pixels, its middle attends from every pixel to
every other one, and its convolutions pad a tile's border with zeros. Each tile has its own of all three. The ramps
between tiles turn the differences into gradual ones; the larger the tiles, the smaller they are.
"""

from collections.abc import Callable
from functools import partial
from math import ceil

import torch
from torch import Tensor

from latentdiff.models.pixel_space import Autoencoder

SMALLEST_TILE = 8  # latent pixels; smaller tiles would consist mostly of the padding of the convolutions
OVERLAPS = (0.1, 0.5)


def decode_in_parts(
    vae: Autoencoder,
    latents: Tensor,
    *,
    batch_size: int | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
    bf16_products: bool = False,
) -> Tensor:
    """`vae.decode` with less memory: unit-scale latents [B, C, h, w] -> pixels [B, C_out, f * h, f * w].

    batch_size: images at once, at least 1; None: all.
    tile: side of the square tiles in latent pixels, at least 8; None, or no smaller than the image: no tiles.
    overlap: minimum fraction of a tile, 0.1 to 0.5, that is blended with its neighbour.
    bf16_products: see `AutoencoderKL.decode`; not in pixel space.
    The activations of one tile are in memory at a time if no gradients are recorded (`torch.no_grad`).
    Raises ValueError, naming the argument, for values outside these.
    """
    check_parts(batch_size, tile, overlap)
    f = vae.config.downsampling
    decode: Callable[[Tensor], Tensor] = vae.decode
    if bf16_products:
        assert not vae.is_pixel_space
        decode = partial(vae.decode, bf16_products=True)
    return _sliced(lambda z: _tiled(decode, z, 1, f, tile, overlap), latents, batch_size)


def encode_in_parts(
    vae: Autoencoder,
    pixels: Tensor,
    *,
    batch_size: int | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
) -> Tensor:
    """`vae.encode` with less memory: pixels [B, C_in, H, W] in [-1, 1] -> what it returns, H / f x W / f.

    The arguments are those of `decode_in_parts`; a tile's side is `tile` * f pixels.
    Raises ValueError as `decode_in_parts` and `vae.encode` do.
    """
    check_parts(batch_size, tile, overlap)
    f = vae.config.downsampling
    if any(side % f for side in pixels.shape[2:]):
        tile = None  # vae.encode says what is wrong with the whole image
    return _sliced(lambda x: _tiled(vae.encode, x, f, 1, tile, overlap), pixels, batch_size)


def check_parts(batch_size: int | None, tile: int | None, overlap: float = 0.25) -> None:
    """ValueError for a batch size below 1, a tile below 8 and an overlap outside 0.1 .. 0.5."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    if tile is not None and tile < SMALLEST_TILE:
        raise ValueError(f"tile is {tile}, must be at least {SMALLEST_TILE} latent pixels")
    if not OVERLAPS[0] <= overlap <= OVERLAPS[1]:
        raise ValueError(f"overlap is {overlap}, must be in {OVERLAPS[0]} .. {OVERLAPS[1]}, a fraction of a tile")


def _sliced(function: Callable[[Tensor], Tensor], batch: Tensor, batch_size: int | None) -> Tensor:
    if batch_size is None or batch_size >= len(batch):
        return function(batch)
    return torch.cat([function(part) for part in batch.split(batch_size)])


def _tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, per_in: int, per_out: int, tile: int | None, overlap: float
) -> Tensor:
    """The blended results of `function` on tiles of x [B, C, H, W].

    per_in, per_out: pixels of its input and of its output per latent pixel, along each side.
    """
    height, width = (side // per_in for side in x.shape[2:])
    if tile is None or tile >= max(height, width):
        return function(x)
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    row_weights = blending_weights(rows, min(tile, height), per_out).to(x.device)
    column_weights = blending_weights(columns, min(tile, width), per_out).to(x.device)
    blended: Tensor | None = None
    for top, down in zip(rows, row_weights, strict=True):
        for left, across in zip(columns, column_weights, strict=True):
            part = function(x[..., _span(top, tile, per_in), _span(left, tile, per_in)])
            if blended is None:  # float32, as a sum in bfloat16 would show the ramps
                blended = part.new_zeros(*part.shape[:2], height * per_out, width * per_out, dtype=torch.float32)
            place = (..., _span(top, tile, per_out), _span(left, tile, per_out))
            blended[place] += part * (down[place[1], None] * across[place[2]])
    assert blended is not None
    return (blended if part.is_floating_point() else blended.round()).to(part.dtype)


def _span(start: int, length: int, scale: int) -> slice:
    return slice(start * scale, (start + length) * scale)


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles start along a side of `length`, so that all are whole and overlap by at least `overlap` of a tile.

    As many as are needed, spread evenly; the last one ends where the side does.
    """
    if tile >= length:
        return [0]
    steps = ceil((length - tile) / (tile - ceil(tile * overlap)))
    return [i * (length - tile) // steps for i in range(steps + 1)]


def blending_weights(starts: list[int], tile: int, scale: int) -> Tensor:
    """How much each tile counts at each output pixel along a side: [tiles, L * scale] float32, summing to 1 over tiles.

    A tile is mixed into those before it by a linear ramp from 0 to 1 over its overlap with the last one of them, so
    weights are 0 outside a tile, and the first and the last tile have no ramp at the image's border.
    """
    pixels = torch.arange((starts[-1] + tile) * scale, dtype=torch.float64) + 0.5
    weights: list[Tensor] = []
    for i, start in enumerate(starts):
        if i == 0:
            ramp = torch.ones_like(pixels)
        else:
            shared = starts[i - 1] + tile - start
            ramp = ((pixels - start * scale) / (shared * scale)).clamp(0, 1)
        weights = [weight * (1 - ramp) for weight in weights] + [ramp]
    return torch.stack(weights).float()
