"""Whether a model draws an object in a style in which it never saw it: a set with the columns `style` and `label`.

Each (style, object) pair that the validation split holds out has a true image, and its object is trained in other
styles. A generated image is right if, of the true images of the whole set, seen and held out, the nearest one in pixels
is of the wanted style, of the wanted object (its `label`), or of both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.metrics import nearest_images, psnr, stack_pixels
from latentdiff.evaluation.prompts import generate
from latentdiff.evaluation.reconstruction import reconstructed_images
from latentdiff.evaluation.scores import Rate, Score, markdown_table
from latentdiff.images import to_images
from latentdiff.pipeline import LatentDiffusionPipeline

STYLE, OBJECT = "style", "label"  # columns


def held_out_pairs(training: CaptionedImages, held_out: CaptionedImages) -> list[int]:
    """Which held-out images show a pair of style and object that no training image shows, but whose object some do.

    None if the images have no captions or not both columns.
    """
    columns = {STYLE, OBJECT} & {*training.table.column_names} & {*held_out.table.column_names}
    if len(columns) < 2 or not training.captioned:
        return []
    pairs = set(_pairs(training))
    objects = {label for _, label in pairs}
    return [i for i, (style, label) in enumerate(_pairs(held_out)) if (style, label) not in pairs and label in objects]


def _pairs(images: CaptionedImages) -> list[tuple[str, str]]:
    return list(zip(images.table[STYLE], images.table[OBJECT], strict=True))


@dataclass(frozen=True, kw_only=True)
class StyleScore(Score):
    """How images compare with the true images of their pairs. Rates are of all images."""

    pair: Rate
    style: Rate
    object: Rate


@dataclass(frozen=True)
class TrueImages:
    """All true images, those trained on first; in what follows an image is its index."""

    pixels: Tensor  # [N, C, H, W] in [-1, 1]
    prompts: list[str]
    styles: list[str]
    objects: list[str]
    trained: int  # so many are trained on

    @staticmethod
    def of(training: CaptionedImages, held_out: CaptionedImages, batch_size: int) -> "TrueImages":
        """The images of both splits, undistorted, in one shape."""
        splits = (training.in_one_shape(), held_out.in_one_shape())
        return TrueImages(
            torch.cat([pixels for images in splits for _, pixels in images.batches(batch_size)]),
            [caption for images in splits for caption in images.captions],
            [style for images in splits for style, _ in _pairs(images)],
            [label for images in splits for _, label in _pairs(images)],
            len(training),
        )

    def score(self, wanted: Sequence[int], images: Sequence[Image.Image]) -> StyleScore:
        """Compare images with the true images of the same pairs."""
        pixels = stack_pixels(images)
        found = nearest_images(pixels, self.pixels).tolist()
        style = [self.styles[a] == self.styles[b] for a, b in zip(wanted, found, strict=True)]
        same = [self.objects[a] == self.objects[b] for a, b in zip(wanted, found, strict=True)]
        return StyleScore(
            pair=Rate(sum(a and b for a, b in zip(style, same, strict=True)), len(wanted)),
            style=Rate(sum(style), len(wanted)),
            object=Rate(sum(same), len(wanted)),
            copies=sum(i < self.trained for i in found),
            psnr=psnr(self.pixels[list(wanted)], pixels).mean().item(),
        )

    def nearest_trained(self, images: Sequence[Image.Image]) -> list[int]:
        """For each image the nearest of the training images."""
        return nearest_images(stack_pixels(images), self.pixels[: self.trained]).tolist()

    def in_other_styles(self, wanted: int) -> list[int]:
        """The training images of an object that is held out in one style."""
        return [i for i in range(self.trained) if self.objects[i] == self.objects[wanted]]

    def best_copy(self, wanted: int) -> int:
        """The most that copying the right object can give: of its training images the nearest to the true image."""
        others = self.in_other_styles(wanted)
        return others[int(nearest_images(self.pixels[[wanted]], self.pixels[others]))]

    def mean_of_other_styles(self, wanted: int) -> Tensor:
        """The mean of the object's training images, [C, H, W]: what knowing the object but not the style can give."""
        return self.pixels[self.in_other_styles(wanted)].mean(dim=0)


@dataclass(frozen=True)
class Example:
    """A generated image, the true one of its prompt, and the training image nearest to the generated one."""

    prompt: str
    generated: Image.Image
    truth: Image.Image
    nearest: Image.Image


@dataclass(frozen=True)
class StyleReport:
    """How a pipeline does on held-out and on trained pairs, with the ceiling and the floors of the held-out ones."""

    rows: list[tuple[str, StyleScore]]
    examples: list[Example]  # of the held-out pairs, in the order of the set

    def some(self, count: int) -> list[Example]:
        """As many as `count` examples, spread evenly over the set."""
        return [self.examples[i] for i in _spread(len(self.examples), count)]

    def table(self) -> str:
        """As Markdown, the main rate with its 95 % interval."""
        return markdown_table([(name, score.cells()) for name, score in self.rows])

    def curve(self) -> dict[str, str]:
        """What a table over checkpoints says: all of the held-out pairs, and the main rate of the trained ones."""
        held_out, trained = (score for _, score in self.rows[:2])
        return {**held_out.cells(), "trained pairs": f"{trained.pair.hits} / {trained.pair.total}"}

    def to_json(self) -> dict[str, Any]:
        """Each row's name with its numbers."""
        return {name: asdict(score) for name, score in self.rows}


def evaluate_styles(
    pipeline: LatentDiffusionPipeline,
    training: CaptionedImages,
    held_out: CaptionedImages,
    count: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> StyleReport:
    """Generate as many as `count` images of held-out pairs, and as many of trained ones.

    With the pipeline's own defaults; image i of each row has seed + i. The ceiling is the true image after the
    autoencoder, the floors are the mean of the object's other styles and the best copy of one of them.
    Raises ValueError if `count` is below 1. There must be `held_out_pairs`.
    """
    if count < 1:
        raise ValueError(f"{count} prompts asked for, must be at least 1")
    true = TrueImages.of(training, held_out, batch_size)
    candidates = held_out_pairs(training, held_out)
    wanted = [true.trained + candidates[i] for i in _spread(len(candidates), count)]
    seen = _spread(true.trained, len(wanted))

    def generated(indices: Sequence[int]) -> list[Image.Image]:
        prompts = [true.prompts[i] for i in indices]
        return generate(pipeline, prompts, training.config.shape, seed, batch_size, progress)

    drawn = generated(wanted)
    rows = [
        ("held-out prompts", true.score(wanted, drawn)),
        ("trained prompts", true.score(seen, generated(seen))),
    ]
    if not pipeline.vae.is_pixel_space:
        images = reconstructed_images(pipeline.vae, true.pixels[wanted], batch_size)
        rows.append(("ceiling: reconstructions", true.score(wanted, images)))
    images = to_images(torch.stack([true.mean_of_other_styles(i) for i in wanted]))
    rows.append(("floor: means of the object's other styles", true.score(wanted, images)))
    images = to_images(true.pixels[[true.best_copy(i) for i in wanted]])
    rows.append(("floor: best copies", true.score(wanted, images)))

    truths, nearest = to_images(true.pixels[wanted]), to_images(true.pixels[true.nearest_trained(drawn)])
    prompts = [true.prompts[i] for i in wanted]
    return StyleReport(rows, [Example(*one) for one in zip(prompts, drawn, truths, nearest, strict=True)])


def _spread(total: int, count: int) -> list[int]:
    """As many as `count` of the numbers below `total`, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
