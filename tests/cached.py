"""What a latent cache holds, read back whole."""

from collections.abc import Iterable

import torch
from torch import Tensor

from latentdiff.data.batches import Key
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


def contexts(cache: LatentCache, indices: Iterable[int]) -> Tensor:
    """A frozen text encoder's context [n, L, D] of the captions of several images."""
    keys = [Key(index=index, epoch=0, step=0, sample_index=0) for index in indices]
    return torch.stack([cache[key]["context"] for key in keys])
