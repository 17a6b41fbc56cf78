"""Captioned images of a data source -> pixels [3, H, W] in [-1, 1] and captions.

Images are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.archives import Identity, Place
from latentdiff.config import (
    COMPOSITIONS,
    AutoencoderKLConfig,
    DataConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
)
from latentdiff.data.batches import Item, Key
from latentdiff.data.index import (
    DIGEST,
    FILE_SIZE,
    FILE_TIME,
    HEIGHT,
    LENGTH,
    START,
    WIDTH,
    digest_of_bytes,
    indexed,
    name_of,
)
from latentdiff.data.shapes import Layout, Shape, choose_layout, nearest_shape, report
from latentdiff.data.sources import IMAGE, REPEATS, TEXT, bars_of_datasets, open_source
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.distributed import chunks
from latentdiff.images import READ_ERRORS, View, content_of, decode, prepare, to_pixels
from latentdiff.models.pixel_space import PixelSpaceConfig
from latentdiff.printable import first_line, images_of, listed, printable
from latentdiff.randomness import Stream, generator


class CaptionedImages(Dataset):
    """A table of captioned images, read one at a time, each brought to the nearest shape of a layout.

    The table has the columns of `latentdiff.data.sources` and, where it was read from files, those of
    `latentdiff.data.index`. channels: of the images, 1 to 4. originals: (height, width) of the images themselves,
    upright, [images, 2]; needed with several shapes. layout: None: all have the training size. notes: what was found
    when the source was opened, in lines. What it keeps in memory is a few numbers for each image.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        config: DataConfig,
        channels: int,
        seed: int,
        originals: np.ndarray | None = None,
        layout: Layout | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed
        self.originals = None if originals is None else np.asarray(originals, dtype=np.int32).reshape(-1, 2)
        self.layout = layout or Layout((config.shape,))
        self.notes = tuple(notes)
        self.captioned = TEXT in table.column_names
        assert originals is None or len(originals) == len(table)
        assert originals is not None or len(self.layout.shapes) == 1

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> Item:
        view = self.view(key["index"], key["epoch"])
        caption = self.caption(key["index"], key["epoch"])
        return Item(key=key, pixels=self.pixels(key["index"], view), caption=caption)

    def captions_of(self, index: int) -> list[str]:
        """The captions of an image, one or more: the empty one where there is none."""
        return _as_list(self._texts[index][TEXT]) if self.captioned else [""]

    @property
    def all_captions(self) -> list[list[str]]:
        """The captions of each image, as `captions_of` gives them."""
        return list(map(_as_list, self.table[TEXT])) if self.captioned else [[""]] * len(self)

    @property
    def captions(self) -> list[str]:
        """The first caption of each image; empty strings without captions."""
        return [captions[0] for captions in self.all_captions]

    @property
    def distinct_captions(self) -> list[str]:
        """All captions of all images, each once."""
        return list(dict.fromkeys(caption for own in self.all_captions for caption in own))

    def caption(self, index: int, epoch: int) -> str:
        """The caption of an image in an epoch: a function of (seed, epoch, index)."""
        captions = self.captions_of(index)
        if len(captions) == 1 and not self.config.shuffle_caption:
            return captions[0]
        draws = generator(self.seed, Stream.CAPTION, epoch, index)
        caption = captions[int(torch.randint(len(captions), (), generator=draws))]
        if not self.config.shuffle_caption:
            return caption
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.config.keep_tokens], parts[self.config.keep_tokens :]
        return ", ".join([*kept, *(rest[i] for i in torch.randperm(len(rest), generator=draws).tolist())])

    @cached_property
    def _texts(self) -> datasets.Dataset:
        return self.table.select_columns([TEXT])

    @property
    def repeats(self) -> list[int] | None:
        """How often each image comes in an epoch; None if all come once."""
        return list(self.table[REPEATS]) if REPEATS in self.table.column_names else None

    def entry(self, index: int) -> dict[str, Any]:
        """The undecoded image, as `latentdiff.images.content_of` takes it."""
        row = self.table[index]
        place = None
        if row.get(LENGTH):
            place = Place(row[START], row[LENGTH], Identity(row[FILE_SIZE], row[FILE_TIME]))
        return {**(row[IMAGE] or {}), "place": place}

    def name(self, index: int) -> str:
        """The image's file name, or its row."""
        return name_of(self.entry(index), index)

    @property
    def digests(self) -> list[str]:
        """Of the bytes of each image, 16 hex digits."""
        if DIGEST in self.table.column_names:
            return list(self.table[DIGEST])
        return [digest_of_bytes(content_of(row[IMAGE])) for row in map(dict, self.table.select_columns([IMAGE]))]

    def select(self, rows: Sequence[int]) -> "CaptionedImages":
        """Only the images of these rows, in this order."""
        originals = None if self.originals is None else self.originals[np.asarray(rows, dtype=np.int64)]
        table = self.table.select(rows)
        return CaptionedImages(table, self.config, self.channels, self.seed, originals, self.layout, self.notes)

    def image(self, index: int) -> Image.Image:
        """The decoded image, not yet resized and cropped; OSError, with its name, if it cannot be read any more."""
        try:
            return decode(self.entry(index))
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

    @property
    def sizes(self) -> list[Shape]:
        """Height and width of each image itself."""
        assert self.originals is not None
        return [(height, width) for height, width in self.originals.tolist()]

    def shape(self, index: int) -> Shape:
        """Height and width of an image as it is trained on."""
        if self.originals is None:
            return self.layout.shapes[0]
        height, width = self.originals[index].tolist()
        return nearest_shape((height, width), self.layout.shapes)

    def by_shape(self) -> Sequence[Sequence[int]]:
        """The images of each shape, in order."""
        if len(self.layout.shapes) == 1:
            return [range(len(self))]
        assert self.originals is not None
        distinct, which = np.unique(self.originals, axis=0, return_inverse=True)
        shapes = [nearest_shape((height, width), self.layout.shapes) for height, width in distinct.tolist()]
        place = np.array([self.layout.shapes.index(shape) for shape in shapes])[which.reshape(-1)]
        groups = (np.flatnonzero(place == number) for number in range(len(self.layout.shapes)))
        return [array("q", group.astype(np.int64).tobytes()) for group in groups if len(group)]

    def in_one_shape(self) -> "CaptionedImages":
        """The same images, all in the training size: with buckets that of the square one."""
        return CaptionedImages(self.table, self.config, self.channels, self.seed, self.originals)

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
    train, captions_needed = config.train, isinstance(config, UNetTrainingConfig)
    return open_images(config.data, vae.in_channels, train.seed, progress, captions_needed, multiple, train.batch_size)


def describe_images(images: CaptionedImages, held_out: CaptionedImages, batch_size: int) -> str:
    """Lines for the start of a run: what was found, how many images there are, their shapes, what is lost by these.

    batch_size: of a step, which may be more than there are.
    """
    lines = [*images.notes, f"{images_of(len(images), 'training')}, {len(held_out)} held out, {images.layout}"]
    if batch_size > len(images):
        lines.append(
            f"train.batch_size is {batch_size}, more than there are: a step sees some images several times; "
            f"{len(images)} would take less time"
        )
    if images.originals is not None:
        lines += report(images.config, images.sizes, images.layout, lambda index: printable(images.name(index)))
    return "\n".join(lines)


def open_images(
    config: DataConfig,
    channels: int,
    seed: int,
    progress: bool,
    captions_needed: bool = True,
    multiple: int = 1,
    batch_size: int = 1,
    watcher: Watcher = STRICT,
) -> tuple[CaptionedImages, CaptionedImages]:
    """The training images and the held-out ones (which may be none), in the shapes that suit the training images.

    captions_needed: refuse a source without captions. multiple, batch_size: of the shapes' sides in pixels, and images
    that each shape must have at least.
    Raises ValueError if the source is missing or has no images, a column is missing, a caption is missing (see
    data.missing_captions) or not text, no image is as large as `min_size`, or more than `max_unreadable` of the images
    cannot be read; fewer are skipped with one warning that names them. watcher: told what is refused; with one that
    collects problems, ValueError is raised only if there is no image at all.
    """

    def opened(source: str, split: str | None) -> CaptionedImages:
        with bars_of_datasets(progress):
            if source == COMPOSITIONS:  # drawn here, in the training size
                table = open_source(config, source, split, progress).table
                return CaptionedImages(table, config, channels, seed, np.tile(config.shape, (len(table), 1)))
            table, notes = indexed(config, source, split, progress, captions_needed, watcher)
        sizes = table.select_columns([HEIGHT, WIDTH]).with_format("numpy")[:]
        originals = np.stack([sizes[HEIGHT], sizes[WIDTH]], axis=1)
        images = CaptionedImages(table, config, channels, seed, originals, notes=notes)
        return _without_small(images, source, watcher)

    source = config.source
    images = _limited(opened(source, config.training_split), config.limit)
    notes = [*images.notes]
    if config.validation_source is not None or config.validation_split is not None:
        held_out = opened(config.validation_source or source, config.validation_split)
        notes += [f"held out: {note}" for note in held_out.notes]
        held_out = _limited(held_out, config.validation_limit)
    else:
        held = config.held_out_of(len(images))
        if held >= len(images):
            watcher.refuse(f"data.holdout is {config.holdout}, but {source!r} has only {images_of(len(images))}")
        order = _shuffled(len(images))
        held_out = images.select(sorted(order[:held]))
        images = images.select(sorted(order[held:]))
    shared = _shared(images, held_out)
    if shared and len(shared) == len(images):
        watcher.refuse(f"every image of {source!r} is also held out; validate on others")
    if shared:
        names = listed([printable(images.name(row)) for row in shared])
        notes.append(f"held out too, so not trained on: {images_of(len(shared))} ({names})")
        images = images.select(sorted({*range(len(images))} - {*shared}))
    images.notes = tuple(notes)
    shapes = [
        shape for shape, times in zip(images.sizes, images.repeats or repeat(1), strict=False) for _ in range(times)
    ]
    if len(images) == 0:  # refused above
        return images, held_out
    with watcher.reporting():
        images.layout = held_out.layout = choose_layout(config, shapes, multiple, batch_size)
    return images, held_out


def _limited(images: CaptionedImages, limit: int | None) -> CaptionedImages:
    return images if limit is None or limit >= len(images) else images.select(_shuffled(len(images))[:limit])


def _shuffled(n: int) -> list[int]:
    """A random order that does not depend on the run's seed: every run of both stages holds out the same images."""
    return torch.randperm(n, generator=generator(Stream.HOLDOUT)).tolist()


def _shared(images: CaptionedImages, held_out: CaptionedImages) -> list[int]:
    """The training images whose bytes are those of a held-out one; images drawn here have no file to share."""
    if len(held_out) == 0 or any(DIGEST not in one.table.column_names for one in (images, held_out)):
        return []
    known = set(held_out.digests)
    return [row for row, digest in enumerate(images.digests) if digest in known]


def _without_small(images: CaptionedImages, source: str, watcher: Watcher) -> CaptionedImages:
    """Drop images whose shorter side is below `min_size`, with a warning; ValueError if all are."""
    config, originals = images.config, images.originals
    if config.min_size is None:
        return images
    assert originals is not None
    shorter = originals.min(axis=1)
    small = np.flatnonzero(shorter < config.min_size)
    if not len(small):
        return images
    summary = f"{len(small)} of {len(images)} images of {source!r} have a side of less than {config.min_size} px"
    if len(small) == len(images):
        raise ValueError(
            f"{summary}; data.min_size must be at most {shorter.max()}, the longest of their shorter sides"
        )
    names = listed([printable(images.name(row)) for row in small.tolist()])
    watcher.warn(f"{summary} (data.min_size): {names}; skipped")
    return images.select(np.flatnonzero(shorter >= config.min_size).tolist())


def _as_list(captions: list[str] | str | None) -> list[str]:
    return (captions or [""]) if isinstance(captions, list) else [captions or ""]
