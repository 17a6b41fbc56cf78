"""From the UNet to the denoiser that a sampler calls: classifier-free guidance, then predicted clean latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.models.unet import UNet


@dataclass(frozen=True)
class Guidance:
    """How strongly, and at which noise levels, the prompt is preferred to the negative (or unconditional) one.

    scale: w in output = negative + w (prompt - negative) (Ho & Salimans 2022, eq. 6, with w for 1 + w); 1 is no
        guidance and costs one branch only.
    rescale: in [0, 1], how far the guided output is brought back to the standard deviation of the prompt's own output,
        which reduces overexposure (Lin et al. 2024, eq. 14-16).
    interval: (low, high) of sigma / alpha; outside, the prompt's branch alone is used (Kynkäänniemi et al. 2024).

    Raises ValueError, naming the field, for values outside these.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.scale and isfinite(self.scale)):
            raise ValueError(f"guidance_scale is {self.scale}, must be a finite number of at least 0")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}, must be in 0 .. 1")
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ValueError(
                f"guidance_interval is {self.interval}, must be two noise levels (sigma / alpha), low < high, such as "
                "(0.3, 5.0)"
            )

    @property
    def wanted(self) -> bool:
        """Whether the negative prompt's branch is needed at all."""
        return self.scale != 1.0

    def active(self, level: NoiseLevel) -> bool:
        """Whether there is guidance at this noise level."""
        return self.wanted and (self.interval is None or self.interval[0] < level.sigma_karras <= self.interval[1])

    def apply(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided output [B, C, h, w] of the two branches."""
        guided = torch.lerp(unconditional, conditional, self.scale)
        if self.rescale == 0:
            return guided
        dims = tuple(range(1, guided.ndim))
        factor = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return guided * (self.rescale * factor + (1 - self.rescale))


class GuidedDenoiser:
    """denoise(x, level) -> x0 for a sampler: both branches in one UNet call, what they share made once, beforehand.

    That is the context's keys and values, and the time embeddings of `levels`; those of other levels are made in the
    call.

    context, negative: [B, L, D] on the UNet's device, in its dtype; `negative` may be None without guidance.
    x and x0: [B, C, h, w], in x's dtype, which may differ from the UNet's.
    clip_sample: clamp x0 to [-1, 1]: right for pixels, wrong for latents.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        context: Tensor,
        negative: Tensor | None,
        guidance: Guidance,
        clip_sample: bool = False,
        levels: Sequence[NoiseLevel] = (),
    ) -> None:
        self._unet, self._schedule, self._guidance, self._clip = unet, schedule, guidance, clip_sample
        self._batch, self._dtype = len(context), unet.dtype
        if guidance.wanted:
            assert negative is not None
            self._both = unet.project(torch.cat([context, negative]))
        else:
            self._both = unet.project(context)
        self._one = self._both.first(self._batch)
        # Here an embedding takes a fifth of the time: between two calls of the UNet nothing is in the CPU's caches.
        self._embeddings = {level.timestep: self._embed(level) for level in levels}

    def _embed(self, level: NoiseLevel) -> Tensor:
        count = 2 * self._batch if self._guidance.active(level) else self._batch
        return self._unet.embed(torch.full((count,), level.timestep, dtype=torch.float32, device=self._unet.device))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        inputs = x.to(self._dtype)
        embedding = self._embeddings.get(level.timestep)
        if embedding is None:
            embedding = self._embed(level)
        # A compiled UNet may write over its outputs in its next call (CUDA graphs): a new tensor is made of them.
        if self._guidance.active(level):
            both = self._unet(torch.cat([inputs, inputs]), embedding, self._both).to(x.dtype)
            output = self._guidance.apply(*both.chunk(2))
        else:
            output = self._unet(inputs, embedding, self._one).to(x.dtype, copy=True)
        x0 = self._schedule.predict_x0(output, x, level)
        # Adding 0 * x0 propagates NaN and inf, which clamp would turn into black or white.
        return x0.clamp(-1.0, 1.0) + 0 * x0 if self._clip else x0
