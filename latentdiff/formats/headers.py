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

from latentdiff.printable import first_line, shortened, shown, shown_path

MAX_JSON_BYTES = 8_000_000
MAX_YAML_BYTES = 200_000  # which are read in about a second
MAX_HEADER_BYTES = 8_000_000  # of a safetensors file; that of a model with a thousand layers has less than one
LFS_POINTER = "version https://git-lfs.github.com/spec/"  # what such a file starts with
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
        if not isinstance(error, ValueError) and path.is_symlink():
            raise ValueError(f"{shown_path(path)} is a link to nowhere, or to itself") from None
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{shown_path(path)} does not exist") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{shown_path(path)} cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown_path(path)} is no regular file")
    return status.st_size


def is_there(path: Path) -> bool:
    """Whether there is anything under a name, be it a link to nowhere, which is then refused and not left out."""
    return os.path.lexists(path)


def json_object(path: Path, at_most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes."""
    values = _parsed_json(small_text(path, at_most), path)
    if not isinstance(values, dict):
        raise ValueError(f"{shown_path(path)} must hold a JSON object, not {type(values).__name__}")
    return values


def _parsed_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{shown_path(path)} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, a number of thousands of digits, a key twice
        raise ValueError(f"{shown_path(path)} is not valid JSON: {first_line(error)}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values of one key they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shortened(twice)} is there twice")
    return values


def yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Its aliases are not expanded: the same object may be in it many times."""
    text = small_text(path, MAX_YAML_BYTES)
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{shown_path(path)} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2026-99-99
        raise ValueError(f"{shown_path(path)} is not YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown_path(path)} holds no sections, but {shortened(values)}")
    return values


def last_lines(path: Path, at_most: int = 65_536) -> list[str]:
    """The whole lines in the last bytes of a text file."""
    size = check_regular(path)
    with path.open("rb") as file:
        file.seek(max(0, size - at_most))
        lines = file.read(at_most).decode("utf-8", "replace").splitlines()
    return lines if size <= at_most else lines[1:]


def small_text(path: Path, at_most: int) -> str:
    """The text of a file of at most so many bytes, in UTF-8."""
    if (size := check_regular(path)) > at_most:
        raise ValueError(f"{shown_path(path)} has {size:,} bytes, must have at most {at_most:,}")
    try:
        with path.open("rb") as file:
            text = file.read(at_most).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{shown_path(path)} is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{shown_path(path)} cannot be read: {error.strerror}") from None
    if text.startswith(LFS_POINTER):
        raise ValueError(_is_pointer(path))
    return text


def _is_pointer(path: Path) -> str:
    return f"{shown_path(path)} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"


def tensor_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Of every tensor that a safetensors file declares, the type by safetensors' name and the shape.

    Only the header is read. That the tensors fill the file without overlapping, the library checks when it opens it.
    """
    size = check_regular(path)
    damaged = f"{shown_path(path)} is truncated or not a safetensors file"
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length <= min(MAX_HEADER_BYTES, size - 8):
                text = file.read(length)
            elif (start + file.read(len(LFS_POINTER))).startswith(LFS_POINTER.encode()):
                raise ValueError(_is_pointer(path))
            else:
                raise ValueError(f"{damaged} (a header of {length:,} bytes in {size:,})")
    except OSError as error:
        raise ValueError(f"{shown_path(path)} cannot be read: {error.strerror}") from None
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged} (header: {first_line(error)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{damaged} (its header is no JSON object)")
    entries = {key: value for key, value in values.items() if key != "__metadata__"}
    for key, value in entries.items():
        shape, kind = (value.get("shape"), value.get("dtype")) if isinstance(value, dict) else (None, None)
        sides = shape if isinstance(shape, list) else [-1]
        if not all(type(side) is int and 0 <= side < 2**63 for side in sides) or not isinstance(kind, str):
            raise ValueError(f"{damaged} (its header says of {shown(key)}: {shortened(value)})")
    return {key: (value["dtype"], value["shape"]) for key, value in entries.items()}


def read_tensor_file(path: Path) -> TensorFile:
    """What the header of a safetensors file says."""
    from safetensors import SafetensorError, safe_open

    tensor_header(path)
    try:
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
        raise ValueError(f"{shown_path(path)} is truncated or not a safetensors file ({first_line(error)})") from None
    parameters = sum(count for dtype, count in numbers.items() if dtype.startswith(_FLOATS))
    return TensorFile(len(keys), parameters, tuple(dtype for dtype, _ in numbers.most_common()), metadata, sizes)


def read_png(path: Path) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Width and height of a PNG, and what its text says of how this project generated it; None if it did not."""
    from PIL.PngImagePlugin import PngImageFile

    check_regular(path)
    try:
        with PngImageFile(path) as image:  # its header; the pixels are not decoded
            size, text = image.size, image.info.get(PNG_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{shown_path(path)} is not a readable PNG: {first_line(error)}") from None
    try:
        said = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        said = None
    return size, said if isinstance(said, dict) else None
