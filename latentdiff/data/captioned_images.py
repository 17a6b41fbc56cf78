"""Captioned images from a folder, parquet files or a `datasets` id -> pixels [3, H, W] in [-1, 1] and captions.

Images are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from latentdiff.config import COMPOSITIONS, DataConfig
from latentdiff.data.batches import Item, Key
from latentdiff.data.sources import open_table
from latentdiff.images import ANIMATED, READ_ERRORS, View, decode, prepare, to_pixels
from latentdiff.printable import first_line, printable
from latentdiff.randomness import Stream, generator


class CaptionedImages(Dataset):
    """A table of captioned images, read one at a time. channels: of the images, 1 to 4."""

    def __init__(self, table: datasets.Dataset, config: DataConfig, channels: int, seed: int) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed

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
        """[C, size, size] float32 in [-1, 1]."""
        size = (self.config.size, self.config.size)
        image = prepare(self.image(index), size, self.channels, self.config.background, view)
        return to_pixels(image)

    def first(self, count: int) -> Tensor:
        """The first `count` images (or as many as there are), undistorted: [count, C, H, W]."""
        return torch.stack([self.pixels(i) for i in range(min(count, len(self)))])

    def some(self, count: int) -> "CaptionedImages":
        """A random subset of `count` images (or all, if there are fewer), the same in every run."""
        chosen = sorted(_shuffled(len(self))[:count])
        return CaptionedImages(self.table.select(chosen), self.config, self.channels, self.seed)

    def batches(self, batch_size: int, start: int = 0, step: int = 1) -> Iterator[tuple[list[int], Tensor]]:
        """All images in order, undistorted, as (indices, pixels [b, C, H, W]); every `step`-th batch from `start`."""
        for first in range(start * batch_size, len(self), step * batch_size):
            indices = list(range(first, min(first + batch_size, len(self))))
            yield indices, torch.stack([self.pixels(i) for i in indices])


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_images(
    config: DataConfig, channels: int, seed: int, progress: bool = True
) -> tuple[CaptionedImages, CaptionedImages]:
    """The training images and the held-out ones (which may be none).

    Raises ValueError if the source is missing or empty, a column is missing, a caption is not text, or more than
    `max_unreadable` of the images cannot be read; fewer are skipped with one warning that names them.
    """
    if config.validation_split is not None and Path(config.source).expanduser().is_file():
        raise ValueError(
            f"data.validation_split is {config.validation_split!r}, but {config.source!r} is one file, which has no "
            "splits; use data.holdout"
        )
    table = _opened(config, config.split, progress)
    table = _limited(table, config.limit)
    if config.validation_split is not None:
        held_out = _limited(_opened(config, config.validation_split, progress), config.validation_limit)
    else:
        if config.holdout >= len(table):
            raise ValueError(f"data.holdout is {config.holdout}, but {config.source!r} has only {len(table)} images")
        order = _shuffled(len(table))
        held_out = table.select(sorted(order[: config.holdout]))
        table = table.select(sorted(order[config.holdout :]))
    return CaptionedImages(table, config, channels, seed), CaptionedImages(held_out, config, channels, seed)


def _limited(table: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return table if limit is None or limit >= len(table) else table.select(_shuffled(len(table))[:limit])


def _shuffled(n: int) -> list[int]:
    """A random order that does not depend on the run's seed: every run of both stages holds out the same images."""
    return torch.randperm(n, generator=generator(Stream.HOLDOUT)).tolist()


def _opened(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
    table = open_table(config, split, progress)
    if config.source == COMPOSITIONS:  # drawn here
        return table
    return _without_unreadable(table, config, progress)


def _without_unreadable(table: datasets.Dataset, config: DataConfig, progress: bool) -> datasets.Dataset:
    """Read every image once and drop those that cannot be decoded, with a warning."""

    animated: list[int] = []

    def problem(row: int) -> str | None:
        entry = table[row][config.image_column] or {}
        try:
            if decode(entry).info.get(ANIMATED):
                animated.append(row)
        except READ_ERRORS as error:
            return printable(f"{entry.get('path') or f'row {row}'} ({first_line(error)})")
        return None

    with ThreadPoolExecutor() as pool:
        rows = range(len(table))
        bar = tqdm(pool.map(problem, rows), "check images", len(rows), disable=not progress, leave=False)
        problems = {row: text for row, text in zip(rows, bar, strict=True) if text is not None}
    if animated:
        warnings.warn(
            f"{len(animated)} of {len(table)} images of {config.source!r} have several frames; the first one is used",
            stacklevel=2,
        )
    if not problems:
        return table
    named = ", ".join(list(problems.values())[:5]) + (", ..." if len(problems) > 5 else "")
    summary = f"{len(problems)} of {len(table)} images of {config.source!r} are unreadable: {named}"
    if len(problems) > config.max_unreadable * len(table):
        raise ValueError(f"{summary}; data.max_unreadable is {config.max_unreadable}")
    warnings.warn(f"{summary}; skipped", stacklevel=2)
    return table.select([row for row in rows if row not in problems])
