"""The captions of a folder's images in the forms that people keep them in, and of a table's rows.

Metadata files, text files beside the images, folder names, file names: `captions_of` says which of them a folder has.
"""

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from latentdiff.config import DataConfig
from latentdiff.data.file_tree import FileTree, suffix_of
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.printable import shortened, shown

METADATA_NAMES = ("metadata", "captions")
METADATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_file", "image_path", "image_name", "filepath", "path"),
    *("img", "name", "image_id", "id", "key"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "captions", "prompt", "prompts", "description", "sentence", "sentences", "raw", "title"),
    *("comment", "tags", "label"),
)
SIDECAR_KEYS = ("caption", "captions", "text", "prompt", "description")
# Folders of these names say nothing about what is on their images.
PLAIN_FOLDERS = {
    *("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"),
    *("images", "image", "imgs", "img", "data", "dataset", "photos", "pictures", "files"),
}
AN_OBJECT = 'must be an object such as {"file_name": "a.png", "text": "a cat"}'
MAX_REPEATS = 200  # in a folder name such as "10_cat"; "2024_holiday" is no number of repeats
_REPEATS = re.compile(r"(\d{1,3})_(.*\S.*)")
_NUMBER_AT_END = re.compile(r"[\s_-]*(\(\d+\)|\d+)$")


@dataclass
class Captioned:
    """Images by relative path, in the order of training, and what a folder says about each.

    texts: its captions, in order; none if it has none. columns: of its metadata, texts by path. repeats: how often an
    image comes in an epoch, where that is not once. forms: how many images have their captions from where.
    missing: files that metadata names and that are not there, with the place where.
    """

    images: list[str]
    texts: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    forms: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, texts: Sequence[str], form: str) -> None:
        """Add captions of an image; those that are blank or there already are not counted."""
        new = [text for text in dict.fromkeys(map(str.strip, texts)) if text]
        known = self.texts.setdefault(path, [])
        if new and not known:
            self.forms[form] += 1
        known.extend(text for text in new if text not in known)


def captions_of(tree: FileTree, split: str | None, config: DataConfig, watcher: Watcher = STRICT) -> Captioned:
    """The images of a folder or of its sub-folder `split`, with their captions in the form data.captions.

    "auto": metadata files first, then text files beside the images; if no image has either, the names of folders or
    files where they look like captions. Damaged files and a form that is not there are refused by the watcher.
    """
    images = tree.images(split)
    found = Captioned(images)
    wanted = "none" if config.constant_caption is not None else config.captions
    _read_metadata(tree, split, config, found, with_captions=wanted in ("auto", "column"), watcher=watcher)
    if wanted in ("auto", "sidecar"):
        _read_sidecars(tree, found, watcher)
    folders = _folder_captions(images)
    if wanted == "folder" or (wanted == "auto" and not any(found.texts.values()) and _are_classes(folders, images)):
        for path, (name, _) in folders.items():
            found.add(path, [name], "folder names")
    if len(folders) == len(images) and all(repeats for _, repeats in folders.values()):
        found.repeats = {path: repeats for path, (_, repeats) in folders.items() if repeats and repeats > 1}
    names = {path: file_caption(path) for path in images}
    if wanted == "file_name" or (wanted == "auto" and not any(found.texts.values()) and _are_captions(names)):
        for path, name in names.items():
            found.add(path, [name], "file names")
    return found


def sidecars_of(tree: FileTree, images: Sequence[str]) -> list[str]:
    """The relative paths of the files beside images that can hold their captions."""
    return [file for path in images for suffix in SIDECAR_SUFFIXES for file in _beside(tree, path, suffix)]


def read_text(value: object, place: Callable[[], str]) -> list[str]:
    """The captions in a value: a text, a list of texts, or None. place: where it stands, for the ValueError."""
    texts: list[str] = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            texts.append(one)
        elif one is not None:
            raise ValueError(f"{place()}: the caption is {shortened(one)}, not text")
    return texts


def caption_column(columns: Sequence[str], config: DataConfig, source: str) -> str | None:
    """The column of the captions: data.caption_column, or one that is named as such columns are; else None.

    Raises ValueError if data.caption_column is not there.
    """
    if config.caption_column is not None:
        if config.caption_column not in columns:
            raise ValueError(
                f"data.caption_column {config.caption_column!r} is not in {source}; its columns are: "
                + ", ".join(map(shown, columns))
            )
        return config.caption_column
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in CAPTION_COLUMNS if name in lower), None)


def file_caption(path: str) -> str:
    """A file's name as a caption: "red_apple-02.png" is "red apple", "02.png" is "02"."""
    stem = posixpath.splitext(posixpath.basename(path))[0]
    return " ".join(re.sub(r"[_-]", " ", _NUMBER_AT_END.sub("", stem) or stem).split())


# ----------------------------------------------------------------------------------------------------------------------
# Metadata files


@dataclass(frozen=True)
class _Row:
    values: Mapping[str, Any]
    place: str  # the file and line


def metadata_files(tree: FileTree) -> list[str]:
    """The relative paths of the files that list captions, such as metadata.jsonl and captions.csv."""
    names = {name + suffix for name in METADATA_NAMES for suffix in METADATA_SUFFIXES}
    return [path for path in tree.files if posixpath.basename(path).lower() in names]


def _read_metadata(
    tree: FileTree, split: str | None, config: DataConfig, found: Captioned, with_captions: bool, watcher: Watcher
) -> None:
    """Add what the metadata files say; the images that they name come first, in their order."""
    inside = "" if split is None else f"{split}/"
    names, order = _ImageNames(found.images), []
    without_captions = []
    for file in metadata_files(tree):
        folder = posixpath.dirname(file)
        entries = list(_rows(tree, file, watcher))
        if not entries:
            watcher.refuse(f"{tree.files[file]} is empty; write a line for each image, or delete it")
        rows = [row for row in entries if row is not None]
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row.values))

        image_of = partial(names.find, folder)
        column = _file_column(columns, rows, image_of)
        if column is None:
            watcher.refuse(
                f"{tree.files[file]} has no column file_name with the images' files; its columns are: "
                + ", ".join(map(shown, columns))
            )
            continue
        others = [one for one in columns if one != column]
        text = None
        with watcher.reporting():
            text = caption_column(others, config, tree.files[file]) if with_captions else None
        if text is None and with_captions:
            texts = [one for one in others if all(isinstance(row.values.get(one), str) for row in rows)]
            text = texts[0] if len(texts) == 1 else None
        if text is None and with_captions:
            without_captions.append(f"{tree.files[file]} (its columns are: {', '.join(map(shown, columns))})")
        for row in rows:
            name = row.values.get(column)
            path = image_of(name)
            if path is None:
                if not isinstance(name, str) or not name:
                    watcher.refuse(f"{row.place}: {column} is {shortened(name)}, not the name of a file")
                    continue
                relative = _joined(folder, name.replace("\\", "/"))
                if relative.startswith(inside) and relative not in tree.files:
                    found.missing.setdefault(relative, row.place)
                continue
            order.append(path)
            with watcher.reporting():
                captions = [] if text is None else read_text(row.values.get(text), lambda row=row: row.place)
                found.add(path, captions, posixpath.basename(file))
            for key in others:
                if key != text and isinstance(row.values.get(key), str):
                    found.columns.setdefault(key, {})[path] = row.values[key]
    if without_captions and config.captions == "column":
        watcher.refuse(f"no column of captions in {without_captions[0]}; name it with data.caption_column")
    found.images = list(dict.fromkeys([*order, *found.images]))


class _ImageNames:
    """Finds the image that a metadata file means."""

    def __init__(self, images: Sequence[str]) -> None:
        self.images = set(images)
        self.by_stem = {posixpath.splitext(path)[0]: path for path in reversed(images)}
        self.by_name: dict[str, list[str]] = {}
        for path in images:
            name = posixpath.basename(path)
            for one in {name, posixpath.splitext(name)[0]}:
                self.by_name.setdefault(one, []).append(path)

    def find(self, folder: str, name: object) -> str | None:
        """The relative path of the image of this name in a file in `folder`; None if there is none, or no one image.

        The name may be relative to the file or to the set, and without a suffix. kohya's scripts write the absolute
        paths of the machine that they ran on: of these the end must fit.
        """
        if not isinstance(name, str) or not name:
            return None
        name = name.replace("\\", "/")
        ends = [_joined(folder, name), _joined("", name)]
        absolute = name.startswith("/") or name[1:3] == ":/"
        if absolute:
            parts = name.split("/")
            ends += ["/".join(parts[first:]) for first in range(1, len(parts))]
        for path in ends:
            if path in self.images or path in self.by_stem:
                return path if path in self.images else self.by_stem[path]
        same = self.by_name.get(posixpath.basename(name), []) if absolute else []
        return same[0] if len(same) == 1 else None


def _joined(folder: str, name: str) -> str:
    """The relative path of a file that is named in a folder; "../" stays within the tree, as far as it can."""
    parts: list[str] = []
    for part in posixpath.join(folder, name).split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    return "/".join(parts)


def _file_column(columns: Sequence[str], rows: Sequence[_Row], image_of: Callable[[object], str | None]) -> str | None:
    """The column that names the images' files: one of FILE_COLUMNS, or whose values do."""
    lower = {column.lower(): column for column in reversed(columns)}
    named = [lower[name] for name in FILE_COLUMNS if name in lower]
    for column in [*named, *(one for one in columns if one not in named)]:
        if any(image_of(row.values.get(column)) for row in rows):
            return column
    return named[0] if named and named[0] in FILE_COLUMNS[:5] else None


def _rows(tree: FileTree, path: str, watcher: Watcher) -> Iterator[_Row | None]:
    """The rows of a metadata file, None where one is damaged; then the file and the line are refused."""
    where, kind = tree.files[path], suffix_of(path)
    try:
        text = tree.text(path)
    except ValueError as error:
        watcher.refuse(str(error))
        yield None
        return
    if kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{where}, line {number}"
                row = None
                with watcher.reporting():
                    row = _Row(_json_object(line, place), place)
                yield row
    elif kind == ".json":
        yield from _json_rows(text, where, watcher)
    else:
        yield from _csv_rows(tree, text, where, watcher)


def _json_object(line: str, place: str) -> dict[str, Any]:
    value = _json(line, place)
    if isinstance(value, list):
        raise ValueError(f"{place}: a list, must be one object {{...}} on each line")
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {shortened(value)}, {AN_OBJECT}")
    return value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: no valid JSON ({error})") from None


def _json_rows(text: str, where: str, watcher: Watcher) -> Iterator[_Row | None]:
    """A list of objects, or kohya's form: {"a.png": {"caption": ..., "tags": ...}} or {"a.png": "a caption"}."""
    value: Any = None
    try:
        value = _json(text, where) if text.strip() else []
        if not isinstance(value, list | dict):
            raise ValueError(f"{where}: {shortened(value)}, must be a list or an object")
    except ValueError as error:
        watcher.refuse(str(error))
        yield None
    if isinstance(value, list):
        for number, one in enumerate(value, 1):
            place = f"{where}, entry {number}"
            if isinstance(one, dict):
                yield _Row(one, place)
            else:
                watcher.refuse(f"{place}: {shortened(one)}, {AN_OBJECT}")
                yield None
    elif isinstance(value, dict):
        for name, one in value.items():
            place = f"{where}, {shown(name)}"
            if isinstance(one, str | list) or one is None:
                yield _Row({"file_name": name, "text": one}, place)
            elif isinstance(one, dict):
                row = {key: entry for key, entry in one.items() if key != "file_name"}
                if isinstance(row.get("caption"), str) and isinstance(row.get("tags"), str) and row["tags"]:
                    row["caption"] = f"{row['caption']}, {row['tags']}"  # as kohya's scripts train them
                yield _Row({"file_name": name, **row}, place)
            else:
                watcher.refuse(f"{place}: {shortened(one)}, must be a caption or an object with one")
                yield None


def _csv_rows(tree: FileTree, text: str, where: str, watcher: Watcher) -> Iterator[_Row | None]:
    """Rows of a table with commas, semicolons or tabs; without a first line of names, its columns are 1, 2, ..."""
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max("\t;,", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            place = f"{where}, line {reader.line_num}"
            if names is None:
                stems = {posixpath.basename(path) for path in tree.images()}
                if not any(posixpath.basename(cell) in stems for cell in cells):
                    names = [cell.strip() for cell in cells]
                    continue
                names = [str(number) for number in range(1, len(cells) + 1)]
            if len(cells) != len(names):
                watcher.refuse(
                    f"{place}: {len(cells)} values for the {len(names)} columns {', '.join(map(shown, names))}; put "
                    f"values with {'tabs' if delimiter == chr(9) else repr(delimiter)} in double quotes"
                )
                yield None
                continue
            yield _Row(dict(zip(names, cells, strict=True)), place)
    except csv.Error as error:
        watcher.refuse(f"{where}, line {reader.line_num}: {error}")
        yield None


# ----------------------------------------------------------------------------------------------------------------------
# Text files beside the images, names of folders and files


def _read_sidecars(tree: FileTree, found: Captioned, watcher: Watcher) -> None:
    """Add the captions of images that have none yet: of a.txt, a.caption or a.json beside a.png; a line, a caption."""
    for path in found.images:
        if found.texts.get(path):
            continue
        for suffix in SIDECAR_SUFFIXES:
            for file in _beside(tree, path, suffix)[:1]:
                with watcher.reporting():
                    texts = _json_captions(tree, file) if suffix == ".json" else tree.text(file).splitlines()
                    found.add(path, texts, f"{suffix} files")
            if found.texts.get(path):
                break


def _beside(tree: FileTree, image: str, suffix: str) -> list[str]:
    """The files a.txt and a.png.txt of a.png that are there."""
    endings = (suffix, suffix.upper())
    names = [stem + ending for stem in (posixpath.splitext(image)[0], image) for ending in endings]
    return [name for name in names if name in tree.files]


def _json_captions(tree: FileTree, file: str) -> list[str]:
    """The captions in an image's .json file; none if it is about something else."""
    value = _json(tree.text(file), tree.files[file])
    if not isinstance(value, dict):
        return []
    key = next((key for key in SIDECAR_KEYS if key in value), None)
    return [] if key is None else read_text(value[key], lambda: f"{tree.files[file]}, {key}")


def _folder_captions(images: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """For each image in a folder, its name as a caption and its repeats: of "10_red_cat" ("red cat", 10).

    Repeats are None in a folder without a number.
    """
    captions: dict[str, tuple[str, int | None]] = {}
    for path in images:
        folder = posixpath.basename(posixpath.dirname(path))
        if not folder or suffix_of(folder) in (".zip", ".tar"):
            continue
        numbered = _REPEATS.fullmatch(folder)
        if numbered and 1 <= int(numbered[1]) <= MAX_REPEATS:
            captions[path] = numbered[2].replace("_", " ").strip(), int(numbered[1])
        else:
            captions[path] = folder.replace("_", " ").strip(), None
    return captions


def _are_classes(folders: Mapping[str, tuple[str, int | None]], images: Sequence[str]) -> bool:
    """Whether all images are in folders whose names look like captions: words, of several kinds or with repeats."""
    names = {name for name, _ in folders.values()}
    words = all(re.search(r"[^\W\d_]{2}", name) for name in names)
    plain = all(name.lower() in PLAIN_FOLDERS for name in names)
    several = len(names) > 1 or all(repeats for _, repeats in folders.values())
    return len(folders) == len(images) and words and several and not plain


def _are_captions(names: Mapping[str, str]) -> bool:
    """Whether file names look like captions: nearly all of two words or more, and not all the same."""
    worded = [name for name in names.values() if len(re.findall(r"[^\W\d_]{2,}", name)) >= 2]
    return len(worded) >= 0.9 * len(names) and len(set(worded)) > 1
