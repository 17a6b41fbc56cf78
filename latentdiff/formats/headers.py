"""What files say of themselves, read in bounded time and memory, whatever they hold. Imports no torch.

Every reader raises ValueError with one line that names the file.
"""

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from latentdiff.printable import first_line, shortened, shown

MAX_JSON_BYTES = 8_000_000
MAX_YAML_BYTES = 200_000  # which are read in about a second
MAX_HEADER_BYTES = 32_000_000  # of a safetensors file; that of a model with a thousand layers has less than one
PNG_KEY = "latentdiff"  # in a PNG's text and in an image's info
_FLOATS = ("F", "BF", "C")  # that safetensors' names of floating-point types start with


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a safetensors file, by its header.

    parameters: numbers in tensors of floating-point types. dtypes: safetensors' names, that of most numbers first.
    sizes: the numbers in each tensor, by its name.
    """

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    sizes: dict[str, int]


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file; ValueError for anything else, which may block a reader or never end."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if path.is_symlink():
            raise ValueError(f"{shown(path)} is a link to nowhere, or to itself") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{shown(path)} cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown(path)} is no regular file")
    return status.st_size


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = _small_text(path, MAX_JSON_BYTES)
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"{shown(path)} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)} is not valid JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown(path)} holds no JSON object, but {shortened(values)}")
    return values


def yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Its aliases are not expanded: the same object may be in it many times."""
    text = _small_text(path, MAX_YAML_BYTES)
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{shown(path)} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2026-99-99
        raise ValueError(f"{shown(path)} is not YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown(path)} holds no sections, but {shortened(values)}")
    return values


def last_lines(path: Path, at_most: int = 65_536) -> list[str]:
    """The whole lines in the last bytes of a text file."""
    size = check_regular(path)
    with path.open("rb") as file:
        file.seek(max(0, size - at_most))
        lines = file.read(at_most).decode("utf-8", "replace").splitlines()
    return lines if size <= at_most else lines[1:]


def _small_text(path: Path, limit: int) -> str:
    if (size := check_regular(path)) > limit:
        raise ValueError(f"{shown(path)} has {size:,} bytes, must have at most {limit:,}")
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{shown(path)} is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}") from None


def read_tensor_file(path: Path) -> TensorFile:
    """What the header of a safetensors file says; the library compares it with the file's size."""
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{shown(path)} is not a safetensors file, or has a header of {length:,} bytes")
        numbers: Counter[str] = Counter()
        sizes: dict[str, int] = {}
        with safe_open(os.fspath(path), framework="numpy") as file:
            keys = file.keys()
            for key in keys:
                part = file.get_slice(key)
                sizes[key] = prod(part.get_shape())
                numbers[part.get_dtype()] += sizes[key]
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shown(path)} is truncated or not a safetensors file ({first_line(error)})") from None
    parameters = sum(count for dtype, count in numbers.items() if dtype.startswith(_FLOATS))
    return TensorFile(len(keys), parameters, tuple(dtype for dtype, _ in numbers.most_common()), metadata, sizes)


def read_weights_headers(folder: Path, stem: str) -> TensorFile:
    """The same of a model's weights: `<stem>.safetensors`, its shards, or else those of its first variant."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        groups.setdefault(_variant(path, stem), []).append(path)
    if not groups:
        raise ValueError(f"{shown(folder)} has no {stem}.safetensors")
    files = [read_tensor_file(path) for path in groups[min(groups)]]
    dtypes = tuple(dict.fromkeys(dtype for file in files for dtype in file.dtypes))
    return TensorFile(
        sum(file.tensors for file in files),
        sum(file.parameters for file in files),
        dtypes,
        files[0].metadata,
        {name: size for file in files for name, size in file.sizes.items()},
    )


def _variant(path: Path, stem: str) -> str:
    """model.safetensors and model-00001-of-00002.safetensors: "", model.fp16[-0000...].safetensors: "fp16"."""
    return path.name.removeprefix(stem).removesuffix(".safetensors").partition("-")[0].strip(".")


def read_png(path: Path) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Width and height of a PNG, and what its text says of how this project generated it; None if it did not."""
    from PIL.PngImagePlugin import PngImageFile

    check_regular(path)
    try:
        with PngImageFile(path) as image:  # its header; the pixels are not decoded
            size, text = image.size, image.info.get(PNG_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{shown(path)} is not a readable PNG: {first_line(error)}") from None
    try:
        said = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        said = None
    return size, said if isinstance(said, dict) else None
