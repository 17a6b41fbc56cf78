"""What a data source holds, read once: which images can be read, their digests and shapes, their captions.

This is kept in the cache of `datasets`, and the next start reads only what is new or has changed. A file is taken for
unchanged if its size and its time of modification are. The kept index is mapped into memory: however many images it
lists, it takes none itself.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import datasets
import numpy as np
import pyarrow
from datasets import config as datasets_config
from pyarrow import ArrowException
from tqdm import tqdm

from latentdiff.archives import file_of, identity, place_of
from latentdiff.config import DataConfig
from latentdiff.data.sources import IMAGE, Source, files_of, images_only, open_source
from latentdiff.data.watcher import STRICT, Watcher
from latentdiff.distributed import chunks
from latentdiff.formats.files import read_json, replacing, write_json
from latentdiff.formats.locks import holding_file
from latentdiff.images import ANIMATED, READ_ERRORS, content_of, decode
from latentdiff.printable import first_line, listed, printable

FORMAT_VERSION = 1  # raise it when the same files give another index
RECORD = "index.json"
ROWS = 4096  # at a time
# Columns that are added to the source's own.
DIGEST = "latentdiff.digest"  # of an image's bytes
HEIGHT, WIDTH = "latentdiff.height", "latentdiff.width"  # upright
START, LENGTH = "latentdiff.start", "latentdiff.length"  # of an image's bytes in its tar file; length 0: it is in none
FILE_SIZE, FILE_TIME = "latentdiff.file_size", "latentdiff.file_time"  # of the file, or archive, that an image is in
FOUND = (DIGEST, HEIGHT, WIDTH, "latentdiff.several_frames", START, LENGTH, FILE_SIZE, FILE_TIME)  # Found's fields
USED = "latentdiff.used"
# Two writes within one tick of a file system's clock look alike: only files this much older than an index are known.
SETTLED = 2 * 10**9  # nanoseconds
# The keys of DataConfig that an index depends on.
KEYS = (
    *("captions", "caption_column", "constant_caption", "missing_captions", "image_column", "max_unreadable"),
    "stream_to",
)


class Found(NamedTuple):
    """What reading an image's file gave, and the size and time of the file, 0 where there is none."""

    digest: str
    height: int
    width: int
    several_frames: bool
    start: int
    length: int
    file_size: int
    file_time: int  # nanoseconds since 1970


class Indexed(NamedTuple):
    """The usable images of a split, with the columns above; notes: what was found, in lines."""

    table: datasets.Dataset
    notes: list[str]


def indexed(
    config: DataConfig,
    source: str,
    split: str | None,
    progress: bool,
    captions_needed: bool = True,
    watcher: Watcher = STRICT,
) -> Indexed:
    """The usable images of a split; the parameters and errors are those of `open_source` and `open_images`.

    Of several processes one reads the images and the others wait. A watcher that collects problems sees every image.
    """

    files = files_of(config, source, split, progress) if watcher is STRICT else None
    index = None if files is None else _Index.of(config, source, split, captions_needed, files)
    if index is None:
        return _read(config, source, split, progress, captions_needed, watcher, None)
    while True:
        if (known := index.load(config, source, split, watcher)) is not None:
            return known
        with holding_file(index.folder / ".lock") as held:
            if held:  # another process may have made it in the meantime
                known = index.load(config, source, split, watcher)
                return known or _read(config, source, split, progress, captions_needed, watcher, index)
        time.sleep(0.2)


def digest_of_bytes(content: bytes) -> str:
    """16 hex digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def name_of(entry: Mapping[str, Any], row: int) -> str:
    """The path of an undecoded image, or its row."""
    return entry.get("path") or f"row {row}"


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def _read(
    config: DataConfig,
    source: str,
    split: str | None,
    progress: bool,
    captions_needed: bool,
    watcher: Watcher,
    index: "_Index | None",
) -> Indexed:
    """Read every image that the index does not know, drop those that cannot be decoded, and keep the new index."""
    started, told = time.time_ns(), _Recording(watcher)
    opened = open_source(config, source, split, progress, captions_needed, told)
    table, dropped = opened.table, set(opened.dropped)
    known = {} if index is None else index.known()

    def check(row: int) -> Found | str:
        """What is in an image's file, or why it cannot be read."""
        entry = table[row][IMAGE] or {}
        path = entry.get("path") if entry.get("bytes") is None else None
        file = (0, 0)
        try:
            if path is not None:
                file = identity(file_of(path))
                if path in known and known[path][-2:] == file:
                    return known[path]
            content = content_of(entry)
            image = decode({"bytes": content})
            place = None if path is None else place_of(path)
        except READ_ERRORS as error:
            return printable(f"{name_of(entry, row)} ({first_line(error)})")
        digest = digest_of_bytes(content)
        told.look(digest, content, image)
        return Found(digest, image.height, image.width, bool(image.info.get(ANIMATED)), *(place or (0, 0))[:2], *file)

    rows = [row for row in range(len(table)) if row not in dropped]
    with ThreadPoolExecutor() as pool:
        # Part by part: `map` makes an object for each item at once.
        checked = (one for part in chunks(rows, ROWS) for one in pool.map(check, part))
        found = dict(
            zip(rows, tqdm(checked, "check images", len(rows), disable=not progress, leave=False), strict=True)
        )
    usable = {row: one for row, one in found.items() if isinstance(one, Found)}
    if animated := [row for row, one in usable.items() if one.several_frames]:
        names = listed([name_of(table[row][IMAGE], row) for row in animated])
        told.warn(
            f"{len(animated)} of {len(rows)} images of {source!r} have several frames; the first one is used: {names}"
        )
    problems = [one for one in found.values() if isinstance(one, str)]
    problems += [printable(f"{name} (is not there)") for name in opened.absent]
    if problems:
        _tell(problems, len(rows) + len(opened.absent), bool(usable), config, source, told)
    columns = _columns([usable.get(row) for row in range(len(table))])
    # All at once, before rows are selected: otherwise each column copies the others.
    table = datasets.concatenate_datasets([table, columns], axis=1)
    if index is not None:
        # What is wrong with a file can be mended, or with the network that it is on; not in a table's row.
        again = bool(problems) and not opened.in_table
        table = index.keep(table, opened, told.warnings, started, again)
    return Indexed(_selected(table), opened.notes)


class _Recording(Watcher):
    """Passes on what it is told, and remembers the warnings."""

    def __init__(self, watcher: Watcher) -> None:
        self.warnings: list[str] = []
        self.refuse, self.unreadable, self.look = watcher.refuse, watcher.unreadable, watcher.look
        self._warn = watcher.warn

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._warn(message)


def _tell(
    problems: Sequence[str], count: int, any_usable: bool, config: DataConfig, source: str, watcher: Watcher
) -> None:
    """Tell the watcher about images that cannot be read; ValueError if no other is left."""
    watcher.unreadable(problems)
    summary = f"{len(problems)} of {count} images of {source!r} are unreadable: {listed(problems)}"
    # One file is tolerated in a small set too.
    allowed = max(1, int(config.max_unreadable * count)) if config.max_unreadable else 0
    refusal = f"{summary}; data.max_unreadable is {config.max_unreadable}"
    if not any_usable:
        raise ValueError(refusal)
    if len(problems) > allowed:
        watcher.refuse(refusal)
    else:
        watcher.warn(f"{summary}; skipped")


def _columns(found: Sequence[Found | None]) -> datasets.Dataset:
    """The columns of what was found, a row each; of an image that is left out, None."""
    nothing = Found("", 0, 0, False, 0, 0, 0, 0)
    values = zip(*((*(one or nothing), one is not None) for one in found), strict=True)
    return datasets.Dataset.from_dict(dict(zip((*FOUND, USED), map(list, values), strict=True)))


def _selected(table: datasets.Dataset) -> datasets.Dataset:
    """The images that are used."""
    used = np.asarray(table.data.column(USED))
    return table if used.all() else table.select(np.flatnonzero(used))


# ----------------------------------------------------------------------------------------------------------------------
# Keeping


class _Index:
    """An index on the disk: FOLDER/index.json and, of the name that stands in it, an Arrow file of the columns.

    The images themselves are not in it: those of a folder are paths, those of a table stay in the table.
    """

    def __init__(self, folder: Path, fingerprint: str, newest: int) -> None:
        """fingerprint: of all files of the source. newest: the latest of their times, nanoseconds since 1970."""
        self.folder = folder
        self.fingerprint = fingerprint
        self.newest = newest

    @classmethod
    def of(
        cls,
        config: DataConfig,
        source: str,
        split: str | None,
        captions_needed: bool,
        files: Iterable[str],
    ) -> Self | None:
        """The index of a split for the keys that it depends on; None if there is no place to keep it."""
        keys = (*KEYS, "size") if config.stream_to is not None else KEYS
        settings = [[getattr(config, key) for key in keys], split, captions_needed]
        place = source if not Path(source).expanduser().exists() else str(Path(source).expanduser().resolve())
        name = hashlib.blake2b(json.dumps([place, settings]).encode("utf-8", "surrogatepass"), digest_size=8)
        folder = Path(datasets_config.HF_DATASETS_CACHE) / "latentdiff" / name.hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(folder, os.W_OK):
            return None
        digest, newest = hashlib.blake2b(json.dumps(_versions()).encode(), digest_size=16), 0
        for path in files:
            try:
                size, modified = identity(path)
            except OSError:  # a link to nowhere
                size, modified = -1, 0
            digest.update(f"{path}\0{size}\0{modified}\0".encode("utf-8", "surrogatepass"))
            newest = max(newest, modified)
        return cls(folder, digest.hexdigest(), newest)

    def load(self, config: DataConfig, source: str, split: str | None, watcher: Watcher) -> Indexed | None:
        """What is kept, with the warnings that it came with; None if it is not of the files as they are now."""
        record = self._record()
        if record is None or record["fingerprint"] != self.fingerprint or record["again"]:
            return None
        if self.newest > record["started"] - SETTLED:
            return None
        table = self._table(record)
        if table is None:
            return None
        if record["in_table"]:
            images = images_only(config, source, split)
            if len(images) != len(table):
                return None
            table = datasets.concatenate_datasets([images, table], axis=1)
        for message in record["warnings"]:
            watcher.warn(message)
        return Indexed(_selected(table), record["notes"])

    def known(self) -> dict[str, Found]:
        """What is kept of each image file, by its path, if the file is older than that."""
        record = self._record()
        table = None if record is None or record["in_table"] else self._table(record)
        if record is None or table is None:
            return {}
        settled = record["started"] - SETTLED
        paths = (entry["path"] for entry in table.data.column(IMAGE).to_pylist())
        values = zip(*(table.data.column(name).to_pylist() for name in FOUND), strict=True)
        used = table.data.column(USED).to_pylist()
        found = {path: Found(*one) for path, one, is_used in zip(paths, values, used, strict=True) if is_used}
        return {path: one for path, one in found.items() if one.file_time < settled}

    def keep(
        self, table: datasets.Dataset, opened: Source, warnings: Sequence[str], started: int, again: bool
    ) -> datasets.Dataset:
        """Write the index, and return the table with its columns from the disk; as it is if the disk is full.

        again: whether the next start must not rely on it alone.
        """
        own = table.remove_columns(IMAGE) if opened.in_table else table
        name = f"{self.fingerprint}-{started}.arrow"
        try:
            with replacing(self.folder / name) as temporary, pyarrow.OSFile(str(temporary), "wb") as file:
                with pyarrow.ipc.new_stream(file, own.data.schema) as stream:
                    for rows in own.with_format("arrow").iter(ROWS):
                        stream.write_table(rows)
            write_json(
                {
                    "versions": _versions(),
                    "fingerprint": self.fingerprint,
                    "started": started,
                    "again": again,
                    "in_table": opened.in_table,
                    "rows": len(own),
                    "file": name,
                    "warnings": list(warnings),
                    "notes": opened.notes,
                },
                self.folder / RECORD,
            )
        except (OSError, ArrowException):
            return table
        for other in self.folder.glob("*.arrow"):
            if other.name != name:
                other.unlink(missing_ok=True)
        kept = datasets.Dataset.from_file(str(self.folder / name))
        pyarrow.default_memory_pool().release_unused()
        if not opened.in_table:
            return kept
        return datasets.concatenate_datasets([table.select_columns([IMAGE]), kept], axis=1)

    def _record(self) -> dict[str, Any] | None:
        try:
            record = read_json(self.folder / RECORD)
        except (OSError, ValueError):  # there is none, or a damaged one
            return None
        return record if record.get("versions") == _versions() else None

    def _table(self, record: Mapping[str, Any]) -> datasets.Dataset | None:
        """The kept columns, mapped into memory; None if the file is missing or damaged."""
        try:
            table = datasets.Dataset.from_file(str(self.folder / record["file"]))
        except (OSError, ArrowException, ValueError):
            return None
        return table if len(table) == record["rows"] else None


def _versions() -> dict[str, str | int]:
    """Of what decides which images can be read."""
    found: dict[str, str | int] = {"index": FORMAT_VERSION}
    for package in ("pillow", "pillow-heif"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
