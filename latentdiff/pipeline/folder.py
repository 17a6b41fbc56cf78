"""A pipeline's folder in the diffusers layout: read and written part by part."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.formats.diffusers_folder import (
    COMPONENTS,
    INDEX,
    MODEL_FILES,
    NO_COMPONENT,
    PIPELINE_FILE,
    PREVIEW_FILE,
    is_pixel_space,
)
from latentdiff.formats.files import read_json, write_json
from latentdiff.formats.scheduler_config import read_scheduler_config, write_scheduler_config
from latentdiff.formats.swap import replacing_model
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import Autoencoder, PixelSpace
from latentdiff.models.text_encoder import TEXT_ENCODER_FILES, TextEncoder
from latentdiff.models.tokenizer import TOKENIZER_FILES, CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline.options import GenerationDefaults
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.trained_on import TRAINED_ON_FILE, TrainedOn
from latentdiff.printable import first_line

if TYPE_CHECKING:
    from latentdiff.pipeline.pipeline import LatentDiffusionPipeline

GENERATION_FILE = "generation_config.json"
# What belongs to a pipeline, also to one of Stable Diffusion, as patterns.
PIPELINE_FILES = (
    *(f"{part}/{name}" for part in ("vae", "unet") for name in MODEL_FILES),
    *(f"text_encoder/{name}" for name in TEXT_ENCODER_FILES),
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *("scheduler/scheduler_config.json", "safety_checker/*", "feature_extractor/*", "image_encoder/*"),
    *(GENERATION_FILE, TRAINED_ON_FILE, PIPELINE_FILE),
)
SCHEDULED = ("sampler", "sigmas")  # defaults that are in scheduler_config.json


class Parts(NamedTuple):
    """What a pipeline is made of."""

    vae: Autoencoder
    unet: UNet
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    defaults: GenerationDefaults
    preview: LatentPreview | None
    trained_on: TrainedOn | None


def read_folder(name: str, dtype: torch.dtype | None, variant: str | None) -> Parts:
    """The parts of a folder or model id; ValueError if one is missing, damaged or of an unsupported kind."""
    folder = _local_folder(name, variant)
    index = read_json(folder / PIPELINE_FILE)
    pixel_space = is_pixel_space(folder)
    for part in COMPONENTS:
        if not (folder / part).is_dir() and not (part == "vae" and pixel_space):
            raise ValueError(f"{folder} has no {part}/ ({PIPELINE_FILE}: {index.get(part)})")
    tokenizer = CLIPTokenizer.load(folder / "tokenizer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    try:
        schedule, sampler, sigmas = read_scheduler_config(read_json(scheduler))
    except ValueError as error:
        raise ValueError(f"{scheduler}: {error}") from None
    unet = UNet.from_pretrained(folder / "unet", dtype=dtype, variant=variant)
    vae: Autoencoder = (
        PixelSpace(unet.config.in_channels)
        if pixel_space
        else AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=variant)
    )
    text_encoder = TextEncoder.from_pretrained(
        str(folder), frozen=True, subfolder="text_encoder", dtype=dtype, variant=variant
    )
    defaults = read_defaults(folder / GENERATION_FILE, sampler, sigmas)
    has_preview = not pixel_space and (folder / "vae" / PREVIEW_FILE).is_file()
    preview = LatentPreview.load(folder / "vae") if has_preview else None
    return Parts(vae, unet, text_encoder, tokenizer, schedule, defaults, preview, TrainedOn.load(folder))


def write_folder(pipeline: "LatentDiffusionPipeline", folder: Path) -> None:
    """Write the diffusers layout in place of an old pipeline, in one step.

    Raises ValueError if the folder holds a single model, or one of its parts would replace that of a training run.
    """
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a single model (config.json); save the pipeline into another folder")
    for part in COMPONENTS:
        if (folder / part / "config.yaml").is_file():
            raise ValueError(f"{folder / part} is a training run; save the pipeline into another folder")
    with replacing_model(folder, PIPELINE_FILES, PIPELINE_FILE) as new:
        _write_parts(pipeline, new)


def _write_parts(pipeline: "LatentDiffusionPipeline", folder: Path) -> None:
    vae, defaults = pipeline.vae, pipeline.defaults
    scheduler = write_scheduler_config(pipeline.schedule, defaults.sampler, defaults.sigmas, vae.is_pixel_space)
    index = INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]}
    if vae.is_pixel_space:
        index["vae"] = NO_COMPONENT
    else:
        assert isinstance(vae, AutoencoderKL)
        vae.save_pretrained(folder / "vae")
        if pipeline.preview is not None:
            pipeline.preview.save(folder / "vae")
    pipeline.unet.save_pretrained(folder / "unet")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save(folder / "tokenizer")
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    values = {name: value for name, value in asdict(defaults).items() if name not in SCHEDULED}
    write_json(values, folder / GENERATION_FILE)
    if pipeline.trained_on is not None:
        pipeline.trained_on.save(folder)
    write_json(index, folder / PIPELINE_FILE)


def read_defaults(path: Path, sampler: str, sigmas: Sigmas) -> GenerationDefaults:
    """The folder's generation defaults; one written elsewhere has none but its scheduler's sampler."""
    if not path.is_file():
        return GenerationDefaults(sampler=sampler, sigmas=sigmas)
    values = {name: value for name, value in read_json(path).items() if name not in SCHEDULED}
    try:
        return GenerationDefaults(**values, sampler=sampler, sigmas=sigmas)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _local_folder(name: str, variant: str | None) -> Path:
    """The folder itself, or a snapshot of a hub repository: the files that a pipeline needs, safetensors only."""
    if os.path.isdir(os.path.expanduser(name)):
        return Path(name).expanduser()
    stem = "model" if variant is None else f"model.{variant}"
    wanted = [f"*/*{stem}.safetensors", f"*/*{stem}-0*.safetensors", "*/*.json", "*/*.txt"]
    wanted += [PIPELINE_FILE, GENERATION_FILE, TRAINED_ON_FILE]
    try:
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["safety_checker/*", "checkpoints/*"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"{name!r} is neither a folder nor a model that could be reached on the hub: {first_line(error)}"
        ) from None
