"""Whether generated images show what their prompts ask for: the compositional set, where the true images are known.

An image counts as exact if, of the true images of *all* combinations of style, object, colour and background, seen and
held out, the one of its prompt is the nearest in pixels. Images of two objects are compared with all images of two.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.config import DataConfig
from latentdiff.data.compositions import (
    BACKGROUNDS,
    SPLITS,
    STYLES,
    Composition,
    CompositionSet,
    compositions,
    in_all_colours,
    render,
)
from latentdiff.evaluation.metrics import nearest_images, nearest_in_batches, psnr, stack_pixels
from latentdiff.evaluation.prompts import generate
from latentdiff.evaluation.reconstruction import reconstructed_images
from latentdiff.evaluation.scores import Rate, Score, markdown_table
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.randomness import Stream, generator

CHUNK = 256  # training images rendered at once


@dataclass(frozen=True, kw_only=True)
class CompositionScore(Score):
    """How images compare with the true images of their compositions. Rates are of all images."""

    exact: Rate
    style: Rate  # without meaning for prompts that name no style
    object: Rate  # all objects are right, and in their places
    colour: Rate  # all colours of objects are right, and in their places
    background: Rate


def score(
    family: CompositionSet, wanted: Sequence[Composition], images: Sequence[Image.Image], any_style: bool = False
) -> CompositionScore:
    """Compare images with the true images of `wanted`, all of one object or all of two.

    any_style: the prompts left the style open, so either is right (and the PSNR is against the better one).
    """
    pixels = stack_pixels(images)
    found = nearest_compositions(family, pixels, len(wanted[0].figures))
    training = set(compositions(family, "train"))
    truths = [stack_pixels([render(replace(one, style=s), images[0].width) for one in wanted]) for s in STYLES]
    by_style = torch.stack([psnr(truth, pixels) for truth in truths])  # [styles, N]
    own = torch.tensor([STYLES.index(one.style) for one in wanted])
    best = by_style.amax(dim=0) if any_style else by_style.gather(0, own[None])[0]

    def rate(key: Callable[[Composition], Any]) -> Rate:
        return Rate(sum(key(a) == key(b) for a, b in zip(wanted, found, strict=True)), len(wanted))

    return CompositionScore(
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
    score: CompositionScore
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
        any_style = {"style": "any"}
        rows = [(row.name, row.score.cells() | (any_style if row.any_style else {})) for row in self.rows]
        return markdown_table(rows)

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
        return generate(pipeline, prompts, data.shape, seed, batch_size, progress)

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
            truths = stack_pixels([render(one, data.shape[0]) for one in held_out])
            images = reconstructed_images(pipeline.vae, truths, batch_size)
            rows.append(Row(f"{kind}ceiling: reconstructions", score(family, held_out, images)))
        images = [best_copy(one, data.shape[0]) for one in held_out]
        rows.append(Row(f"{kind}floor: best copies", score(family, held_out, images)))
    return CompositionReport(rows, shown)


def nearest_compositions(family: CompositionSet, pixels: Tensor, count: int) -> list[Composition]:
    """For each image [N, 3, H, W] the composition of `count` figures whose true image is nearest in pixels.

    All combinations are searched. An image of two figures is two halves that share style and background, so the
    nearest figures are found in each half by itself.
    """
    size = pixels.shape[-1]
    figures = [figure for name in family.objects for figure in in_all_colours(name)]
    # Squared distances of each half to each candidate for it.
    distances = torch.empty(count, len(pixels), len(STYLES), len(BACKGROUNDS), len(figures))
    for (s, style), (f, figure) in product(enumerate(STYLES), enumerate(figures)):
        truth = stack_pixels([render(Composition(style, (figure,) * count, name), size) for name in BACKGROUNDS])
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
    size, training = images[0].width, compositions(family, "train")
    chunks = (training[first : first + CHUNK] for first in range(0, len(training), CHUNK))
    batches = (stack_pixels([render(one, size) for one in chunk]) for chunk in chunks)
    return [render(training[i], size) for i in nearest_in_batches(stack_pixels(images), batches).tolist()]


def best_copy(composition: Composition, size: int) -> Image.Image:
    """The most that copying can give: the nearest image with all figures in trained colours, all else being right."""
    truth = stack_pixels([render(composition, size)])
    trained = [
        [figure] if not figure.is_held_out else [one for one in in_all_colours(figure.object) if not one.is_held_out]
        for figure in composition.figures
    ]
    copies = [render(replace(composition, figures=figures), size) for figures in product(*trained)]
    return copies[int(nearest_images(truth, stack_pixels(copies)))]


def some_of(candidates: Sequence[Composition], count: int) -> list[Composition]:
    """A random choice of `count`, or all if there are fewer, the same every time."""
    order = torch.randperm(len(candidates), generator=generator(Stream.COMPOSITIONS, len(candidates))).tolist()
    return [candidates[i] for i in order[:count]]
