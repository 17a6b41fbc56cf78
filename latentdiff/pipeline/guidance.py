"""From the UNet to the denoiser that a sampler calls: classifier-free guidance, then predicted clean latents."""

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
    """denoise(x, level) -> x0 for a sampler: both branches in one UNet call, the context's keys and values made once.

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
    ) -> None:
        self._unet, self._schedule, self._guidance, self._clip = unet, schedule, guidance, clip_sample
        self._batch, self._dtype = len(context), unet.dtype
        if guidance.wanted:
            assert negative is not None
            self._both = unet.project(torch.cat([context, negative]))
        else:
            self._both = unet.project(context)
        self._one = self._both.first(self._batch)

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        inputs = x.to(self._dtype)
        # The outputs are copied, as a compiled UNet may write over them in its next call (CUDA graphs).
        if self._guidance.active(level):
            t = torch.full((2 * self._batch,), level.timestep, dtype=torch.float32, device=x.device)
            both = self._unet(torch.cat([inputs, inputs]), t, self._both).to(x.dtype, copy=True)
            output = self._guidance.apply(*both.chunk(2))
        else:
            t = torch.full((self._batch,), level.timestep, dtype=torch.float32, device=x.device)
            output = self._unet(inputs, t, self._one).to(x.dtype, copy=True)
        x0 = self._schedule.predict_x0(output, x, level)
        # Adding 0 * x0 propagates NaN and inf, which clamp would turn into black or white.
        return x0.clamp(-1.0, 1.0) + 0 * x0 if self._clip else x0
