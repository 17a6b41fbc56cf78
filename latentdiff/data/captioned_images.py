"""Captioned images from a folder, parquet files or a `datasets` id -> pixels [3, H, W] in [-1, 1] and captions.

Images are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from latentdiff.config import (
    COMPOSITIONS,
    AutoencoderKLConfig,
    DataConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
)
from latentdiff.data.batches import Item, Key
from latentdiff.data.shapes import Layout, Shape, choose_layout, nearest_shape, report
from latentdiff.data.sources import open_table
from latentdiff.distributed import chunks
from latentdiff.images import ANIMATED, READ_ERRORS, View, decode, prepare, to_pixels
from latentdiff.models.pixel_space import PixelSpaceConfig
from latentdiff.printable import first_line, printable
from latentdiff.randomness import Stream, generator


class CaptionedImages(Dataset):
    """A table of captioned images, read one at a time, each brought to the nearest shape of a layout.

    channels: of the images, 1 to 4. originals: (height, width) of the images themselves, upright; needed with several
    shapes. layout: None: all have the training size.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        config: DataConfig,
        channels: int,
        seed: int,
        originals: Sequence[Shape] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed
        self.originals = originals
        self.layout = layout or Layout((config.shape,))
        assert originals is None or len(originals) == len(table)
        assert originals is not None or len(self.layout.shapes) == 1

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> Item:
        view = self.view(key["index"], key["epoch"])
        return Item(key=key, pixels=self.pixels(key["index"], view))

    @property
    def captions(self) -> list[str]:
        """One caption per image; empty strings if the config names no caption column."""
        if self.config.caption_column is None:
            return [""] * len(self)
        return list(self.table[self.config.caption_column])

    def name(self, index: int) -> str:
        """The image's file name, or its row."""
        return self.table[index][self.config.image_column].get("path") or f"row {index}"

    def image(self, index: int) -> Image.Image:
        """The decoded image, not yet resized and cropped; OSError, with its name, if it cannot be read any more."""
        try:
            return decode(self.table[index][self.config.image_column])
        except READ_ERRORS as error:
            raise OSError(f"image {self.name(index)} cannot be read: {first_line(error)}") from error

    def view(self, index: int, epoch: int) -> View:
        """The crop and flip of an image in an epoch: a function of (seed, epoch, index)."""
        if self.config.crop == "center" and not self.config.flip:
            return View()
        x, y, flip = torch.rand(3, generator=generator(self.seed, Stream.CROP_FLIP, epoch, index)).tolist()
        return View((x, y) if self.config.crop == "random" else (0.5, 0.5), flip < self.config.flip)

    def pixels(self, index: int, view: View = View()) -> Tensor:  # noqa: B008 (View is immutable)
        """[C, H, W] float32 in [-1, 1], H and W those of the image's shape."""
        height, width = self.shape(index)
        image = prepare(self.image(index), (width, height), self.channels, self.config.background, view)
        return to_pixels(image)

    def shape(self, index: int) -> Shape:
        """Height and width of an image as it is trained on."""
        if self.originals is None:
            return self.layout.shapes[0]
        return nearest_shape(self.originals[index], self.layout.shapes)

    def by_shape(self) -> Sequence[Sequence[int]]:
        """The images of each shape, in order."""
        if len(self.layout.shapes) == 1:
            return [range(len(self))]
        groups: dict[Shape, list[int]] = {shape: [] for shape in self.layout.shapes}
        for index in range(len(self)):
            groups[self.shape(index)].append(index)
        return [group for group in groups.values() if group]

    def in_one_shape(self) -> "CaptionedImages":
        """The same images, all in the training size: with buckets that of the square one."""
        return CaptionedImages(self.table, self.config, self.channels, self.seed, self.originals)

    def select(self, rows: Sequence[int]) -> "CaptionedImages":
        """The images of these rows, in their order."""
        originals = None if self.originals is None else [self.originals[row] for row in rows]
        return CaptionedImages(self.table.select(rows), self.config, self.channels, self.seed, originals, self.layout)

    def first(self, count: int) -> Tensor:
        """The first `count` images (or as many as there are), undistorted, in one shape: [count, C, H, W]."""
        images = self.in_one_shape()
        return torch.stack([images.pixels(i) for i in range(min(count, len(self)))])

    def some(self, count: int) -> "CaptionedImages":
        """A random subset of `count` images (or all, if there are fewer), the same in every run."""
        return self.select(sorted(_shuffled(len(self))[:count]))

    def batches(self, batch_size: int, start: int = 0, step: int = 1) -> Iterator[tuple[list[int], Tensor]]:
        """All images, undistorted, as (indices, pixels [b, C, H, W]); every `step`-th batch from `start`.

        A batch has one shape, and the images of each shape come in order.
        """
        parts = [part for group in self.by_shape() for part in chunks(group, batch_size)]
        for indices in parts[start::step]:
            yield indices, torch.stack([self.pixels(i) for i in indices])


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_run_images(
    config: VAETrainingConfig | UNetTrainingConfig, vae: AutoencoderKLConfig | PixelSpaceConfig, progress: bool
) -> tuple[CaptionedImages, CaptionedImages]:
    """The images of a run of either stage, as `open_images`, in shapes that its networks take.

    vae: of the autoencoder, or pixel space, that it trains or trains on.
    """
    multiple = vae.downsampling * (config.model.downsampling if isinstance(config, UNetTrainingConfig) else 1)
    train = config.train
    return open_images(config.data, vae.in_channels, train.seed, progress, multiple, train.batch_size)


def describe_images(images: CaptionedImages, held_out: CaptionedImages) -> str:
    """Lines for the start of a run: how many images there are, their shapes, and what is lost by these."""
    lines = [f"{len(images)} training images, {len(held_out)} held out, {images.layout}"]
    if images.originals is not None:
        lines += report(images.config, images.originals, images.layout, lambda index: printable(images.name(index)))
    return "\n".join(lines)


def open_images(
    config: DataConfig, channels: int, seed: int, progress: bool = True, multiple: int = 1, batch_size: int = 1
) -> tuple[CaptionedImages, CaptionedImages]:
    """The training images and the held-out ones (which may be none), in the shapes that suit the training images.

    multiple, batch_size: of the shapes' sides in pixels, and images that each shape must have at least.
    Raises ValueError if the source is missing or empty, a column is missing, a caption is not text, no image is as
    large as `min_size`, or more than `max_unreadable` of the images cannot be read; fewer are skipped with one warning
    that names them.
    """
    if config.validation_split is not None and Path(config.source).expanduser().is_file():
        raise ValueError(
            f"data.validation_split is {config.validation_split!r}, but {config.source!r} is one file, which has no "
            "splits; use data.holdout"
        )
    images = _limited(_opened(config, config.split, channels, seed, progress), config.limit)
    if config.validation_split is not None:
        held_out = _opened(config, config.validation_split, channels, seed, progress)
        held_out = _limited(held_out, config.validation_limit)
    else:
        if config.holdout >= len(images):
            raise ValueError(f"data.holdout is {config.holdout}, but {config.source!r} has only {len(images)} images")
        order = _shuffled(len(images))
        held_out = images.select(sorted(order[: config.holdout]))
        images = images.select(sorted(order[config.holdout :]))
    assert images.originals is not None
    images.layout = held_out.layout = choose_layout(config, images.originals, multiple, batch_size)
    return images, held_out


def _limited(images: CaptionedImages, limit: int | None) -> CaptionedImages:
    return images if limit is None or limit >= len(images) else images.select(_shuffled(len(images))[:limit])


def _shuffled(n: int) -> list[int]:
    """A random order that does not depend on the run's seed: every run of both stages holds out the same images."""
    return torch.randperm(n, generator=generator(Stream.HOLDOUT)).tolist()


def _opened(config: DataConfig, split: str, channels: int, seed: int, progress: bool) -> CaptionedImages:
    """The usable images of a split."""
    table = open_table(config, split, progress)
    if config.source == COMPOSITIONS:  # drawn here
        return CaptionedImages(table, config, channels, seed, [config.shape] * len(table))
    table, originals = _without_unreadable(table, config, progress)
    return _without_small(CaptionedImages(table, config, channels, seed, originals))


def _without_unreadable(
    table: datasets.Dataset, config: DataConfig, progress: bool
) -> tuple[datasets.Dataset, list[Shape]]:
    """Read every image once and drop those that cannot be decoded, with a warning; the shapes of the others."""

    animated: list[int] = []

    def shape_or_problem(row: int) -> Shape | str:
        entry = table[row][config.image_column] or {}
        try:
            image = decode(entry)
        except READ_ERRORS as error:
            return printable(f"{entry.get('path') or f'row {row}'} ({first_line(error)})")
        if image.info.get(ANIMATED):
            animated.append(row)
        return image.height, image.width

    with ThreadPoolExecutor() as pool:
        rows = range(len(table))
        bar = tqdm(pool.map(shape_or_problem, rows), "check images", len(rows), disable=not progress, leave=False)
        found = list(bar)
    if animated:
        warnings.warn(
            f"{len(animated)} of {len(table)} images of {config.source!r} have several frames; the first one is used",
            stacklevel=2,
        )
    problems = [one for one in found if isinstance(one, str)]
    shapes = [one for one in found if not isinstance(one, str)]
    if not problems:
        return table, shapes
    summary = f"{len(problems)} of {len(table)} images of {config.source!r} are unreadable: {_first(problems)}"
    if len(problems) > config.max_unreadable * len(table):
        raise ValueError(f"{summary}; data.max_unreadable is {config.max_unreadable}")
    warnings.warn(f"{summary}; skipped", stacklevel=2)
    return table.select([row for row in rows if not isinstance(found[row], str)]), shapes


def _without_small(images: CaptionedImages) -> CaptionedImages:
    """Drop images whose shorter side is below `min_size`, with a warning; ValueError if all are."""
    config, originals = images.config, images.originals
    assert originals is not None
    if config.min_size is None:
        return images
    small = [row for row, shape in enumerate(originals) if min(shape) < config.min_size]
    if not small:
        return images
    summary = f"{len(small)} of {len(images)} images of {config.source!r} have a side of less than {config.min_size} px"
    if len(small) == len(images):
        raise ValueError(
            f"{summary}; data.min_size must be at most {max(map(min, originals))}, the longest of their shorter sides"
        )
    names = _first([printable(images.name(row)) for row in small])
    warnings.warn(f"{summary} (data.min_size): {names}; skipped", stacklevel=2)
    left_out = set(small)
    return images.select([row for row in range(len(images)) if row not in left_out])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
