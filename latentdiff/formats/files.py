"""Reading and writing files: JSON, safetensors, PNG; every write is atomic, every load is strict."""

import inspect
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.formats.headers import MAX_JSON_BYTES, PNG_KEY, json_object, tensor_header
from latentdiff.printable import MAX_TEXT, first_line, shortened, shown

# By safetensors' names.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
CONVERTED_AT_ONCE = 8 * 2**20  # numbers
_LORA = (".lora_", ".lora.", ".base_layer.", "_lora.")  # in keys of peft, and of older versions of diffusers
T = TypeVar("T")
TEMPORARY = ".tmp"  # ending of the names of what is not finished
# No thread makes or renames a file while another one puts a model's folder in place of an older one.
CHANGING_NAMES = threading.Lock()


def read_json(path: Path, at_most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes; ValueError if it is missing or not one."""
    return json_object(path, at_most)


def from_json(kind: Callable[..., T], values: Mapping[str, Any], path: Path) -> T:
    """A dataclass of a JSON file's values; ValueError, with the file, for other or missing keys or as it raises."""
    known = inspect.signature(kind).parameters
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{path} has the key {shown(unknown[0])}, must be of {', '.join(known)}")
    if missing := [key for key, one in known.items() if one.default is one.empty and key not in values]:
        raise ValueError(f"{path} lacks the key {missing[0]}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_safetensors(
    path: Path, dtype: torch.dtype | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: a page is read when it is used.

    dtype: convert them. This reads the file a part at a time, so that memory holds little more than the result.
    wanted(name): which tensors to read.
    Raises ValueError if the file is missing, truncated or something else.
    """
    with _opened(path) as file:
        header = {key: file.get_slice(key) for key in file.keys() if wanted(key)}  # noqa: SIM118 (it is no dict)
        kept = [key for key, part in header.items() if dtype in (None, _DTYPES.get(part.get_dtype()))]
        tensors = {key: file.get_tensor(key) for key in kept}
    for keys in _parts([key for key in header if key not in tensors], header):
        with _opened(path) as file:  # anew, since a page stays in memory as long as the file is mapped
            tensors |= {key: file.get_tensor(key).to(dtype) for key in keys}
    return {key: tensors[key] for key in header}


def _parts(keys: Iterable[str], header: Mapping[str, Any]) -> Iterator[list[str]]:
    """Keys in groups of about as many numbers."""
    group, numbers = [], 0
    for key in keys:
        group.append(key)
        numbers += prod(header[key].get_shape())
        if numbers >= CONVERTED_AT_ONCE:
            yield group
            group, numbers = [], 0
    if group:
        yield group


def read_safetensors_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: names, shapes and types, without their values.

    Raises ValueError as `read_safetensors`.
    """
    return {key: _declared(key, shape, dtype, path) for key, (dtype, shape) in tensor_header(path).items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose declared sizes the library compares with the file's; ValueError if it is none."""
    tensor_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({first_line(error)})") from None


def _declared(key: str, shape: list[int], dtype: str, path: Path) -> Tensor:
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {shown(key)} is of the type {shown(dtype)}, which is not supported")
    try:
        return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
    except (TypeError, RuntimeError):  # nothing times more than fits into a number
        raise ValueError(f"{path}: {shown(key)} has the impossible shape {shortened(shape)}") from None


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
    refuse_foreign_keys(extra, place)
    if problems:
        raise ValueError(f"{place} does not fit the model: {'; '.join(problems)}")


def refuse_foreign_keys(keys: Iterable[str], place: str) -> None:
    """Raise ValueError that names the remedy, if other tools have put their prefix or their tensors into a model."""
    for key in keys:
        if "_orig_mod." in key:
            remedy = "_orig_mod. is from torch.compile; save model._orig_mod, or take it out of the names"
        elif key.startswith("module."):
            remedy = "module. is from DataParallel; save model.module, or take it off the names"
        elif any(part in key for part in _LORA):
            remedy = "that is of a LoRA; fuse it into the model before saving (fuse_lora), or remove it"
        else:
            continue
        raise ValueError(f"{place} does not fit the model: unexpected {shown(key)}: {remedy}")


def refuse_not_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise ValueError if a value is NaN or infinite."""
    # NaN and infinity pass through to the extremes, which takes an eighth of the time of a mask. All before the first
    # is read: a device works on.
    finite = {
        name: torch.stack(tensor.aminmax()).isfinite().all()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    bad = [name for name, is_finite in finite.items() if not is_finite]
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
    """The first items, fewer if they are long, and how many more there are."""
    names = [shown(item) for item in items]
    count = min(at_most, len(names))
    while count > 1 and sum(map(len, names[:count])) > MAX_TEXT:
        count -= 1
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
