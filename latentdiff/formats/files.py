"""Reading and writing files: JSON, safetensors, PNG; every write is atomic, every load is strict."""

import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.formats.headers import PNG_KEY
from latentdiff.printable import first_line, shortened, shown

# By safetensors' names.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
TEMPORARY = ".tmp"  # ending of the names of what is not finished
# No thread makes or renames a file while another one puts a model's folder in place of an older one.
CHANGING_NAMES = threading.Lock()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is missing or not one."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def read_safetensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is missing, truncated or something else.

    wanted(name): which of them to read.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118 (it is no dict)


def read_safetensors_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: names, shapes and types, without their values.

    Raises ValueError as `read_safetensors`.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        return {key: _declared(key, part.get_shape(), part.get_dtype(), path) for key, part in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose declared sizes the library compares with the file's; ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({first_line(error)})") from None


def _declared(key: str, shape: list[int], dtype: str, path: Path) -> Tensor:
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {shown(key)} is of the type {shown(dtype)}, which is not supported")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Make `weights` the model's tensors (it may be on the meta device before); every key and shape must match.

    Raises ValueError as `check_fit` does, before anything is changed.
    """
    check_fit(model.state_dict(), weights, place)
    model.load_state_dict(weights, strict=True, assign=True)


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], place: str) -> None:
    """Raise ValueError that lists missing and unexpected keys and wrong shapes, if there are any."""
    problems = []
    if missing := sorted(expected.keys() - weights.keys()):
        problems.append(f"missing {_listed(missing)}")
    if extra := sorted(weights.keys() - expected.keys()):
        problems.append(f"unexpected {_listed(extra)}")
    wrong = [
        f"{key} is {shortened(list(weights[key].shape))}, the config says {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        problems.append(_listed(wrong))
    if problems:
        raise ValueError(f"{place} does not fit the model: {'; '.join(problems)}")


def refuse_not_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise ValueError if a value is NaN or infinite."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{place} has values that are not finite, in {_listed(bad)}")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically; the header says `format: pt`, which older readers require."""
    with replacing(path) as temporary:
        # safetensors stores plain row-major tensors in main memory: no channels_last, no transposed view.
        stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        try:
            save_file(stored, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def write_json(values: Mapping[str, Any], path: Path, indent: int | None = 2) -> None:
    """Write a JSON object atomically."""
    write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image atomically, with what a pipeline says of it as the text `latentdiff`."""
    with replacing(path) as temporary:
        save_png(image, temporary)


def save_png(image: Image.Image, file: Path | IO[bytes]) -> None:
    """What `write_png` writes, but in place, or into an open file."""
    text = PngInfo()
    if PNG_KEY in image.info:
        text.add_text(PNG_KEY, image.info[PNG_KEY])
    image.save(file, format="PNG", pnginfo=text)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, on systems that support this."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` at the end: a reader sees either the old file or the whole new one.

    Several threads or processes may do so at once; the last one wins.
    """
    with _temporary(path.parent, lambda temporary: os.replace(temporary, path)) as temporary:
        yield temporary


def write_new(names: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """Write a whole file under the first of the names that is free, and return that: no file is ever replaced.

    names: as many as it takes, all in one folder. write(path): writes into a file that is there.
    Several threads or processes may do so at once; each gets a name of its own.
    """
    candidates = iter(names)
    first = next(candidates)
    taken: list[Path] = []

    def take(temporary: Path) -> None:
        taken.append(next(path for path in chain([first], candidates) if take_name(path, temporary)))

    with _temporary(first.parent, take) as temporary:
        write(temporary)
    return taken[0]


def take_name(path: Path, temporary: Path) -> bool:
    """Give a file the name `path`; False if that is taken, also by a link to nowhere."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # this file system has no hard links: an empty file holds the name
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True


@contextmanager
def _temporary(folder: Path, finish: Callable[[Path], None]) -> Iterator[Path]:
    """A new file in `folder`; once it is written and on the disk, finish(path) names it. Else it is removed."""
    temporary = folder / f".{secrets.token_hex(8)}{TEMPORARY}"
    with CHANGING_NAMES:
        folder.mkdir(parents=True, exist_ok=True)
        # Exclusively: a link planted under that name is not followed. With the permissions that the umask leaves.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        with CHANGING_NAMES:
            finish(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _listed(items: Iterable[str], at_most: int = 5) -> str:
    items = list(items)
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return ", ".join(map(shown, items[:at_most])) + more
