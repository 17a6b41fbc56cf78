"""Where sampling starts: from noise, or from an image's latents, of which a mask can keep a part."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.samplers import Denoiser, randn
from latentdiff.diffusion.schedule import NoiseLevel


class FromNoise(NamedTuple):
    """Start from unit Gaussian noise [C, h, w], of the images' seeds or given [B, C, h, w]."""

    shape: tuple[int, int, int]
    device: torch.device
    given: Tensor | None = None

    def begin(
        self, batch: slice, generators: Sequence[torch.Generator], denoise: Denoiser, levels: Sequence[NoiseLevel]
    ) -> tuple[Tensor, Denoiser]:
        """The first x of a batch, and the denoiser to sample with."""
        # Also with given noise, so that the noise between steps does not depend on it
        noise = randn(self.shape, generators, self.device, torch.float32)
        return noise if self.given is None else self.given[batch].to(self.device, torch.float32), denoise


class FromImage(NamedTuple):
    """Start from an image's latents [B, C, h, w], noised to the first level; outside `mask` they are kept.

    from_noise: start what is free from noise alone instead.
    """

    latents: Tensor
    mask: Tensor | None = None  # [B, 1, h, w], 1 where latents are free
    from_noise: bool = False

    def begin(
        self, batch: slice, generators: Sequence[torch.Generator], denoise: Denoiser, levels: Sequence[NoiseLevel]
    ) -> tuple[Tensor, Denoiser]:
        """The first x of a batch, and the denoiser to sample with."""
        known = self.latents[batch]
        if len(levels) == 1:  # no step to run: a strength of 0
            return known, denoise
        noise = randn(known.shape[1:], generators, known.device, torch.float32)
        x = levels[0].alpha * known + levels[0].sigma * noise
        if self.mask is None:
            return x, denoise
        mask = self.mask[batch]
        if self.from_noise:
            x = torch.lerp(x, noise, mask)
        return x, lambda x, level: torch.lerp(known, denoise(x, level), mask)


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation of two noise tensors of one shape, whose norm stays between theirs (Shoemake 1985)."""
    cosine = (a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin().abs() < 1e-6:  # the same direction, or the opposite one, where no arc is better than another
        return torch.lerp(a, b, fraction)
    return (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin()
