"""Folders of a pipeline that someone broke, by accident or on purpose: one file of each is not as it should be."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.formats.headers import MAX_HEADER_BYTES, MAX_JSON_BYTES

# A folder may lack them; that of the tokenizer has its vocabulary twice.
OPTIONAL = (
    *("generation_config.json", "trained_on.json", "latent_preview.json"),
    *("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
)
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# Of every type, and out of every range.
VALUES: list[Any] = [
    *(-1, 2**31, 10**30, 1e308, float("nan"), float("inf"), True, "", "x" * 10_000, "\x1b[31m\n"),
    *([], {}, [[]], [-1], ["a", None], [8] * 10_000, {"a": {"b": 1}}, None),
]


@dataclass(frozen=True)
class Hostile:
    """A change of one file, by its path in the folder. opens: whether the folder may open all the same."""

    what: str
    file: str
    opens: bool
    do: Callable[[Path], None]  # with the path of the file

    @property
    def names(self) -> tuple[str, ...]:
        """Of which one belongs into the message: for an index, also those of its shards."""
        name = Path(self.file).name
        stem = name.removesuffix(".safetensors.index.json")
        return (name,) if stem == name else (name, *(f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)))


def copy_of(saved: Path, target: Path) -> Path:
    """A copy whose files are the same on the disk: write none of them in place."""
    return shutil.copytree(saved, target, copy_function=os.link)


def hostile(saved: Path) -> Iterator[Hostile]:
    """All that is done to the folder of a pipeline, one after the other to fresh copies."""
    for path in sorted(path for path in saved.rglob("*") if path.is_file()):
        name = str(path.relative_to(saved))
        yield from _any_file(path, name)
        if path.suffix == ".json" and path.name not in ("vocab.json", "tokenizer.json"):
            yield from _json(path, name)
        if path.suffix == ".safetensors":
            yield from _headers(path, name)
    for part, stem in WEIGHTS.items():
        yield from _indexes(saved / part, part, stem)


def replaced(content: bytes | str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def _linked(target: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return do


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _sparse(start: bytes, size: int) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        replaced(start)(path)
        os.truncate(path, size)

    return do


def _any_file(path: Path, name: str) -> Iterator[Hostile]:
    content = path.read_bytes()
    yield Hostile("missing", name, path.name in OPTIONAL, Path.unlink)
    yield Hostile("a folder", name, False, _folder)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(content)}\n"
    for what, do in {
        "empty": replaced(b""),
        "cut": replaced(content[: len(content) // 2]),
        "bytes": replaced(b"\xff\xfe\x00\x80" * 100),
        "Git LFS pointer": replaced(pointer),
        "web page": replaced("<!DOCTYPE html><html><body>404</body></html>"),
        "a link to nowhere": _linked("nowhere"),
        "a link to itself": _linked(path.name),
        "a link to a device": _linked("/dev/zero"),
        "a link out of the folder": _linked("/etc/passwd"),
        "a fifo": _fifo,
        "20 GB": _sparse(content[:100], 20 * 10**9),
    }.items():
        yield Hostile(what, name, False, do)


def _json(path: Path, name: str) -> Iterator[Hostile]:
    values = json.loads(path.read_bytes())
    first = next(iter(values))
    for what, text in {
        "a list": "[]",
        "a number": "3",
        "null": "null",
        "nested": "[" * 100_000,
        "nested objects": '{"a":' * 100_000,
        "digits": f'{{"{first}": {"9" * 5000}}}',
        "large": " " * (MAX_JSON_BYTES + 1),
        "a key twice": json.dumps(values)[:-1] + f', "{first}": {json.dumps(values[first])}}}',
    }.items():
        yield Hostile(what, name, False, replaced(text))
    for place, key in enumerate(values):
        for value in VALUES[place % 6 :: 6]:
            changed = json.dumps({**values, key: value})
            yield Hostile(f"{key} is {value!r:.40}", name, True, replaced(changed))


def _headers(path: Path, name: str) -> Iterator[Hostile]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    first, second = keys[:2]

    def with_header(new: Any) -> bytes:
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        return len(text).to_bytes(8, "little") + text + data

    def entry(**changes: Any) -> bytes:
        return with_header({**header, first: {**header[first], **changes}})

    begin, end = header[first]["data_offsets"]
    for what, new in {
        "a length beyond the file": (len(content) + 1).to_bytes(8, "little") + content[8:],
        "a length of 2**64 - 1": b"\xff" * 8 + content[8:],
        "no header": bytes(8) + content[8:],
        "a short length": (length // 2).to_bytes(8, "little") + content[8:],
        "a list": with_header([]),
        "nested": with_header(b"[" * 100_000),
        "large": with_header(b" " * (MAX_HEADER_BYTES + 1)),
        "metadata of numbers": with_header({**header, "__metadata__": {"a": 1}}),
        "a tensor twice": with_header(
            json.dumps(header).encode()[:-1] + f', "{first}": {json.dumps(header[first])}}}'.encode()
        ),
        "no tensors": with_header({}),
        "a missing tensor": with_header({key: value for key, value in header.items() if key != first}),
        "another name": with_header({("\x1b[31m" if key == first else key): value for key, value in header.items()}),
        "overlapping": with_header({**header, second: header[first]}),
        "offsets beyond the file": entry(data_offsets=[begin, end + 2**40]),
        "offsets backwards": entry(data_offsets=[end, begin]),
        "offsets of floats": entry(data_offsets=[0.5, 1.5]),
        "a negative shape": entry(shape=[-1]),
        "a huge shape": entry(shape=[2**62, 2**62]),
        "a shape of nothing": entry(shape=[0, 2**63]),
        "another shape": entry(shape=[1, *header[first]["shape"]]),
        "a shape that is none": entry(shape="x"),
        "an unknown type": entry(dtype="X32"),
        "a wide type": entry(dtype="F64"),
        "a number as type": entry(dtype=32),
        "another type of that size": entry(dtype="I32"),
        "data left": content + bytes(4),
    }.items():
        yield Hostile(f"header: {what}", name, False, replaced(new))
    size = 20 * 10**9
    text = json.dumps({first: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    start = len(text).to_bytes(8, "little") + text
    yield Hostile("header: consistent, of 20 GB", name, False, _sparse(start, len(start) + size))


def _indexes(folder: Path, part: str, stem: str) -> Iterator[Hostile]:
    single = f"{stem}.safetensors"
    content = (folder / single).read_bytes()
    length = int.from_bytes(content[:8], "little")
    keys = [key for key in json.loads(content[8 : 8 + length]) if key != "__metadata__"]
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]

    def do(weight_map: Any, files: bool) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_text(json.dumps({"weight_map": weight_map}))
            for shard in shards if files else ():
                os.link(path.with_name(single), path.with_name(shard))
            path.with_name(single).unlink()

        return write

    both = {key: shards[i % 2] for i, key in enumerate(keys)}
    for what, (weight_map, files) in {
        "a file above": (dict.fromkeys(keys, f"../{single}"), False),
        "an absolute path": (dict.fromkeys(keys, "/etc/passwd"), False),
        "itself": (dict.fromkeys(keys, f"{single}.index.json"), False),
        "a file that is not there": (both, False),
        "one tensor in two files": (both, True),
        "a list": (keys, True),
        "numbers": (dict.fromkeys(keys, 3), True),
        "lists": (dict.fromkeys(keys, [shards[0]]), True),
        "nothing": ({}, True),
        "null characters": (dict.fromkeys(keys, "a\0.safetensors"), False),
        "a long name": (dict.fromkeys(keys, "x" * 5000 + ".safetensors"), False),
    }.items():
        yield Hostile(f"index of {what}", f"{part}/{single}.index.json", False, do(weight_map, files))
