"""The diffusers folder: `config.json` beside safetensors weights, loaded strictly and written atomically."""

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.config import DIFFUSERS_VERSION, ModelConfig
from latentdiff.formats.files import (
    check_fit,
    load_strictly,
    read_json,
    read_safetensors,
    read_safetensors_header,
    refuse_not_finite,
    write_json,
    write_safetensors,
)
from latentdiff.formats.hub import local_path, model_patterns
from latentdiff.formats.swap import replacing_model
from latentdiff.formats.weight_files import find_weights
from latentdiff.printable import shortened, shown, shown_path

WEIGHTS_STEM = "diffusion_pytorch_model"
PIPELINE_FILE = "model_index.json"
PREVIEW_FILE = "latent_preview.json"  # beside an autoencoder, ours alone
# What belongs to a model, in patterns: also other variants, shards with their index, and the preview of its latents.
MODEL_FILES = ("config.json", f"{WEIGHTS_STEM}*", PREVIEW_FILE)


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class FolderModel(nn.Module, Generic[ConfigT]):
    """What AutoencoderKL and UNet share: random weights, opening a diffusers folder, writing one.

    A subclass is built from its config alone.
    """

    config_class: type[ConfigT]
    config: ConfigT

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every weight with random numbers from `generator`."""

    @classmethod
    def from_config(cls, config: ConfigT, seed: int) -> Self:
        """Random weights that depend on `seed` alone; the global random state is neither used nor changed."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> Self:
        """Open a model's folder (`config.json`, `diffusion_pytorch_model[.variant].safetensors`, or shards and index).

        name_or_folder: also a hub id. subfolder: of that folder or repository, such as "vae" of a pipeline's.
        dtype: None keeps that of the files. The weights stay mapped to the files where they are not converted: do not
        overwrite those in place while the model is in use (`save_pretrained` doesn't).
        Warns if the files of another model are beside them, which are not read.
        Raises ValueError if a file is missing, damaged, of another class or does not fit the config exactly.
        """
        wanted = model_patterns(WEIGHTS_STEM, variant, subfolder or "")
        folder = local_path(name_or_folder, wanted, cls.__name__) / (subfolder or "")
        config = cls.config_class.from_diffusers(
            read_config(folder / "config.json", cls.config_class.diffusers_class), str(folder / "config.json")
        )
        with torch.device("meta"):
            model = cls(config)
        found = find_weights(folder, WEIGHTS_STEM, variant)
        if found.warning:
            warnings.warn(found.warning, stacklevel=2)
        # Before anything is read: a header may declare other tensors than the config, and as large as it likes.
        place = str(found.place)
        header = cls.upgrade_state_dict(read_files(found.files, read_safetensors_header))
        check_fit(model.state_dict(), header, place)
        check_types(header, dtype, place)
        weights = cls.upgrade_state_dict(read_files(found.files, partial(read_safetensors, dtype=dtype)))
        return _filled(model, weights, place)

    @classmethod
    def from_weights(
        cls, config: ConfigT, weights: Mapping[str, Tensor], place: str, dtype: torch.dtype | None = None
    ) -> Self:
        """A model with these weights, in `dtype` or their own; place: where they are from, for messages.

        Raises ValueError if they do not fit the config exactly, or are of types in which no model computes.
        """
        with torch.device("meta"):
            model = cls(config)
        check_types(weights, dtype, place)
        converted = {key: value.to(dtype or value.dtype) for key, value in weights.items()}
        return _filled(model, converted, place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors` in place of an old model, in one step.

        Other files in the folder stay. Raises ValueError if it holds a pipeline, or a weight is not finite.
        """
        folder = Path(folder)
        if (folder / PIPELINE_FILE).is_file():
            raise ValueError(f"{folder} holds a pipeline; save the {type(self).__name__} into another folder")
        weights = self.state_dict()
        refuse_not_finite(weights, f"the {type(self).__name__} to save ({self.dtype})")
        config = self.config.to_diffusers()
        with replacing_model(folder, MODEL_FILES, "config.json") as new:
            write_safetensors(weights, new / f"{WEIGHTS_STEM}.safetensors", {"config": json.dumps(config)})
            write_json(config, new / "config.json")

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @staticmethod
    def upgrade_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Current key names for the state dict of an old file."""
        return dict(state_dict)


ModelT = TypeVar("ModelT", bound=nn.Module)


def _filled(model: ModelT, weights: Mapping[str, Tensor], place: str) -> ModelT:
    """The model, which is on the meta device, with weights that must fit it exactly."""
    load_strictly(model, weights, place)
    return model.eval()


def read_config(path: Path, expected_class: str) -> dict[str, Any]:
    """The contents of a model's config.json; ValueError if it is of another class."""
    values = read_json(path)
    found = values.get("_class_name", expected_class)
    if found != expected_class:
        kind = found if isinstance(found, str) and found.isidentifier() else shortened(found)
        raise ValueError(f"{path} describes a {kind}, not a {expected_class}")
    return values


def check_types(header: Mapping[str, Tensor], dtype: torch.dtype | None, place: str) -> None:
    """Raise ValueError unless all weights are floating-point numbers, of one type in which a model can compute.

    dtype: what they will be loaded in; None: their own.
    """
    for key, tensor in header.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{place}: {key} is of type {_name(tensor.dtype)}, weights are floating-point numbers")
    found = sorted({_name(tensor.dtype) for tensor in header.values()})
    if dtype is None and (len(found) > 1 or found[0].startswith("float8")):
        raise ValueError(
            f"{place} has weights of type {' and '.join(found)}; give a dtype to load them in: torch.float32, "
            "torch.bfloat16 or torch.float16"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_files(files: Iterable[Path], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several files; ValueError if two of them have the same. read: reads one file."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        own = read(path)
        if twice := tensors.keys() & own.keys():
            raise ValueError(f"{shown_path(path)} has {shown(min(twice))}, which another file of the model has too")
        tensors |= own
    return tensors


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
NO_COMPONENT = [None, None]  # in model_index.json; no "vae" means pixel space


def is_pixel_space(folder: Path) -> bool:
    """Whether a pipeline's folder works on the images themselves, without an autoencoder.

    A latent diffusion model's folder may lack its autoencoder too, but then its scheduler does not clip.
    """
    if read_json(folder / PIPELINE_FILE).get("vae") != NO_COMPONENT:
        return False
    return read_json(folder / "scheduler" / "scheduler_config.json").get("clip_sample") is True


AUTOENCODER_FILES = (PIPELINE_FILE, *model_patterns(WEIGHTS_STEM, None), *model_patterns(WEIGHTS_STEM, None, "vae"))


def autoencoder_folder(name: str | Path, what: str = "autoencoder", files: Sequence[str] = AUTOENCODER_FILES) -> Path:
    """The folder of the autoencoder of a stage 1 run, of a pipeline, or of a hub repository of either.

    what: stands before the name in messages. files: that are wanted of a repository.
    Raises ValueError if there is none.
    """
    hint = "train one with `latentdiff train-vae`, or give the folder, single file or hub id of a pipeline"
    run = local_path(name, files, what, hint)
    if run.is_file():
        raise ValueError(f"{run} is a file; make a folder of it: latentdiff export {run} --format diffusers")
    index = run / PIPELINE_FILE
    if index.is_file() and read_json(index).get("vae") == NO_COMPONENT:
        raise ValueError(
            f"{run} is in pixel space (vae: null) and has no autoencoder; give the folder of a run of stage 1"
        )
    return run / "vae" if (run / "vae").is_dir() else run
