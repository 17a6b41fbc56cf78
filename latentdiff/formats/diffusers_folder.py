"""The diffusers folder: `config.json` beside safetensors weights, loaded strictly and written atomically."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from latentdiff.config import ModelConfig

WEIGHTS_STEM = "diffusion_pytorch_model"


class FolderModel:
    """What AutoencoderKL and UNet share: from random weights, from a diffusers folder, to one.

    A subclass is an nn.Module with `config_class`, `config` and `init_weights(generator)`.
    """

    config_class: "type[ModelConfig]"
    config: "ModelConfig"

    @classmethod
    def from_config(cls, config: "ModelConfig", seed: int) -> Self:
        """Random weights that depend on `seed` alone; the global random state is neither used nor changed."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> Self:
        """Open a model's folder (`config.json`, `diffusion_pytorch_model[.variant].safetensors`).

        Raises ValueError if a file is missing, broken, of another class or does not fit the config exactly.
        """
        folder = Path(folder)
        config = cls.config_class.from_diffusers(
            read_config(folder / "config.json", cls.config_class.diffusers_class), str(folder / "config.json")
        )
        with torch.device("meta"):
            model = cls(config)
        weights = cls.upgrade_state_dict(read_weights(folder, WEIGHTS_STEM, variant))
        if dtype is not None:
            weights = {key: value.to(dtype) for key, value in weights.items()}
        load_strictly(model, weights, str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, each atomically."""
        folder = Path(folder)
        config = self.config.to_diffusers()
        write_safetensors(self.state_dict(), folder / f"{WEIGHTS_STEM}.safetensors", {"config": json.dumps(config)})
        write_json(config, folder / "config.json")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @staticmethod
    def upgrade_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Today's key names for the state dict of an old file."""
        return dict(state_dict)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is missing or not one."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def read_config(path: Path, expected_class: str) -> dict[str, Any]:
    """The contents of a model's config.json; ValueError if it is that of another class."""
    values = read_json(path)
    found = values.get("_class_name", expected_class)
    if found != expected_class:
        raise ValueError(f"{path} describes a {found}, not a {expected_class}")
    return values


def read_weights(folder: Path, stem: str, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of `<stem>[.variant].safetensors`, or of the shards that its index lists."""
    name = stem if variant is None else f"{stem}.{variant}"
    single = folder / f"{name}.safetensors"
    index = folder / (
        f"{stem}.safetensors.index.json" if variant is None else f"{stem}.safetensors.index.{variant}.json"
    )
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ValueError(f"{single} does not exist; {folder} has {', '.join(found) or 'no safetensors file'}")
    tensors: dict[str, Tensor] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map, which says in which file each tensor is")
    for shard in sorted(set(weight_map.values())):
        tensors |= read_safetensors(folder / shard)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is missing, truncated or something else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


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
        f"{key} is {list(weights[key].shape)}, the config says {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        problems.append(_listed(wrong))
    if problems:
        raise ValueError(f"{place} does not fit the model: {'; '.join(problems)}")


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
    """Write a picture atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, where the system can tell."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _listed(items: Iterable[str], at_most: int = 5) -> str:
    items = list(items)
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more
