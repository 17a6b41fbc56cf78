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

from latentdiff.config import COMPOSITIONS, DataConfig
from latentdiff.data.batches import Item, Key
from latentdiff.data.sources import IMAGE, REPEATS, SHOWN, TEXT, Source, open_source
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.images import ANIMATED, READ_ERRORS, View, content_of, decode, prepare, to_pixels
from latentdiff.printable import first_line, printable
from latentdiff.randomness import Stream, generator

DIGEST = "digest"  # column: of the bytes of images that were read from files


class CaptionedImages(Dataset):
    """A table of captioned images, read one at a time. channels: of the images, 1 to 4.

    The table has the columns IMAGE, TEXT and REPEATS of `latentdiff.data.sources`. notes: what was found when it was
    opened, in lines.
    """

    def __init__(
        self, table: datasets.Dataset, config: DataConfig, channels: int, seed: int, notes: Sequence[str] = ()
    ) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed
        self.notes = tuple(notes)
        self.captioned = TEXT in table.column_names

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
        """Only these images, in this order."""
        return CaptionedImages(self.table.select(rows), self.config, self.channels, self.seed)

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
        return self.select(chosen)

    def batches(self, batch_size: int, start: int = 0, step: int = 1) -> Iterator[tuple[list[int], Tensor]]:
        """All images in order, undistorted, as (indices, pixels [b, C, H, W]); every `step`-th batch from `start`."""
        for first in range(start * batch_size, len(self), step * batch_size):
            indices = list(range(first, min(first + batch_size, len(self))))
            yield indices, torch.stack([self.pixels(i) for i in indices])


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_images(
    config: DataConfig,
    channels: int,
    seed: int,
    progress: bool,
    captions_needed: bool = True,
    watcher: Watcher = STRICT,
) -> tuple[CaptionedImages, CaptionedImages]:
    """The training images and the held-out ones (which may be none).

    captions_needed: refuse a source without captions. Raises ValueError if the source is missing or has no images, a
    column is missing, a caption is missing (see data.missing_captions) or not text, or more than `max_unreadable` of
    the images cannot be read; fewer are skipped with one warning that names them. watcher: told what is refused; with
    one that collects problems, ValueError is raised only if there is no image at all.
    """
    source = config.source
    table, notes = _opened(config, source, config.training_split, progress, captions_needed, watcher)
    table = _limited(table, config.limit)
    if config.validation_source is not None or config.validation_split is not None:
        other = config.validation_source or source
        held_out, more = _opened(config, other, config.validation_split, progress, captions_needed, watcher)
        held_out = _limited(held_out, config.validation_limit)
        notes += [f"held out: {note}" for note in more]
    else:
        if config.holdout >= len(table):
            watcher.refuse(f"data.holdout is {config.holdout}, but {source!r} has only {len(table)} images")
        order = _shuffled(len(table))
        held_out = table.select(sorted(order[: config.holdout]))
        table = table.select(sorted(order[config.holdout :]))
    table, shared = _without_shared(table, held_out)
    if shared:
        notes.append(f"{len(shared)} training images are held out too, so they are left out: {_named(shared)}")
        if len(table) == 0:
            watcher.refuse(f"every image of {source!r} is also held out; validate on others")
    images = CaptionedImages(table, config, channels, seed, notes)
    return images, CaptionedImages(held_out, config, channels, seed)


def _limited(table: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return table if limit is None or limit >= len(table) else table.select(_shuffled(len(table))[:limit])


def _shuffled(n: int) -> list[int]:
    """A random order that does not depend on the run's seed: every run of both stages holds out the same images."""
    return torch.randperm(n, generator=generator(Stream.HOLDOUT)).tolist()


def _without_shared(table: datasets.Dataset, held_out: datasets.Dataset) -> tuple[datasets.Dataset, list[str]]:
    """The training images whose bytes are not those of a held-out one, and the names of the others."""
    if len(held_out) == 0 or DIGEST not in table.column_names or DIGEST not in held_out.column_names:
        return table, []
    known = set(held_out[DIGEST])
    shared = [row for row, digest in enumerate(table[DIGEST]) if digest in known]
    if not shared:
        return table, []
    names = [_name(table[row][IMAGE], row) for row in shared]
    return table.select([row for row in range(len(table)) if row not in set(shared)]), names


def _opened(
    config: DataConfig, source: str, split: str | None, progress: bool, captions_needed: bool, watcher: Watcher
) -> tuple[datasets.Dataset, list[str]]:
    """The readable images of a split, with the digest of each one's bytes as DIGEST, and notes."""
    opened = open_source(config, source, split, progress, captions_needed, watcher)
    if source == COMPOSITIONS:  # drawn here
        return opened.table, opened.notes
    return _checked(opened, config, source, progress, watcher), opened.notes


def _checked(opened: Source, config: DataConfig, source: str, progress: bool, watcher: Watcher) -> datasets.Dataset:
    """Read every image once and drop those that cannot be decoded, with a warning."""
    table = opened.table
    animated: list[int] = []

    def check(row: int) -> tuple[str, str | None]:
        """The digest of an image's bytes, and why it cannot be read, if it cannot."""
        entry = table[row][IMAGE] or {}
        try:
            content = content_of(entry)
            image = decode({"bytes": content})
        except READ_ERRORS as error:
            return "", printable(f"{_name(entry, row)} ({first_line(error)})")
        if image.info.get(ANIMATED):
            animated.append(row)
        digest = digest_of_bytes(content)
        watcher.look(digest, content, image)
        return digest, None

    with ThreadPoolExecutor() as pool:
        rows = range(len(table))
        found = list(tqdm(pool.map(check, rows), "check images", len(rows), disable=not progress, leave=False))
    if animated:
        names = _named([_name(table[row][IMAGE], row) for row in sorted(animated)])
        watcher.warn(
            f"{len(animated)} of {len(table)} images of {source!r} have several frames; the first one is used: {names}"
        )
    table = table.add_column(DIGEST, [digest for digest, _ in found])
    unreadable = [text for _, text in found if text is not None]
    problems = [*unreadable, *(printable(f"{name} (is not there)") for name in opened.absent)]
    if not problems:
        return table
    watcher.unreadable(problems)
    count = len(table) + len(opened.absent)
    summary = f"{len(problems)} of {count} images of {source!r} are unreadable: {_named(problems)}"
    # One file is tolerated in a small set too.
    allowed = max(1, int(config.max_unreadable * count)) if config.max_unreadable else 0
    refusal = f"{summary}; data.max_unreadable is {config.max_unreadable}"
    if len(problems) == count:
        raise ValueError(refusal)
    if len(problems) > allowed:
        watcher.refuse(refusal)
    else:
        watcher.warn(f"{summary}; skipped")
    return table.select([row for row, (_, text) in enumerate(found) if text is None])


def digest_of_bytes(content: bytes) -> str:
    """16 hex digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _name(entry: Mapping[str, Any], row: int) -> str:
    return entry.get("path") or f"row {row}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
