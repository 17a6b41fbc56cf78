"""Images along a path: from one prompt and seed to another, and around one seed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.samplers import randn
from latentdiff.pipeline.options import integer, number
from latentdiff.pipeline.pipeline import LatentDiffusionPipeline, PipelineOutput
from latentdiff.pipeline.start import FromNoise, slerp


def interpolate(
    pipeline: LatentDiffusionPipeline,
    prompts: tuple[str, str],
    seeds: tuple[int, int],
    frames: int = 8,
    *,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> PipelineOutput:
    """Images from one prompt and seed to another: spherical interpolation of the noise, linear of the context.

    frames: images, both ends included, at least 2. All use the first seed for noise between steps, if any, and the
        output gives that seed for all of them. options: see `Options`; those with one row per image have two.

    Raises ValueError for anything but two prompts and two seeds, fewer than two frames, and as a call.
    """
    for name, two in [("prompts", prompts), ("seeds", seeds)]:
        if isinstance(two, str) or not isinstance(two, Sequence) or len(two) != 2:
            raise ValueError(f"{name} is {two!r}, must be two: where to start and where to end")
    if integer("frames", frames) < 2:
        raise ValueError(f"frames is {frames}, must be at least 2")
    ends = pipeline.request(list(prompts), options | {"seed": list(seeds)})
    shape = pipeline.latent_shape(height, width)
    fractions = torch.linspace(0, 1, frames)
    context, negative = pipeline.contexts(ends)

    def between(states: Tensor) -> Tensor:
        start, end = states
        return torch.stack([torch.lerp(start, end, fraction) for fraction in fractions.to(states)])

    first, last = (_noise(shape, seed) for seed in ends.seeds)
    noise = torch.stack([slerp(first, last, fraction.item()) for fraction in fractions])
    request = replace(
        ends,
        prompts=[ends.prompts[0]] * frames,
        negatives=[ends.negatives[0]] * frames,
        seeds=[ends.seeds[0]] * frames,
        options=replace(
            ends.options,
            prompt_embeds=between(context),
            negative_prompt_embeds=None if negative is None else between(negative),
        ),
    )
    return pipeline.generate(request, FromNoise(shape, pipeline.device, noise))


def variations(
    pipeline: LatentDiffusionPipeline,
    prompt: str,
    seed: int,
    count: int = 4,
    amount: float = 0.3,
    *,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> PipelineOutput:
    """Images like that of (prompt, seed): its noise moved a fraction of the way to other noise.

    amount: in 0 .. 1; 0 is the image itself, 1 keeps only the prompt. The first image moves towards seed + 1, the next
        towards seed + 2, and so on; the output gives `seed` for all.

    Raises ValueError for an amount outside 0 .. 1, a count below 1, and as a call.
    """
    if not 0 <= number("amount", amount) <= 1:
        raise ValueError(f"amount is {amount}, must be in 0 .. 1")
    if integer("count", count) < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    request = pipeline.request([prompt] * count, options | {"seed": [seed] * count})
    shape = pipeline.latent_shape(height, width)
    base, *others = (_noise(shape, seed + i) for i in range(count + 1))
    noise = torch.stack([slerp(base, other, amount) for other in others])
    return pipeline.generate(request, FromNoise(shape, pipeline.device, noise))


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """A seed's starting noise [C, h, w] on the CPU."""
    return randn(shape, [torch.Generator().manual_seed(seed)], "cpu", torch.float32)[0]
