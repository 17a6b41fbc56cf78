"""Captioned pictures from a folder, parquet files or a `datasets` id -> pixels [3, H, W] in [-1, 1] and captions.

Pictures are decoded and resized when they are read; nothing decoded is ever written to a cache.
"""

import io
import signal
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypedDict

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.training.randomness import Purpose, generator

EMBEDDED = "embedded"
PICTURE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Key(TypedDict):
    """Which picture, seen for the how-manieth time, at which place of which step's global batch."""

    index: int
    epoch: int
    step: int
    slot: int


class Batch(TypedDict, total=False):
    """A micro-batch: `pixels` [b, C, H, W] in [-1, 1] or, from a latent cache, `moments` [b, ..., h, w] and captions.

    These are `input_ids` [b, L] and, with a frozen text encoder, `context` [b, L, D].
    """

    pixels: Tensor
    moments: Tensor
    input_ids: Tensor
    context: Tensor
    index: list[int]  # which pictures
    step: int
    slots: list[int]  # places in the step's global batch


@dataclass(frozen=True)
class View:
    """How a picture is cut and turned: crop position in [0, 1] (x, y; 0.5 is the centre) and left-right flip."""

    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


class CaptionedPictures(Dataset):
    """A table of pictures, read one at a time. `channels` is the number of picture channels, 1 to 4."""

    def __init__(self, table: datasets.Dataset, config: DataConfig, channels: int, seed: int) -> None:
        self.table = table
        self.config = config
        self.channels = channels
        self.seed = seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> dict[str, Tensor | Key]:
        view = self.view(key["index"], key["epoch"])
        return {"pixels": self.pixels(key["index"], view), "key": key}

    @property
    def captions(self) -> list[str]:
        """One caption a picture; empty strings if the config names no caption column."""
        if self.config.caption_column is None:
            return [""] * len(self)
        return list(self.table[self.config.caption_column])

    def name(self, index: int) -> str:
        """The picture's file name, or its row."""
        return self.table[index][self.config.image_column].get("path") or f"row {index}"

    def image(self, index: int) -> Image.Image:
        """The decoded picture, not yet cut."""
        return decode(self.table[index][self.config.image_column])

    def view(self, index: int, epoch: int) -> View:
        """The crop and flip of a picture in an epoch: a function of (seed, epoch, index)."""
        if self.config.crop == "center" and not self.config.flip:
            return View()
        x, y, flip = torch.rand(3, generator=generator(self.seed, Purpose.CROP_FLIP, epoch, index)).tolist()
        return View((x, y) if self.config.crop == "random" else (0.5, 0.5), flip < self.config.flip)

    def pixels(self, index: int, view: View = View()) -> Tensor:  # noqa: B008 (View is immutable)
        """[C, size, size] float32 in [-1, 1]."""
        size = (self.config.size, self.config.size)
        picture = prepare(self.image(index), size, self.channels, self.config.background, view)
        return to_pixels(picture)

    def first(self, count: int) -> Tensor:
        """The first `count` pictures (or as many as there are), undistorted: [count, C, H, W]."""
        return torch.stack([self.pixels(i) for i in range(min(count, len(self)))])

    def some(self, count: int) -> "CaptionedPictures":
        """A fixed choice of `count` pictures (or as many as there are), drawn once."""
        chosen = sorted(_shuffled(len(self))[:count])
        return CaptionedPictures(self.table.select(chosen), self.config, self.channels, self.seed)

    def batches(self, batch_size: int, start: int = 0, step: int = 1) -> Iterator[tuple[list[int], Tensor]]:
        """All pictures in order, undistorted, as (indices, pixels [b, C, H, W]); every `step`-th batch from `start`."""
        for first in range(start * batch_size, len(self), step * batch_size):
            indices = list(range(first, min(first + batch_size, len(self))))
            yield indices, torch.stack([self.pixels(i) for i in indices])


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_pictures(
    config: DataConfig, channels: int, seed: int, progress: bool = True
) -> tuple[CaptionedPictures, CaptionedPictures]:
    """The training pictures and the held-out ones (which may be none).

    Raises ValueError if the source is missing or empty, a column is missing, a caption is not text, or more than
    `max_unreadable` of the pictures cannot be read; fewer are skipped with one warning that names them.
    """
    if config.validation_split is not None and Path(config.source).expanduser().is_file():
        raise ValueError(
            f"data.validation_split is {config.validation_split!r}, but {config.source!r} is one file, which has no "
            "splits; use data.holdout"
        )
    table = _load(config, config.split, progress)
    table = _without_unreadable(table, config, progress)
    if config.limit is not None and config.limit < len(table):
        table = table.select(_shuffled(len(table))[: config.limit])
    if config.validation_split is not None:
        held_out = _without_unreadable(_load(config, config.validation_split, progress), config, progress)
    else:
        if config.holdout >= len(table):
            raise ValueError(f"data.holdout is {config.holdout}, but {config.source!r} has only {len(table)} pictures")
        order = _shuffled(len(table))
        held_out = table.select(sorted(order[: config.holdout]))
        table = table.select(sorted(order[config.holdout :]))
    return CaptionedPictures(table, config, channels, seed), CaptionedPictures(held_out, config, channels, seed)


def _shuffled(n: int) -> list[int]:
    """A fixed order, not the run's seed: both stages and every run hold out the same pictures."""
    return torch.randperm(n, generator=generator(Purpose.HOLDOUT)).tolist()


def _load(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
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
    except (TypeError, ValueError, NotImplementedError):  # the last one is Arrow's
        kind = table.features[config.image_column]
        raise ValueError(f"data.image_column {config.image_column!r} holds {kind}, not pictures") from None
    return _with_text(table, config)


def _with_text(table: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Check that captions are text; class labels become their names."""
    column = config.caption_column
    if column is None:
        return table
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = [feature.int2str(label).replace("_", " ") for label in table[column]]
        return table.remove_columns(column).add_column(column, names)
    for row, caption in enumerate(table[column]):
        if not isinstance(caption, str):
            raise ValueError(f"data.caption_column {column!r}, row {row}: the caption is {caption!r}, not text")
    return table


def _open_source(source: str, split: str) -> datasets.Dataset:
    if source == EMBEDDED:
        path = Path(str(resources.files("latentdiff"))) / "assets" / "emoji"
    else:
        path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"data.source {source!r} is neither a .parquet file nor a folder")
    local = path.exists()
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".parquet"):
        raise ValueError(f"data.source {source!r} does not exist")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
        if local and not any(path.rglob("*.parquet")):
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        return datasets.load_dataset(str(path) if local else source, split=split)
    except (DatasetGenerationError, FileNotFoundError, HfHubHTTPError, ConnectionError, ValueError) as error:
        unreachable = not local and isinstance(error, FileNotFoundError | HfHubHTTPError | ConnectionError)
        problem = (
            " is neither a local path nor a dataset that could be reached on the hub"
            if unreachable
            else f", split {split!r}"
        )
        raise ValueError(f"data.source {source!r}{problem}: {_first_line(error.__cause__ or error)}") from None


@contextmanager
def _bars_of_datasets(shown: bool) -> Iterator[None]:
    """Whether `datasets` shows its own progress bars within the block: a switch of the whole process."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden_before:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_unreadable(table: datasets.Dataset, config: DataConfig, progress: bool) -> datasets.Dataset:
    """Read every picture once and leave out those that cannot be decoded."""

    def problem(row: int) -> str | None:
        entry = table[row][config.image_column] or {}
        try:
            decode(entry)
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
            return f"{entry.get('path') or f'row {row}'} ({_first_line(error)})"
        return None

    with ThreadPoolExecutor() as pool:
        rows = range(len(table))
        bar = tqdm(pool.map(problem, rows), "check pictures", len(rows), disable=not progress, leave=False)
        problems = {row: text for row, text in zip(rows, bar, strict=True) if text is not None}
    if not problems:
        return table
    named = ", ".join(list(problems.values())[:5]) + (", ..." if len(problems) > 5 else "")
    summary = f"{len(problems)} of {len(table)} pictures of {config.source!r} are unreadable: {named}"
    if len(problems) > config.max_unreadable * len(table):
        raise ValueError(f"{summary}; data.max_unreadable allows a share of {config.max_unreadable}")
    warnings.warn(f"{summary}; skipped", stacklevel=2)
    return table.select([row for row in rows if row not in problems])


# ----------------------------------------------------------------------------------------------------------------------
# Picture to pixels


def decode(entry: dict[str, bytes | str | None]) -> Image.Image:
    """A picture from its bytes or its path, fully read and upright (EXIF)."""
    source = io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else entry.get("path")
    if source is None:
        raise ValueError("no picture")
    with Image.open(source) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def prepare(
    image: Image.Image, size: tuple[int, int], channels: int, background: tuple[int, int, int], view: View
) -> Image.Image:
    """In the wanted mode, alpha laid over `background`, resized and cut to size (width, height), flipped."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values instead of scaling them
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data and channels in (1, 3):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    image = image.convert(PICTURE_MODES[channels])
    image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=view.crop)
    return ImageOps.mirror(image) if view.flip else image


def to_pixels(image: Image.Image) -> Tensor:
    """A picture of 1 to 4 channels, 0..255 -> [C, H, W] float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    values = values[..., None] if values.ndim == 2 else values
    return values.permute(2, 0, 1).float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, C, H, W] in [-1, 1] -> pictures: the inverse of `to_pixels`, values beyond the range are clamped."""
    values = ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    arrays = values.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


# ----------------------------------------------------------------------------------------------------------------------
# Order


@dataclass(frozen=True)
class BatchPlan:
    """How a step's global batch is shared out: `processes` x `accumulation` micro-batches of `micro` pictures."""

    batch_size: int
    micro: int
    processes: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro * self.processes):
            raise ValueError(
                f"train.batch_size {self.batch_size} is not divisible by train.micro_batch_size {self.micro} "
                f"x {self.processes} processes"
            )

    def __str__(self) -> str:
        return f"batch {self.batch_size} = {self.micro} x {self.processes} processes x {self.accumulation} accumulated"

    @property
    def accumulation(self) -> int:
        """Forward and backward passes of one process an optimiser step."""
        return self.batch_size // (self.micro * self.processes)


class StepBatches(Sampler[list[Key]]):
    """The keys of one process's micro-batches, step after step.

    Epoch e is the permutation given by (seed, e); the global batch of step s is the s-th stretch of `batch_size`
    pictures of the endless sequence of epochs. So every picture comes exactly once an epoch, whatever the number of
    processes, and a resumed run starts at `start_step` with no state.
    """

    def __init__(
        self,
        num_pictures: int,
        plan: BatchPlan,
        rank: int,
        seed: int,
        start_step: int,
        total_steps: int,
        repeat: int = 1,
    ) -> None:
        """ValueError for a batch of more than `repeat` times the pictures."""
        if plan.batch_size > repeat * num_pictures:
            raise ValueError(
                f"train.batch_size {plan.batch_size} is larger than the {num_pictures} training pictures"
                + (f" times data.repeat {repeat}" if repeat > 1 else "; use a smaller one, or data.repeat")
            )
        self.num_pictures = num_pictures
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start_step, self.total_steps):
            for turn in range(self.plan.accumulation):
                first = (turn * self.plan.processes + self.rank) * self.plan.micro
                keys = []
                for slot in range(first, first + self.plan.micro):
                    wanted, place = divmod(step * self.plan.batch_size + slot, self.num_pictures)
                    if wanted != epoch:
                        epoch, order = wanted, self.order(wanted)
                    keys.append(Key(index=order[place], epoch=epoch, step=step, slot=slot))
                yield keys

    def global_batch(self, step: int) -> list[int]:
        """The pictures of a step, over all processes, in the order of their slots."""
        places = range(step * self.plan.batch_size, (step + 1) * self.plan.batch_size)
        orders = {epoch: self.order(epoch) for epoch in {place // self.num_pictures for place in places}}
        return [orders[place // self.num_pictures][place % self.num_pictures] for place in places]

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        return torch.randperm(self.num_pictures, generator=generator(self.seed, Purpose.ORDER, epoch)).tolist()


def collate(items: Sequence[dict[str, Tensor | Key]]) -> Batch:
    """Items of one step, each a key and a tensor, to a micro-batch."""
    keys = [item["key"] for item in items]
    tensors = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "key"}
    return Batch(
        **tensors,
        index=[key["index"] for key in keys],
        step=keys[0]["step"],
        slots=[key["slot"] for key in keys],
    )


def loader(pictures: Dataset, batches: StepBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Micro-batches in order, decoded in this process or by workers."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_run,
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and pre-emption reach the workers too, but the run needs them to finish its step and save."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
