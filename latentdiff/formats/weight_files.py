"""Which files of a folder hold a model's weights: one file, or shards with their index. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from latentdiff.formats.headers import TensorFile, json_object, read_tensor_file
from latentdiff.printable import listed, shortened, shown, shown_path

_SHARD = r"-\d+-of-\d+"
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class WeightFiles:
    """files: what to read, one or all shards. unused: files of another model under the names of the same variant."""

    files: tuple[Path, ...]
    unused: tuple[Path, ...] = ()

    @property
    def place(self) -> Path:
        """The file, or the folder of the shards."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    @property
    def warning(self) -> str | None:
        """What to tell the user of the files that are not read; None if there are none."""
        if not self.unused:
            return None
        first = self.files[0]
        used = first.name if len(self.files) == 1 else f"{first.name} and its {len(self.files) - 1} other shards"
        return (
            f"{shown_path(first.parent)} holds the weights of two models: {shown(used)} is read, "
            f"{listed([shown(path.name) for path in self.unused])} is not; remove what is stale"
        )


def single_name(stem: str, variant: str | None) -> str:
    """The name of weights in one file."""
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def index_names(stem: str, variant: str | None) -> tuple[str, ...]:
    """The names that an index of shards may have: today's, and that of older versions of diffusers."""
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    return f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json"


def has_weights(folder: Path, stem: str, variant: str | None) -> bool:
    """Whether a folder has weights of a variant, by the names of its files."""
    return any((folder / name).is_file() for name in (single_name(stem, variant), *index_names(stem, variant)))


def find_weights(folder: Path, stem: str, variant: str | None = None) -> WeightFiles:
    """The files of `<stem>[.variant].safetensors`, or those that an index lists.

    Where there are both, the index decides, as in diffusers, if all its files are there; of two indexes the newer one.
    Raises ValueError if there are no weights, or an index is damaged or names files that are missing or elsewhere.
    """
    single = folder / single_name(stem, variant)
    indexes = [path for name in index_names(stem, variant) if (path := folder / name).is_file()]
    indexes.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    shards = {index: _shards_of(index) for index in indexes}
    whole = [index for index in indexes if all(path.is_file() for path in shards[index])]
    if whole:
        files = shards[whole[0]]
        rest = {*indexes, *_shards_beside(folder, stem, variant)} - {whole[0]}
        unused = [path for path in (single, *sorted(rest)) if path.is_file() and path not in files]
        return WeightFiles(files, tuple(unused))
    if single.is_file():
        return WeightFiles((single,), (*indexes, *_shards_beside(folder, stem, variant)))
    if indexes:
        missing = [path for path in shards[indexes[0]] if not path.is_file()]
        raise ValueError(f"{shown_path(missing[0])} does not exist, which {shown(indexes[0].name)} names")
    raise ValueError(_why_none(folder, stem, variant, single))


def variants(folder: Path, stem: str) -> list[str | None]:
    """The variants whose weights a folder has, by the names of its files; None is that without a name, and first."""
    found = {_variant(path.name, stem) for path in folder.glob(f"{stem}*.safetensors")}
    return sorted(found - {""}, key=lambda variant: variant or "")


def read_weights_headers(folder: Path, stem: str) -> TensorFile:
    """What the headers say of a model's weights: those without a variant, or else of the first variant.

    Raises ValueError as `find_weights` and `read_tensor_file` do.
    """
    found = variants(folder, stem)
    files = [read_tensor_file(path) for path in find_weights(folder, stem, found[0] if found else None).files]
    dtypes = tuple(dict.fromkeys(dtype for file in files for dtype in file.dtypes))
    return TensorFile(
        sum(file.tensors for file in files),
        sum(file.parameters for file in files),
        dtypes,
        files[0].metadata,
        {name: size for file in files for name, size in file.sizes.items()},
    )


def _shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names; all are beside it."""
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{shown_path(index)} has no weight_map, which says in which file each tensor is")
    names = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    for name in sorted(names):
        if Path(name).name != name or "\0" in name or len(name) > 255 or not name.endswith(".safetensors"):
            raise ValueError(f"{shown_path(index)} names the file {shortened(name)}, which is not beside it")
    return tuple(index.parent / name for name in sorted(names))


def _shards_beside(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The shards of a variant that are in a folder, whatever indexes say."""
    shards = [path for path in folder.glob(f"{stem}*.safetensors") if re.search(_SHARD, path.name)]
    return sorted(path for path in shards if _variant(path.name, stem) == variant)


def _variant(name: str, stem: str) -> str | None:
    """Of a weights file's name: None without a variant, "" if it is another model's name.

    Shards are `<stem>[.variant]-00001-of-00002.safetensors`, or with the variant at the end in older versions.
    """
    stem = re.escape(stem)
    for pattern in (rf"{stem}(\.[^.]+)?{_SHARD}", rf"{stem}{_SHARD}(\.[^.]+)", rf"{stem}(\.[^.]+)?"):
        if found := re.fullmatch(rf"{pattern}\.safetensors", name):
            return found[1] and found[1].removeprefix(".")
    return ""


def _why_none(folder: Path, stem: str, variant: str | None, single: Path) -> str:
    """What to say where there are no weights."""
    if not folder.is_dir():
        return f"{shown_path(folder)} does not exist"
    found = sorted(shown(path.name) for path in folder.glob("*.safetensors"))
    message = f"{shown_path(single)} does not exist; {shown(folder.name)}/ has {listed(found) or 'no safetensors file'}"
    pickled = sorted(shown(path.name) for path in folder.glob("*") if path.suffix in _PICKLED)
    if _shards_beside(folder, stem, variant):
        return f"{message}, but not their index {index_names(stem, variant)[0]}: copy that too"
    if others := [name for name in variants(folder, stem) if name is not None and name != variant]:
        return f"{message}: pass variant={others[0]!r}"
    if variant is not None and has_weights(folder, stem, None):
        return f"{message}: leave variant out"
    if pickled and not found:
        return f"{message}, only {pickled[0]}, a pickle that could run code: convert it to safetensors"
    return message
