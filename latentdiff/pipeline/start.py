"""Where sampling starts: from noise, or from an image's latents, of which a mask may hold a part."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.samplers import Denoiser, randn
from latentdiff.diffusion.schedule import NoiseLevel


class FromNoise(NamedTuple):
    """From unit Gaussian noise [C, h, w] of the images' seeds, or the noise that is given."""

    shape: tuple[int, int, int]
    device: torch.device
    given: Tensor | None = None

    def begin(
        self, batch: slice, generators: Sequence[torch.Generator], denoise: Denoiser, first: NoiseLevel
    ) -> tuple[Tensor, Denoiser]:
        """The first x of a batch, and the denoiser to go on with."""
        # Drawn in any case, so that what a sampler draws afterwards does not depend on it
        noise = randn(self.shape, generators, self.device, torch.float32)
        return noise if self.given is None else self.given[batch].to(self.device, torch.float32), denoise


class FromImage(NamedTuple):
    """From an image's latents [B, C, h, w], noised to the first level; outside `mask` they are held.

    afresh: whether what is free starts from noise alone instead.
    """

    latents: Tensor
    mask: Tensor | None = None  # [B, 1, h, w], 1 where latents are free
    afresh: bool = False

    def begin(
        self, batch: slice, generators: Sequence[torch.Generator], denoise: Denoiser, first: NoiseLevel
    ) -> tuple[Tensor, Denoiser]:
        """The first x of a batch, and the denoiser to go on with."""
        known = self.latents[batch]
        noise = randn(known.shape[1:], generators, known.device, torch.float32)
        x = first.alpha * known + first.sigma * noise
        if self.mask is None:
            return x, denoise
        mask = self.mask[batch]
        if self.afresh:
            x = torch.lerp(x, noise, mask)
        return x, lambda x, level: torch.lerp(known, denoise(x, level), mask)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two noise tensors of one shape, whose norm stays between theirs (Shoemake 1985)."""
    cosine = (a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin().abs() < 1e-6:  # the same direction, or the opposite one, where no arc is better than another
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
