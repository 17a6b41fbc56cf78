"""What a latent cache holds, read back whole."""

from collections.abc import Iterable

import torch
from torch import Tensor

from latentdiff.data.latent_cache import LatentCache
from latentdiff.models.pixel_space import Autoencoder


def means(cache: LatentCache, vae: Autoencoder) -> Tensor:
    """The posterior means of all (unflipped) images as unit-scale latents [N, C, h, w]."""
    (part,) = cache.latents  # of images of one shape
    shape, dtype = part.layout["moments"]
    moments = torch.empty(len(cache), *shape[1:], dtype=dtype)
    for index in range(len(cache)):
        moments[index] = cache.moments(index)[0]
    return vae.sample(moments)


def texts(cache: LatentCache, indices: Iterable[int]) -> dict[str, Tensor]:
    """`input_ids` [n, L] and, with a frozen text encoder, `context` [n, L, D] of several images."""
    items = [cache.text(index) for index in indices]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
