"""Whether generated images show what their prompts ask for: the compositional set, where the true images are known.

An image counts as exact if, of the true images of *all* combinations of style, object, colour and background, seen and
held out, the one of its prompt is the nearest in pixels. Images of two objects are compared with all images of two.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.config import DataConfig
from latentdiff.data.compositions import (
    BACKGROUNDS,
    COLOURS,
    SPLITS,
    STYLES,
    Composition,
    CompositionSet,
    Figure,
    compositions,
    render,
)
from latentdiff.evaluation.metrics import psnr
from latentdiff.evaluation.prompts import generate
from latentdiff.evaluation.reconstruction import reconstruct
from latentdiff.images import to_images, to_pixels
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.randomness import Stream, generator

CHUNK = 256  # training images rendered at once
Z_95 = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Rate:
    """So many of so many, with the 95 % interval of Wilson (1927)."""

    hits: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.total, self.hits / self.total
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 * sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.hits} / {self.total} ({low:.0%} .. {high:.0%})"


@dataclass(frozen=True)
class Score:
    """How images compare with the true images of what was asked for. Rates are of all images."""

    exact: Rate
    style: Rate  # without meaning for prompts that name no style
    object: Rate  # all objects are right, and in their places
    colour: Rate  # all colours of objects are right, and in their places
    background: Rate
    copies: int  # the nearest of all true images is one that was trained on
    psnr: float  # against the true images, mean, dB


def score(
    family: CompositionSet, wanted: Sequence[Composition], images: Sequence[Image.Image], any_style: bool = False
) -> Score:
    """Compare images with the true images of `wanted`, all of one object or all of two.

    any_style: the prompts left the style open, so either is right (and the PSNR is against the better one).
    """
    pixels = _pixels(images)
    found = nearest_compositions(family, pixels, len(wanted[0].figures))
    training = set(compositions(family, "train"))
    truths = [_pixels([render(replace(one, style=s), images[0].width) for one in wanted]) for s in STYLES]
    by_style = torch.stack([psnr(truth, pixels) for truth in truths])  # [styles, N]
    own = torch.tensor([STYLES.index(one.style) for one in wanted])
    best = by_style.amax(dim=0) if any_style else by_style.gather(0, own[None])[0]

    def rate(key: Callable[[Composition], Any]) -> Rate:
        return Rate(sum(key(a) == key(b) for a, b in zip(wanted, found, strict=True)), len(wanted))

    return Score(
        exact=rate(lambda one: (one.figures, one.background, None if any_style else one.style)),
        style=rate(lambda one: one.style),
        object=rate(lambda one: [figure.object for figure in one.figures]),
        colour=rate(lambda one: [figure.colour for figure in one.figures]),
        background=rate(lambda one: one.background),
        copies=sum(one in training for one in found),
        psnr=best.mean().item(),
    )


@dataclass(frozen=True)
class Row:
    """A line of the report: what was compared, and how it scored."""

    name: str
    score: Score
    any_style: bool = False


@dataclass(frozen=True)
class CompositionReport:
    """How a pipeline does on prompts that it was not and was trained on, with the floor and the ceiling of both."""

    rows: list[Row]
    held_out: list[list[tuple[Composition, Image.Image]]]  # by kind, with the generated images

    def first(self, count: int) -> list[tuple[Composition, Image.Image]]:
        """As many as `count` held-out compositions, of all kinds, and what was generated for them."""
        share = count // len(self.held_out)
        return [pair for kind in self.held_out for pair in kind[:share]]

    def table(self) -> str:
        """As Markdown, rates with their 95 % intervals."""
        head = ("", "exact", "style", "object", "colour", "background", "copies", "PSNR to the truth (dB)")
        lines = [head, ("---",) * len(head)]
        for row in self.rows:
            one = row.score
            style = "any" if row.any_style else str(one.style.hits)
            hits = (str(one.exact), style, *(str(rate.hits) for rate in (one.object, one.colour, one.background)))
            lines.append((row.name, *hits, str(one.copies), f"{one.psnr:.1f}"))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Each row's name with its numbers."""
        return {row.name: asdict(row.score) for row in self.rows}


def evaluate_compositions(
    pipeline: LatentDiffusionPipeline, data: DataConfig, count: int, seed: int, batch_size: int, progress: bool
) -> CompositionReport:
    """Generate `count` images of held-out compositions, of trained ones, and of held-out ones without a style.

    With the pipeline's own defaults; image i of each row has seed + i. Two figures, if the set has them, have rows of
    their own. The ceiling is the true image after the autoencoder, the floor the best copy of what was trained on.
    Raises ValueError if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} prompts asked for, must be at least 1")
    family = CompositionSet.of(data)

    def generated(prompts: Sequence[str]) -> list[Image.Image]:
        return generate(pipeline, prompts, data.size, seed, batch_size, progress)

    rows: list[Row] = []
    shown: list[list[tuple[Composition, Image.Image]]] = []
    for figures, kind in [(1, ""), (2, "two objects, ")] if family.pairs else [(1, "")]:
        splits = ([one for one in compositions(family, split) if len(one.figures) == figures] for split in SPLITS)
        trained, held_out = (some_of(split, count) for split in splits)
        images = generated([one.prompt for one in held_out])
        shown.append(list(zip(held_out, images, strict=True)))
        rows.append(Row(f"{kind}held-out prompts", score(family, held_out, images)))
        images = generated([one.free_prompt for one in held_out])
        rows.append(Row(f"{kind}the same without a style", score(family, held_out, images, any_style=True), True))
        images = generated([one.prompt for one in trained])
        rows.append(Row(f"{kind}trained prompts", score(family, trained, images)))
        if not pipeline.vae.is_pixel_space:
            truths = _pixels([render(one, data.size) for one in held_out]).split(batch_size)
            images = [image for batch in truths for image in to_images(_reconstructed(pipeline.vae, batch))]
            rows.append(Row(f"{kind}ceiling: reconstructions", score(family, held_out, images)))
        images = [best_copy(one, data.size) for one in held_out]
        rows.append(Row(f"{kind}floor: best copies", score(family, held_out, images)))
    return CompositionReport(rows, shown)


@torch.no_grad()
def _reconstructed(vae: Autoencoder, pixels: Tensor) -> Tensor:
    assert isinstance(vae, AutoencoderKL)
    return reconstruct(vae, pixels.to(vae.device)).float().cpu()


def nearest_compositions(family: CompositionSet, pixels: Tensor, count: int) -> list[Composition]:
    """For each image [N, 3, H, W] the composition of `count` figures whose true image is nearest in pixels.

    All combinations are searched. An image of two figures is two halves that share style and background, so the
    nearest figures are found in each half by itself.
    """
    size = pixels.shape[-1]
    figures = [Figure(name, colour) for name in family.objects for colour in ("", *COLOURS)]
    # Squared distances of each half to each candidate for it.
    distances = torch.empty(count, len(pixels), len(STYLES), len(BACKGROUNDS), len(figures))
    for (s, style), (f, figure) in product(enumerate(STYLES), enumerate(figures)):
        truth = _pixels([render(Composition(style, (figure,) * count, name), size) for name in BACKGROUNDS])
        for half, (own, true) in enumerate(zip(pixels.chunk(count, 3), truth.chunk(count, 3), strict=True)):
            distances[half, :, s, :, f] = torch.cdist(own.flatten(1), true.flatten(1)).square()
    nearest, chosen = distances.min(dim=-1)  # over the figures
    style_and_background = nearest.sum(dim=0).flatten(1).argmin(dim=1)
    found = []
    for n, place in enumerate(style_and_background.tolist()):
        s, b = divmod(place, len(BACKGROUNDS))
        both = tuple(figures[chosen[half, n, s, b]] for half in range(count))
        found.append(Composition(STYLES[s], both, list(BACKGROUNDS)[b]))
    return found


def nearest_training_images(family: CompositionSet, images: Sequence[Image.Image]) -> list[Image.Image]:
    """For each image the training image that is nearest in pixels."""
    pixels, size = _pixels(images), images[0].width
    training = compositions(family, "train")
    best = torch.full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64)
    for first in range(0, len(training), CHUNK):
        truth = _pixels([render(one, size) for one in training[first : first + CHUNK]])
        distance, place = torch.cdist(pixels.flatten(1), truth.flatten(1)).min(dim=1)
        index = torch.where(distance < best, first + place, index)
        best = torch.minimum(best, distance)
    return [render(training[i], size) for i in index.tolist()]


def best_copy(composition: Composition, size: int) -> Image.Image:
    """The most that copying can give: the nearest image with all figures in trained colours, all else being right."""
    truth = _pixels([render(composition, size)])
    trained = [
        [figure] if not figure.is_held_out else [one for one in _recoloured(figure) if not one.is_held_out]
        for figure in composition.figures
    ]
    copies = [render(replace(composition, figures=figures), size) for figures in product(*trained)]
    return copies[int(torch.cdist(truth.flatten(1), _pixels(copies).flatten(1)).argmin())]


def _recoloured(figure: Figure) -> list[Figure]:
    return [replace(figure, colour=colour) for colour in ("", *COLOURS)]


def some_of(candidates: Sequence[Composition], count: int) -> list[Composition]:
    """A random choice of `count`, or all if there are fewer, the same every time."""
    order = torch.randperm(len(candidates), generator=generator(Stream.COMPOSITIONS, len(candidates))).tolist()
    return [candidates[i] for i in order[:count]]


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """[N, 3, H, W] in [-1, 1]."""
    return torch.stack([to_pixels(image) for image in images])
