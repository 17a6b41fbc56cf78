"""Every random number of a training run as a function of (seed, stream, step, index in the global batch).

So a resumed run equals an uninterrupted one, and a run on 4 processes gets the numbers of a run on 1. They come from
CPU generators and do not depend on the device. The global random state is neither used nor changed.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """RNG streams, one for each use of random numbers. The values are part of what a seed means: never renumber."""

    INIT = 0
    ORDER = 1
    CROP_FLIP = 2
    POSTERIOR = 3
    TIMESTEPS = 4
    NOISE = 5
    CAPTION_DROPOUT = 6
    HOLDOUT = 7
    TEXT_INIT = 8
    TRAINING_CROP = 9
    DISCRIMINATOR_INIT = 10
    OFFSET_NOISE = 11
    COMPOSITIONS = 12
    CAPTION = 13
    BUCKETS = 14


def seed_for(*numbers: int) -> int:
    """A 63-bit seed from integers, the same on every machine (Python's own hash is not)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded from integers."""
    return torch.Generator().manual_seed(seed_for(*numbers))


def normal(shape: Sequence[int], seed: int, stream: Stream, step: int, sample_indices: Sequence[int]) -> Tensor:
    """Unit Gaussian noise [b, *shape] for the b samples with these indices in the step's global batch."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, step, i)) for i in sample_indices])


def uniform(seed: int, stream: Stream, step: int, sample_indices: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), one per sample: [b]."""
    return torch.stack([torch.rand((), generator=generator(seed, stream, step, i)) for i in sample_indices])


def spread_timesteps(
    total: int,
    seed: int,
    step: int,
    sample_indices: Sequence[int],
    batch_size: int,
    quantiles: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Timesteps [b] int64 in 0 .. total - 1, each uniform, but spread evenly over the step's global batch.

    Sample i of `batch_size` gets (u + i / batch_size) mod 1 with one u per step: less variance of the batch's loss than
    independent timesteps (Kingma et al. 2021, appendix I.1). Which image is which sample is random anyway.
    quantiles: the inverse distribution function of another density, [0, 1) float64 -> [0, 1]; spread by its quantiles.
    """
    offset = torch.rand((), generator=generator(seed, Stream.TIMESTEPS, step), dtype=torch.float64)
    positions = (offset + torch.tensor(sample_indices, dtype=torch.float64) / batch_size) % 1.0
    if quantiles is not None:
        positions = quantiles(positions)
    return (positions * total).long().clamp(max=total - 1)


def logit_normal_quantiles(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """The inverse distribution function of sigmoid(mean + std * N(0, 1)) (Esser et al. 2024, eq. 19)."""
    return lambda positions: torch.sigmoid(mean + std * torch.special.ndtri(positions))
