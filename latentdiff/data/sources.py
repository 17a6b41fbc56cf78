"""Open a data source: embedded drawings, a folder of images, parquet files, or the id of a data set on the hub.

The result is a table with a column of undecoded images ({"bytes", "path"}) and one of captions.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from latentdiff.config import COMPOSITIONS, EMBEDDED, DataConfig
from latentdiff.data.compositions import SPLITS, CompositionSet, compositions, embedded_folder, render
from latentdiff.images import encode
from latentdiff.printable import first_line


def open_table(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
    """The images and captions of a split, undecoded. Raises ValueError as `open_images`."""
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
    return _with_text(table, config)


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
