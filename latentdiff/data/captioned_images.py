"""Captioned images of a data source -> pixels [3, H, W] in [-1, 1] and captions.

Images are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

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
from latentdiff.data.sources import IMAGE, REPEATS, TEXT, Source, bars_of_datasets, open_source
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.distributed import chunks
from latentdiff.images import ANIMATED, READ_ERRORS, View, content_of, decode, prepare, to_pixels
from latentdiff.models.pixel_space import PixelSpaceConfig
from latentdiff.printable import first_line, images_of, listed, printable
from latentdiff.randomness import Stream, generator

DIGEST = "digest"  # column: of the bytes of images that were read from files


class CaptionedImages(Dataset):
    """A table of captioned images, read one at a time, each brought to the nearest shape of a layout.

    The table has the columns IMAGE, TEXT and REPEATS of `latentdiff.data.sources`. channels: of the images, 1 to 4.
    originals: (height, width) of the images themselves, upright; needed with several shapes. layout: None: all have
    the training size. notes: what was found when the source was opened, in lines.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        config: DataConfig,
        channels: int,
        seed: int,
        originals: Sequence[Shape] | None = None,
        layout: Layout | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed
        self.originals = originals
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

    @cached_property
    def all_captions(self) -> list[list[str]]:
        """The captions of each image, one or more: the empty one where there is none."""
        if not self.captioned:
            return [[""]] * len(self)
        values = self.table[TEXT]
        return [(value or [""]) if isinstance(value, list) else [value or ""] for value in values]

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
        captions = self.all_captions[index]
        if len(captions) == 1 and not self.config.shuffle_caption:
            return captions[0]
        draws = generator(self.seed, Stream.CAPTION, epoch, index)
        caption = captions[int(torch.randint(len(captions), (), generator=draws))]
        if not self.config.shuffle_caption:
            return caption
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.config.keep_tokens], parts[self.config.keep_tokens :]
        return ", ".join([*kept, *(rest[i] for i in torch.randperm(len(rest), generator=draws).tolist())])

    @property
    def repeats(self) -> list[int] | None:
        """How often each image comes in an epoch; None if all come once."""
        return list(self.table[REPEATS]) if REPEATS in self.table.column_names else None

    def entry(self, index: int) -> dict[str, Any]:
        """The undecoded image: {"bytes", "path"}, one of which may be None."""
        return self.table[index][IMAGE] or {}

    def name(self, index: int) -> str:
        """The image's file name, or its row."""
        return _name(self.entry(index), index)

    @cached_property
    def digests(self) -> list[str]:
        """Of the bytes of each image, 16 hex digits."""
        if DIGEST in self.table.column_names:
            return list(self.table[DIGEST])
        return [digest_of_bytes(content_of(row[IMAGE])) for row in map(dict, self.table.select_columns([IMAGE]))]

    def select(self, rows: Sequence[int]) -> "CaptionedImages":
        """Only the images of these rows, in this order."""
        originals = None if self.originals is None else [self.originals[row] for row in rows]
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


def describe_images(images: CaptionedImages, held_out: CaptionedImages) -> str:
    """Lines for the start of a run: what was found, how many images there are, their shapes, what is lost by these."""
    lines = [*images.notes, f"{images_of(len(images), 'training')}, {len(held_out)} held out, {images.layout}"]
    if images.originals is not None:
        lines += report(images.config, images.originals, images.layout, lambda index: printable(images.name(index)))
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
            found = open_source(config, source, split, progress, captions_needed, watcher)
            return _usable(found, config, source, channels, seed, progress, watcher)

    source = config.source
    images = _limited(opened(source, config.training_split), config.limit)
    notes = [*images.notes]
    if config.validation_source is not None or config.validation_split is not None:
        held_out = opened(config.validation_source or source, config.validation_split)
        notes += [f"held out: {note}" for note in held_out.notes]
        held_out = _limited(held_out, config.validation_limit)
    else:
        if config.holdout >= len(images):
            watcher.refuse(f"data.holdout is {config.holdout}, but {source!r} has only {len(images)} images")
        order = _shuffled(len(images))
        held_out = images.select(sorted(order[: config.holdout]))
        images = images.select(sorted(order[config.holdout :]))
    shared = _shared(images, held_out)
    if shared and len(shared) == len(images):
        watcher.refuse(f"every image of {source!r} is also held out; validate on others")
    if shared:
        names = listed([printable(images.name(row)) for row in shared])
        notes.append(f"held out too, so not trained on: {images_of(len(shared))} ({names})")
        images = images.select(sorted({*range(len(images))} - {*shared}))
    images.notes = tuple(notes)
    assert images.originals is not None
    occurrences = images.repeats or [1] * len(images)
    shapes = [shape for shape, times in zip(images.originals, occurrences, strict=True) for _ in range(times)]
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


def _usable(
    opened: Source, config: DataConfig, source: str, channels: int, seed: int, progress: bool, watcher: Watcher
) -> CaptionedImages:
    """The usable images of an opened split; those read from files have the digest of their bytes as DIGEST."""
    if source == COMPOSITIONS:  # drawn here
        return CaptionedImages(opened.table, config, channels, seed, [config.shape] * len(opened.table))
    table, shapes = _checked(opened, config, source, progress, watcher)
    images = CaptionedImages(table, config, channels, seed, shapes, notes=opened.notes)
    return _without_small(images, source, watcher)


def _checked(
    opened: Source, config: DataConfig, source: str, progress: bool, watcher: Watcher
) -> tuple[datasets.Dataset, list[Shape]]:
    """Read every image once and drop those that cannot be decoded, with a warning; the shapes of the others."""
    table = opened.table
    animated: list[int] = []

    def check(row: int) -> tuple[str, Shape] | str:
        """The digest of an image's bytes and its shape, or why it cannot be read."""
        entry = table[row][IMAGE] or {}
        try:
            content = content_of(entry)
            image = decode({"bytes": content})
        except READ_ERRORS as error:
            return printable(f"{_name(entry, row)} ({first_line(error)})")
        if image.info.get(ANIMATED):
            animated.append(row)
        digest = digest_of_bytes(content)
        watcher.look(digest, content, image)
        return digest, (image.height, image.width)

    with ThreadPoolExecutor() as pool:
        rows = range(len(table))
        # Part by part: `map` makes an object for each item at once.
        checked = (one for part in chunks(rows, 4096) for one in pool.map(check, part))
        found = list(tqdm(checked, "check images", len(rows), disable=not progress, leave=False))
    if animated:
        names = listed([_name(table[row][IMAGE], row) for row in sorted(animated)])
        watcher.warn(
            f"{len(animated)} of {len(table)} images of {source!r} have several frames; the first one is used: {names}"
        )
    unreadable = [one for one in found if isinstance(one, str)]
    usable = [one for one in found if not isinstance(one, str)]
    problems = [*unreadable, *(printable(f"{name} (is not there)") for name in opened.absent)]
    if problems:
        watcher.unreadable(problems)
        count = len(table) + len(opened.absent)
        summary = f"{len(problems)} of {count} images of {source!r} are unreadable: {listed(problems)}"
        # One file is tolerated in a small set too.
        allowed = max(1, int(config.max_unreadable * count)) if config.max_unreadable else 0
        refusal = f"{summary}; data.max_unreadable is {config.max_unreadable}"
        if not usable:
            raise ValueError(refusal)
        if len(problems) > allowed:
            watcher.refuse(refusal)
        else:
            watcher.warn(f"{summary}; skipped")
    # Before rows are selected, when a column is added without copying the others.
    table = table.add_column(DIGEST, ["" if isinstance(one, str) else one[0] for one in found])
    if unreadable:
        table = table.select([row for row in rows if not isinstance(found[row], str)])
    return table, [shape for _, shape in usable]


def _without_small(images: CaptionedImages, source: str, watcher: Watcher) -> CaptionedImages:
    """Drop images whose shorter side is below `min_size`, with a warning; ValueError if all are."""
    config, originals = images.config, images.originals
    assert originals is not None
    if config.min_size is None:
        return images
    small = {row for row, shape in enumerate(originals) if min(shape) < config.min_size}
    if not small:
        return images
    summary = f"{len(small)} of {len(images)} images of {source!r} have a side of less than {config.min_size} px"
    if len(small) == len(images):
        raise ValueError(
            f"{summary}; data.min_size must be at most {max(map(min, originals))}, the longest of their shorter sides"
        )
    names = listed([printable(images.name(row)) for row in sorted(small)])
    watcher.warn(f"{summary} (data.min_size): {names}; skipped")
    return images.select([row for row in range(len(images)) if row not in small])


def digest_of_bytes(content: bytes) -> str:
    """16 hex digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _name(entry: Mapping[str, Any], row: int) -> str:
    return entry.get("path") or f"row {row}"
