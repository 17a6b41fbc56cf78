"""Open a data source: drawings of the package, a folder, an archive, parquet files, or a data set of `datasets`.

The result is a table: undecoded images ({"bytes", "path"}; a path is an address of `latentdiff.archives`), captions,
and the columns that the source has besides.
"""

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import ArrowException
from tqdm import tqdm

from latentdiff.archives import SUFFIXES, is_archive
from latentdiff.config import COMPOSITIONS, EMBEDDED, DataConfig
from latentdiff.data.captions import Captioned, caption_column, captions_of, metadata_files, read_text, sidecars_of
from latentdiff.data.compositions import SPLITS, CompositionSet, compositions, embedded_folder, render
from latentdiff.data.file_tree import FileTree, by_suffix, walk
from latentdiff.data.streaming import streamed
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.images import encode
from latentdiff.printable import cut, first_line, images_of, listed, shown

IMAGE, TEXT, REPEATS = "image", "text", "repeats"  # columns of every table; TEXT only with captions
SHOWN = 5  # names in a message
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
FORMS = (
    "A caption can be in metadata.jsonl, metadata.csv or captions.csv, in a .txt or .caption file of the image's name, "
    "or be the name of the folder (data.captions=folder) or the file (data.captions=file_name). Without captions: "
    "data.captions=none; one for all images: data.constant_caption=TEXT"
)


@dataclass(frozen=True)
class Source:
    """An opened split.

    table: columns IMAGE, TEXT (a text or a list of texts; not if there are no captions), REPEATS (only if an image
    occurs more often than once per epoch) and the source's own. notes: what was found, in lines.
    absent: files that metadata names and that are not there, with the place where. dropped: rows that
    data.missing_captions leaves out. in_table: whether the images are in a table of `datasets`, not in files.
    """

    table: datasets.Dataset
    notes: list[str]
    absent: Sequence[str] = ()
    dropped: Sequence[int] = ()
    in_table: bool = False


def open_source(
    config: DataConfig,
    source: str,
    split: str | None,
    progress: bool,
    captions_needed: bool = True,
    watcher: Watcher = STRICT,
) -> Source:
    """The images and captions of a split, undecoded; split None: all of a folder, "train" of what has splits.

    captions_needed: refuse a source without captions. watcher: told what is refused. Raises ValueError as
    `open_images`, with any watcher if there is nothing to open.
    """
    if source == COMPOSITIONS:
        return Source(_composed(config, split or SPLITS[0], progress), [])
    if source == EMBEDDED:
        tree = FileTree.of_folder(source, embedded_folder())
        return Source(_folder(tree, split, config, captions_needed, watcher).table, [])
    if config.stream_to is not None and source == config.source:
        return _streamed(source, split or "train", config, progress, captions_needed, watcher)
    paths = _paths(source)
    if all(is_archive(path) for path in paths):
        return _folder(FileTree.of_archives(source, paths), split, config, captions_needed, watcher)
    (first, *others) = paths
    if first.is_dir() and not others and not is_table(first):
        return _folder(FileTree.of_folder(source, first), split, config, captions_needed, watcher)
    table, names = _table(source, paths, split)
    return _columns(table, names, source, config, captions_needed, watcher)


def _paths(source: str) -> list[Path]:
    """The files of a pattern, or the one path, which need not be there."""
    found = [Path(path) for path in sorted(glob.glob(source))] if glob.has_magic(source) else []
    return found or [Path(source).expanduser()]


def files_of(config: DataConfig, source: str, split: str | None, progress: bool) -> Iterable[str] | None:
    """All files that `open_source` depends on; None if these are not known. A set that is streamed is so first."""
    if source in (COMPOSITIONS, EMBEDDED):
        return None
    if config.stream_to is not None and source == config.source:
        return map(str, _shards(source, split or "train", config, progress))
    paths = _paths(source)
    if paths[0].exists():
        return (file for path in paths for file in (walk(path) if path.is_dir() else [str(path)]))
    table, _ = _table(source, paths, split)  # of the hub
    return (file["filename"] for file in table.cache_files)


def images_only(config: DataConfig, source: str, split: str | None) -> datasets.Dataset:
    """The undecoded images of a source that is a table."""
    table, _ = _table(source, _paths(source), split)
    column = _image_column(table, source, config)
    return _with_images(table.select_columns([column]), column)


def _streamed(
    source: str, split: str, config: DataConfig, progress: bool, captions_needed: bool, watcher: Watcher
) -> Source:
    """The shards that are kept of a streamed source; their captions are in files beside the images."""
    shards = _shards(source, split, config, progress)
    own = {"image_column": None, "caption_column": None}
    own |= {} if config.captions == "none" else {"captions": "auto"}
    return _folder(FileTree.of_archives(source, shards), None, config.model_copy(update=own), captions_needed, watcher)


def _shards(source: str, split: str, config: DataConfig, progress: bool) -> list[Path]:
    path = Path(source).expanduser()
    if path.exists() and path.suffix != ".parquet":
        raise ValueError(f"data.stream_to is for data sets of the hub, but data.source {source!r} is a local one")
    return sorted(streamed(source, split, config, progress).glob("*.tar"))


# ----------------------------------------------------------------------------------------------------------------------
# Folders and archives


def _folder(tree: FileTree, split: str | None, config: DataConfig, captions_needed: bool, watcher: Watcher) -> Source:
    if not tree.images(split):
        raise ValueError(_no_images(tree, split))
    if config.image_column not in (None, IMAGE):
        watcher.refuse(f"data.image_column is {config.image_column!r}, but {tree.source!r} holds files, not columns")
    found = captions_of(tree, split, config, watcher)
    images = found.images
    columns: dict[str, Sequence[Any]] = {IMAGE: [{"bytes": None, "path": tree.files[path]} for path in images]}
    for name, values in found.columns.items():
        if name not in (IMAGE, TEXT, REPEATS):
            columns[name] = [values.get(path) for path in images]
    if found.repeats:
        columns[REPEATS] = [found.repeats.get(path, 1) for path in images]
    table = datasets.Dataset.from_dict(columns, features=_features(columns))
    captions = _Captions([found.texts.get(path, []) for path in images], lambda row: images[row], found.forms)
    opened = _with_captions(table, captions, tree.source, config, captions_needed, watcher)
    absent = [f"{path} ({place})" for path, place in found.missing.items()]
    return replace(opened, notes=[*_folder_notes(tree, split, found), *opened.notes], absent=absent)


def _features(columns: dict[str, Sequence[Any]]) -> datasets.Features:
    kinds: dict[str, Any] = dict.fromkeys(columns, datasets.Value("string"))
    kinds[IMAGE] = datasets.Image(decode=False)
    if REPEATS in columns:
        kinds[REPEATS] = datasets.Value("int64")
    return datasets.Features(kinds)


def _no_images(tree: FileTree, split: str | None) -> str:
    if split is not None and tree.images():
        folders = ", ".join(map(shown, tree.folders())) or "none"
        return (
            f"data.source {tree.source!r} has no folder {split!r} with images, its folders with images are: {folders}"
        )
    files = f"; its files are {by_suffix(tree.files)}" if tree.files else ", it is empty"
    return f"data.source {tree.source!r} has no images{files}"


def _folder_notes(tree: FileTree, split: str | None, found: Captioned) -> list[str]:
    images = found.images
    place = tree.source if split is None else f"{tree.source}, {split}"
    notes = [f"{place}: {images_of(len(images))} ({by_suffix(images)})"]
    used = {*tree.images(), *metadata_files(tree), *sidecars_of(tree, images)}
    inside = "" if split is None else f"{split}/"
    others = [path for path in tree.files if path not in used and path.startswith(inside) and not _is_about(path)]
    if others:
        notes.append(f"not read: {by_suffix(others)} ({listed([*map(shown, others)], SHOWN)})")
    words = {word for known in SPLIT_WORDS.values() for word in known}
    splits = [name for name in tree.folders() if name.lower() in words]
    if split is None and len(splits) > 1:
        notes.append(
            f"the folders {', '.join(splits)} are read as one set; data.split and data.validation_split keep them apart"
        )
    if found.repeats:
        folders = {str(Path(path).parent.name): count for path, count in found.repeats.items()}
        named = listed([f"{shown(name)} {count}" for name, count in folders.items()], SHOWN)
        notes.append(f"times per epoch, from the folders' names: {named}")
    return notes


def _is_about(path: str) -> bool:
    """Whether a file is the usual company of a data set, not a part of it."""
    return Path(path).stem.lower().split("-")[0] in ("readme", "license", "licence", "attribution", "notice")


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def is_table(folder: Path) -> bool:
    """Whether a folder is of `Dataset.save_to_disk`, or of parquet files that hold images."""
    return _is_saved(folder) or any(_holds_images(path) for path in folder.rglob("*.parquet") if path.is_file())


def _is_saved(folder: Path) -> bool:
    """Whether a folder is of `Dataset.save_to_disk`, with splits or without."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _holds_images(path: Path) -> bool:
    """Whether a column of a parquet file can be images; true for a damaged one, which opening it then reports."""
    try:
        kinds = pyarrow.parquet.read_schema(path).types
    except (ArrowException, OSError):
        return True
    return any(map(_can_be_images, kinds))


def _can_be_images(kind: pyarrow.DataType) -> bool:
    """Whether a column's values are bytes, or have a field of that name."""
    types = pyarrow.types
    is_binary = types.is_binary(kind) or types.is_large_binary(kind)
    return is_binary or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _table(source: str, paths: Sequence[Path], split: str | None) -> tuple[datasets.Dataset, Callable[[int], str]]:
    """A table of `datasets`, and what its rows are called in messages."""
    path, local = paths[0], paths[0].exists()
    if path.is_file() and any(one.suffix != ".parquet" for one in paths):
        kinds = ", ".join((*SUFFIXES, ".parquet"))
        raise ValueError(f"data.source {source!r} is neither a folder nor a file of one of these kinds: {kinds}")
    if not local and (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or path.suffix in (*SUFFIXES, ".parquet")
        or glob.has_magic(source)
    ):
        raise ValueError(f"data.source {source!r} does not exist")
    if path.is_file() and split is not None:
        raise ValueError(f"{split!r} is asked for, but data.source {source!r} has no splits")
    try:
        if path.is_file():
            return _parquet([str(one) for one in paths])
        if _is_saved(path):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                saved = saved[_choose(split, [str(name) for name in saved])]
            elif split is not None:
                raise ValueError("it was saved without splits")
            return saved, lambda row: f"row {row}"
        if local:
            files = _parquet_files(path)
            return _parquet(files[_choose(split, list(files))])
        return datasets.load_dataset(source, split=split or "train"), lambda row: f"row {row}"
    except (DatasetGenerationError, ArrowException, OSError, HfHubHTTPError, ValueError) as error:
        unreachable = not local and isinstance(error, FileNotFoundError | HfHubHTTPError | ConnectionError)
        problem = " is neither a local path nor a dataset that could be reached on the hub" if unreachable else ""
        chosen = f", split {split!r}" if split is not None and not unreachable else ""
        raise ValueError(f"data.source {source!r}{problem}{chosen}: {first_line(error.__cause__ or error)}") from None


def _choose(split: str | None, splits: Sequence[str]) -> str:
    """The split that was asked for, or else "train" or the only one."""
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split or "train"
    if wanted not in splits:
        raise ValueError(f"there is no split {wanted!r}, its splits are: {', '.join(splits)}")
    return wanted


def _parquet(files: Sequence[str]) -> tuple[datasets.Dataset, Callable[[int], str]]:
    for file in files:
        try:
            pyarrow.parquet.read_schema(file)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file}: {first_line(error)}") from None
    table = datasets.load_dataset("parquet", data_files={"train": list(files)}, split="train")

    def name(row: int) -> str:
        for file in files:
            count = pyarrow.parquet.read_metadata(file).num_rows
            if row < count:
                return f"{file}, row {row}"
            row -= count
        raise AssertionError("rows are those of the files")

    return table, name


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


def _columns(
    table: datasets.Dataset,
    names: Callable[[int], str],
    source: str,
    config: DataConfig,
    captions_needed: bool,
    watcher: Watcher,
) -> Source:
    """The table with its image column as IMAGE and its captions as TEXT."""
    if len(table) == 0:
        raise ValueError(f"data.source {source!r} is empty")
    column = _image_column(table, source, config)
    if config.captions not in ("auto", "column", "none"):
        watcher.refuse(f"data.captions is {config.captions!r}, but {source!r} is a table; use column or none")
    others = [name for name in table.column_names if name != column]
    own_captions = config.captions != "none" and config.constant_caption is None
    text = None
    with watcher.reporting():
        text = caption_column(others, config, repr(source)) if own_captions else None
    texts: list[list[str]] = [[] for _ in range(len(table))]
    forms: dict[str, int] = {}
    if text is not None:
        texts = _texts(table, text, names, watcher)
        forms = {f"the column {text!r}": sum(bool(one) for one in texts)}
    table = table.remove_columns([name for name in {IMAGE, TEXT, REPEATS, text} - {None, column} if name in others])
    table = _with_images(table, column)
    found = _with_captions(table, _Captions(texts, names, forms), source, config, captions_needed, watcher, others)
    return replace(found, notes=[f"{source}: {images_of(len(table))}", *found.notes], in_table=True)


def _with_images(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """The table with this column as undecoded images of the name IMAGE."""
    table = table if column == IMAGE else table.rename_column(column, IMAGE)
    try:
        return table.cast_column(IMAGE, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, ArrowException):  # NotImplementedError is Arrow's
        kind = table.features[IMAGE]
        raise ValueError(f"data.image_column {column!r} holds {kind}, not images") from None


def _image_column(table: datasets.Dataset, source: str, config: DataConfig) -> str:
    """data.image_column, or the column that holds images, named "image" if there are several."""
    names = ", ".join(map(shown, table.column_names))
    if config.image_column is not None:
        if config.image_column not in table.column_names:
            raise ValueError(
                f"data.image_column {config.image_column!r} is not in {source!r}; its columns are: {names}"
            )
        return config.image_column
    found = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not found:
        kinds = table.data.schema
        found = [name for name in table.column_names if _can_be_images(kinds.field(name).type)]
    if len(found) > 1 and IMAGE in found:
        return IMAGE
    if len(found) != 1:
        which = f"has several columns of images: {', '.join(found)}" if found else f"has no column of images: {names}"
        raise ValueError(f"data.source {source!r} {which}; name one with data.image_column")
    return found[0]


def _texts(table: datasets.Dataset, column: str, names: Callable[[int], str], watcher: Watcher) -> list[list[str]]:
    """The captions of each row; class labels become their names."""
    feature = table.features[column]
    values = table[column]
    if isinstance(feature, datasets.ClassLabel):
        labels = feature.names
        known = [label is not None and 0 <= label < len(labels) for label in values]
        for row, label in enumerate(values):
            if label is not None and not known[row]:
                watcher.refuse(f"{names(row)}: {column} is {label}, must be in 0 .. {len(labels) - 1}")
        return [[labels[values[row]].replace("_", " ")] if named else [] for row, named in enumerate(known)]
    texts: list[list[str]] = [[] for _ in values]
    for row, value in enumerate(values):
        with watcher.reporting():
            own = read_text(value, lambda row=row: f"{names(row)}: column {column!r}")
            texts[row] = [text for text in own if text.strip()]
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@dataclass(frozen=True)
class _Captions:
    texts: list[list[str]]  # of each row, none if it has none
    name: Callable[[int], str]  # of a row, for messages
    forms: dict[str, int]  # where they are from -> how many images


def _with_captions(
    table: datasets.Dataset,
    captions: _Captions,
    source: str,
    config: DataConfig,
    needed: bool,
    watcher: Watcher,
    columns: Sequence[str] = (),
) -> Source:
    """The table with its captions, without the rows that data.missing_captions drops."""
    if config.captions == "none":
        return Source(table, ["captions: none (data.captions)"])
    if config.constant_caption is not None:
        text = config.constant_caption
        return Source(table.add_column(TEXT, [text] * len(table)), [f"captions: all {shown(text)}"])
    texts, count = captions.texts, len(table)
    missing = [row for row, own in enumerate(texts) if not own]
    if len(missing) == count:
        if needed:
            choice = f"; its columns are: {', '.join(map(shown, columns))} (data.caption_column names one)"
            watcher.refuse(f"no image of data.source {source!r} has a caption{choice if columns else ''}. {FORMS}")
        return Source(table, ["captions: none found"])
    # One name more than is shown says that there are more; to find a row's file takes time.
    named = listed([shown(captions.name(row)) for row in missing[: SHOWN + 1]], SHOWN)
    refused = bool(missing) and config.missing_captions == "refuse" and needed
    if refused:
        watcher.refuse(
            f"{len(missing)} of {count} images of data.source {source!r} have no caption: {named}; "
            "data.missing_captions=drop leaves them out, empty trains them without"
        )
    example = next(own[0] for own in texts if own)
    found = ", ".join(f"{number} from {form}" for form, number in captions.forms.items())
    notes = [f"captions: {found}, such as {shown(cut(example, 80))}"]
    several = sum(len(own) > 1 for own in texts)
    if several:
        notes.append(f"several captions: {images_of(several)}, of which each epoch draws one")
    if missing and not refused:
        done = "left out" if config.missing_captions == "drop" else "trained with the empty caption"
        notes.append(f"without a caption, {done}: {images_of(len(missing))} ({named})")
    values = texts if several else [own[0] if own else "" for own in texts]
    table = table.add_column(TEXT, values)
    return Source(table, notes, dropped=missing if config.missing_captions == "drop" else ())


# ----------------------------------------------------------------------------------------------------------------------
# Drawn sets


def _composed(config: DataConfig, split: str, progress: bool) -> datasets.Dataset:
    """The compositional set of the config, drawn in memory at the training size."""
    if split not in SPLITS:
        raise ValueError(f"data.source {COMPOSITIONS!r} has no split {split!r}, its splits are: {', '.join(SPLITS)}")
    scenes = compositions(CompositionSet.of(config), split)
    bar = tqdm(scenes, f"draw {split} images", disable=not progress, leave=False)
    images = [{"bytes": encode(render(scene, config.shape[0])), "path": f"{scene.prompt}.png"} for scene in bar]
    columns: dict[str, Sequence] = {IMAGE: images}
    if config.captions != "none":
        columns[TEXT] = [scene.caption for scene in scenes]
    return datasets.Dataset.from_dict(columns).cast_column(IMAGE, datasets.Image(decode=False))


@contextmanager
def bars_of_datasets(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of `datasets` within the block; the switch is global."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden_before:
            datasets.enable_progress_bars()
