"""Captioned images from a folder, parquet files or a `datasets` id -> pixels [3, H, W] in [-1, 1] and captions.

Images are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from latentdiff.config import COMPOSITIONS, EMBEDDED, DataConfig
from latentdiff.data.batches import Item, Key
from latentdiff.data.compositions import SPLITS, CompositionSet, compositions, embedded_folder, render
from latentdiff.images import ANIMATED, READ_ERRORS, View, decode, encode, prepare, to_pixels
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
    table = _load(config, config.split, progress)
    table = _limited(table, config.limit)
    if config.validation_split is not None:
        held_out = _limited(_load(config, config.validation_split, progress), config.validation_limit)
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


def _load(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
    if config.source == COMPOSITIONS:
        return _composed(config, split, progress)
    with _bars_of_datasets(progress):
        table = _open_source(config.source, split)
    if len(table) == 0:
        raise ValueError(f"data.source {config.source!r}: split {split!r} is empty")
    for key, column in [("image_column", config.image_column), ("caption_column", config.caption_column)]:
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"data.{key} {column!r} is not in {config.source!r}; its columns are: {', '.join(table.column_names)}"
            )
    try:
        table = table.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):  # NotImplementedError is Arrow's
        kind = table.features[config.image_column]
        raise ValueError(f"data.image_column {config.image_column!r} holds {kind}, not images") from None
    return _without_unreadable(_with_text(table, config), config, progress)


def _with_text(table: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Check that captions are text; class labels become their names."""
    column = config.caption_column
    if column is None:
        return table
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = [feature.names[label].replace("_", " ") for label in table[column]]
        return table.remove_columns(column).add_column(column, names)
    for row, caption in enumerate(table[column]):
        if not isinstance(caption, str):
            raise ValueError(f"data.caption_column {column!r}, row {row}: the caption is {caption!r}, not text")
    return table


def _open_source(source: str, split: str) -> datasets.Dataset:
    path = embedded_folder() if source == EMBEDDED else Path(source).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"data.source {source!r} is neither a .parquet file nor a folder")
    local = path.exists()
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".parquet"):
        raise ValueError(f"data.source {source!r} does not exist")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
        if local and (tables := _parquet_files(path)):
            if split not in tables:
                raise ValueError(f"there is no such split, the .parquet files are of {', '.join(tables)}")
            return datasets.load_dataset("parquet", data_files={split: tables[split]}, split=split)
        if local:
            # The name is part of what `datasets` caches by; of the metadata it looks at the time of change alone.
            return datasets.load_dataset("imagefolder", name=_metadata_digest(path), data_dir=str(path), split=split)
        return datasets.load_dataset(source, split=split)
    except (DatasetGenerationError, FileNotFoundError, HfHubHTTPError, ConnectionError, ValueError) as error:
        unreachable = not local and isinstance(error, FileNotFoundError | HfHubHTTPError | ConnectionError)
        problem = (
            " is neither a local path nor a dataset that could be reached on the hub"
            if unreachable
            else f", split {split!r}"
        )
        raise ValueError(f"data.source {source!r}{problem}: {first_line(error.__cause__ or error)}") from None


SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """The .parquet files of a folder and its sub-folders by split; what a README.md beside them says is not read.

    A file's split is that of "train-00000-of-00002.parquet"; else a word in its path, as `datasets` knows them; else
    "train". Linked files are read, linked folders are not looked into.
    """
    splits: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        if shard := re.fullmatch(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*", file.stem):
            split = shard[1]
        else:
            words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
            split = next((name for name, known in SPLIT_WORDS.items() if not set(words).isdisjoint(known)), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _metadata_digest(folder: Path) -> str:
    """Of the contents of a folder's metadata files; ValueError for an empty one."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("metadata.*") if path.is_file()):
        content = file.read_bytes()
        if not content.strip():
            raise ValueError(f"{file} is empty; write a line for each image, or delete it")
        digest.update(f"{file.relative_to(folder)}\n".encode() + content)
    return digest.hexdigest()


def _composed(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
    """The compositional set of the config, drawn in memory at the training size."""
    if split not in SPLITS:
        raise ValueError(f"data.source {COMPOSITIONS!r} has no split {split!r}, its splits are: {', '.join(SPLITS)}")
    scenes = compositions(CompositionSet.of(config), split)
    bar = tqdm(scenes, f"draw {split} images", disable=not progress, leave=False)
    images = [{"bytes": encode(render(scene, config.size)), "path": f"{scene.prompt}.png"} for scene in bar]
    columns: dict[str, Sequence] = {config.image_column: images}
    if config.caption_column is not None:
        columns[config.caption_column] = [scene.caption for scene in scenes]
    return datasets.Dataset.from_dict(columns).cast_column(config.image_column, datasets.Image(decode=False))


@contextmanager
def _bars_of_datasets(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of `datasets` within the block; the switch is global."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden_before:
            datasets.enable_progress_bars()


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
