"""A data set that is larger than the disk: streamed once, and kept as tar shards of images of about the training size.

The shards are an ordinary source from then on: their order, a resume and several processes are those of any other.
"""

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tqdm import tqdm

from latentdiff.config import DataConfig, shape_of
from latentdiff.data.captions import caption_column, read_text
from latentdiff.formats.files import read_json, write_json
from latentdiff.formats.locks import holding_file
from latentdiff.images import READ_ERRORS, decode
from latentdiff.printable import first_line, shown

SHARD = 1000  # rows
RECORD = "stream.json"  # what the shards are of, and whether all are there
QUALITY = 95  # of JPEG, with full colour resolution

Row = Mapping[str, Any]
CaptionsOf = Callable[[Row, int], list[str]]


def streamed(source: str, split: str, config: DataConfig, progress: bool) -> Path:
    """The folder of a source's shards in data.stream_to, which is filled or completed first.

    Images are resized until they just cover the training size, never enlarged; without transparency they are kept as
    JPEG of quality 95, else as PNG. An interrupted start goes on at the shard where it was. Of several processes one
    streams and the others wait. Raises ValueError if the folder holds something else, or the source cannot be read.
    """
    assert config.stream_to is not None
    folder = Path(config.stream_to).expanduser() / split
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "source": source,
        "size": list(config.shape),
        "columns": [config.image_column, config.caption_column, config.captions],
    }
    while True:
        with holding_file(folder / ".lock") as held:
            if _is_complete(folder, wanted):
                return folder
            if held:
                write_json(wanted, folder / RECORD)
                _stream(source, split, config, folder, progress)
                write_json(wanted | {"complete": True}, folder / RECORD)
                return folder
        time.sleep(1)


def _is_complete(folder: Path, wanted: Mapping[str, Any]) -> bool:
    if not any(folder.glob("*.tar")):
        return False
    if not (folder / RECORD).is_file():
        raise ValueError(f"data.stream_to: {folder} holds other files; use a new folder")
    found = read_json(folder / RECORD)
    other = [key for key, value in wanted.items() if found.get(key) != value]
    if other:
        kept = ", ".join(f"{key} {found.get(key)!r}" for key in other)
        raise ValueError(f"data.stream_to: {folder} holds images of {kept}; use a new folder, or delete this one")
    return found.get("complete") is True


def _stream(source: str, split: str, config: DataConfig, folder: Path, progress: bool) -> None:
    """Write the shards that are missing."""
    done = len(list(folder.glob("*.tar")))
    rows = done * SHARD
    try:
        table, image, captions_of = _open(source, split, config)
        bar = tqdm(table.skip(rows), "stream images", initial=rows, unit="image", disable=not progress, leave=False)
        remaining = iter(bar)
        while row := next(remaining, None):
            shard = chain([row], islice(remaining, SHARD - 1))  # one original at a time is in memory
            rows += _write(folder / f"{rows // SHARD:06d}.tar", shard, rows, image, captions_of, config)
    except (DatasetGenerationError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"data.source {source!r}, streamed: {first_line(error.__cause__ or error)}") from None
    if rows == 0:
        raise ValueError(f"data.source {source!r}, streamed: there are no rows")


def _open(source: str, split: str, config: DataConfig) -> tuple[datasets.IterableDataset, str, CaptionsOf]:
    """The stream with undecoded images, their column, and what gives the captions of a row and its number."""
    path = Path(source).expanduser()
    if path.suffix == ".parquet":
        table = datasets.load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=True)
    else:
        table = datasets.load_dataset(source, split=split, streaming=True)
    columns = list(table.features or next(iter(table), {}))
    images = [name for name, kind in (table.features or {}).items() if isinstance(kind, datasets.Image)]
    image = config.image_column or next(iter(images), "image")
    if image not in columns:
        raise ValueError(
            f"data.source {source!r} has no column of images among {', '.join(map(shown, columns))}; name it with "
            "data.image_column"
        )
    others = [name for name in columns if name != image]
    captioned = config.captions != "none" and config.constant_caption is None
    text = caption_column(others, config, repr(source)) if captioned else None
    labels = (table.features or {}).get(text)

    def captions_of(row: Row, number: int) -> list[str]:
        value = None if text is None else row[text]
        if isinstance(labels, datasets.ClassLabel) and value is not None:
            value = labels.names[value].replace("_", " ")
        return read_text(value, lambda: f"{source}, row {number}: column {text!r}")

    return table.cast_column(image, datasets.Image(decode=False)), image, captions_of


def _write(path: Path, rows: Iterable[Row], first: int, image: str, captions_of: CaptionsOf, config: DataConfig) -> int:
    """Write a shard, complete or not at all; the number of its rows."""
    partial, count = path.with_suffix(".partial"), 0
    with tarfile.open(partial, "w") as shard:
        for number, row in enumerate(rows, first):
            entry = row[image] or {}
            try:
                suffix, content = _kept(decode(entry), config)
            except READ_ERRORS:  # kept, and reported with all others when the shards are opened
                suffix, content = ".png", entry.get("bytes") or b""
            _add(shard, f"{number:09d}{suffix}", content)
            _add(shard, f"{number:09d}.json", json.dumps({"caption": captions_of(row, number)}).encode())
            count += 1
    partial.rename(path)
    return count


def _kept(image: Image.Image, config: DataConfig) -> tuple[str, bytes]:
    """The suffix and the bytes of a file of an image that just covers the training size."""
    height, width = shape_of(config.size)
    scale = max(height / image.height, width / image.width)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if image.has_transparency_data or image.mode not in ("L", "RGB", "CMYK"):
        image.save(file, "PNG", compress_level=1)
        return ".png", file.getvalue()
    image.convert("L" if image.mode == "L" else "RGB").save(file, "JPEG", quality=QUALITY, subsampling=0)
    return ".jpg", file.getvalue()


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))
