"""A pipeline's folder in the diffusers layout: read and written part by part."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.formats.diffusers_folder import (
    COMPONENTS,
    INDEX,
    MODEL_FILES,
    NO_COMPONENT,
    PIPELINE_FILE,
    PREVIEW_FILE,
    WEIGHTS_STEM,
    is_pixel_space,
)
from latentdiff.formats.files import from_json, read_json, write_json
from latentdiff.formats.headers import is_there
from latentdiff.formats.hub import hub_files, local_path, weight_patterns
from latentdiff.formats.scheduler_config import read_scheduler_config, write_scheduler_config
from latentdiff.formats.swap import replacing_model
from latentdiff.formats.weight_files import has_weights
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import Autoencoder, PixelSpace
from latentdiff.models.pretrained_text import (
    AnyTextEncoder,
    PretrainedTextEncoder,
    PretrainedTokenizer,
    Tokenizer,
    open_text_encoder,
)
from latentdiff.models.text_encoder import TEXT_ENCODER_FILES, TextEncoder
from latentdiff.models.tokenizer import TOKENIZER_FILES, CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline.lora import refuse_adapters
from latentdiff.pipeline.options import GenerationDefaults
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.trained_on import TRAINED_ON_FILE, TrainedOn
from latentdiff.printable import MAX_LINE, cut, listed, shortened, shown, shown_path

if TYPE_CHECKING:
    from latentdiff.pipeline.pipeline import LatentDiffusionPipeline

GENERATION_FILE = "generation_config.json"
# What belongs to a pipeline, also to one of Stable Diffusion, as patterns.
PIPELINE_FILES = (
    *(f"{part}/{name}" for part in ("vae", "unet") for name in MODEL_FILES),
    *(f"text_encoder/{name}" for name in TEXT_ENCODER_FILES),
    *(f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "*.model", "vocab.txt")),  # also of others than CLIP
    *("scheduler/scheduler_config.json", "safety_checker/*", "feature_extractor/*", "image_encoder/*"),
    *(GENERATION_FILE, TRAINED_ON_FILE, PIPELINE_FILE),
)
WEIGHTED = {"unet": WEIGHTS_STEM, "vae": WEIGHTS_STEM, "text_encoder": "model"}  # how their weights' names begin
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of Stable Diffusion, which images do not depend on
SCHEDULED = ("sampler", "sigmas")  # defaults that are in scheduler_config.json


class Parts(NamedTuple):
    """What a pipeline is made of."""

    vae: Autoencoder
    unet: UNet
    text_encoder: AnyTextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    defaults: GenerationDefaults
    preview: LatentPreview | None
    trained_on: TrainedOn | None


def read_folder(name: str, dtype: torch.dtype | None, variant: str | None) -> Parts:
    """The parts of a folder or model id; ValueError if one is missing, damaged or of an unsupported kind.

    variant: of the parts that have it, which at least one must; of the others the weights without a variant are read.
    Warns of those, of further parts, and of weights that are not read.
    """
    folder = _local_folder(name, variant)
    if not (folder / PIPELINE_FILE).exists():
        raise ValueError(f"{folder / PIPELINE_FILE} does not exist{_what_is_there(folder)}")
    index = read_json(folder / PIPELINE_FILE)
    pixel_space = is_pixel_space(folder)
    for part in COMPONENTS:
        if not (folder / part).is_dir() and not (part == "vae" and pixel_space):
            raise ValueError(f"{folder} has no {part}/ ({PIPELINE_FILE}: {shortened(index.get(part))})")
    _warn_of_further_parts(folder, index)
    chosen = _variants(folder, variant, [part for part in WEIGHTED if part != "vae" or not pixel_space])
    scheduler = folder / "scheduler" / "scheduler_config.json"
    try:
        schedule, sampler, sigmas = read_scheduler_config(read_json(scheduler))
    except ValueError as error:
        named = str(scheduler) in str(error)
        raise ValueError(cut(str(error) if named else f"{scheduler}: {error}", MAX_LINE - 1)) from None
    defaults = read_defaults(folder / GENERATION_FILE, sampler, sigmas)
    trained_on = TrainedOn.load(folder)
    has_preview = not pixel_space and is_there(folder / "vae" / PREVIEW_FILE)
    preview = LatentPreview.load(folder / "vae") if has_preview else None
    unet = UNet.from_pretrained(folder / "unet", dtype=dtype, variant=chosen["unet"])
    vae: Autoencoder = (
        PixelSpace(unet.config.in_channels)
        if pixel_space
        else AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=chosen["vae"])
    )
    text_encoder = open_text_encoder(folder / "text_encoder", dtype=dtype, variant=chosen["text_encoder"])
    kind = CLIPTokenizer if isinstance(text_encoder, TextEncoder) else PretrainedTokenizer
    tokenizer = kind.load(folder / "tokenizer")
    return Parts(vae, unet, text_encoder, tokenizer, schedule, defaults, preview, trained_on)


def _what_is_there(folder: Path) -> str:
    """What a folder without a pipeline has instead, and what to give then; empty if nothing is known."""
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name")
        named = f" ({shortened(kind)})" if kind is not None else ""
        return f": the folder is one part of a model{named}; give that of the whole pipeline, such as a run of stage 2"
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    return f"; a model in a single file is opened by its own name: {files[0]}" if len(files) == 1 else ""


def write_folder(pipeline: "LatentDiffusionPipeline", folder: Path) -> None:
    """Write the diffusers layout in place of an old pipeline, in one step.

    Raises ValueError if the folder holds a single model, or one of its parts would replace that of a training run.
    """
    refuse_adapters(pipeline)
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
    if isinstance(pipeline.text_encoder, PretrainedTextEncoder):
        assert isinstance(pipeline.tokenizer, PretrainedTokenizer)
        index["text_encoder"] = ["transformers", pipeline.text_encoder.class_name]
        index["tokenizer"] = ["transformers", pipeline.tokenizer.class_name]
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    values = {name: value for name, value in asdict(defaults).items() if name not in SCHEDULED}
    write_json(values, folder / GENERATION_FILE)
    if pipeline.trained_on is not None:
        pipeline.trained_on.save(folder)
    write_json(index, folder / PIPELINE_FILE)


def read_defaults(path: Path, sampler: str, sigmas: Sigmas) -> GenerationDefaults:
    """The folder's generation defaults; one written elsewhere has none but its scheduler's sampler."""
    if not is_there(path):
        return GenerationDefaults(sampler=sampler, sigmas=sigmas)
    values = {name: value for name, value in read_json(path).items() if name not in SCHEDULED}
    return from_json(GenerationDefaults, values | {"sampler": sampler, "sigmas": sigmas}, path)


def _warn_of_further_parts(folder: Path, index: Mapping[str, Any]) -> None:
    """Such as `unet_ema` or `text_encoder_2`."""
    parts = [
        key
        for key, value in index.items()
        if isinstance(value, list) and value != NO_COMPONENT and not key.startswith("_")
    ]
    if further := [shown(part) for part in parts if part not in (*COMPONENTS, *UNUSED)]:
        warnings.warn(f"{shown_path(folder)} has further parts, which are not used: {listed(further)}", stacklevel=4)


def _variants(folder: Path, variant: str | None, parts: list[str]) -> dict[str, str | None]:
    """The variant of each part to read: the given one where there is such a file, else None."""
    having = [part for part in parts if variant is not None and has_weights(folder / part, WEIGHTED[part], variant)]
    lacking = [part for part in parts if part not in having]
    if variant is not None and not having:
        raise ValueError(f"no part of {shown_path(folder)} has the variant {shortened(variant)}: leave variant out")
    if variant is not None and lacking:
        warnings.warn(
            f"of {shown_path(folder)}, {' and '.join(lacking)} have no variant {shortened(variant)}: their weights "
            "without a variant are read",
            stacklevel=4,
        )
    return dict.fromkeys(parts) | dict.fromkeys(having, variant)


def _local_folder(name: str, variant: str | None) -> Path:
    """The folder itself, or a snapshot of a hub repository: the files that a pipeline needs, safetensors only."""
    wanted = [PIPELINE_FILE, GENERATION_FILE, TRAINED_ON_FILE, f"vae/{PREVIEW_FILE}", "scheduler/scheduler_config.json"]
    wanted += ["tokenizer/*.json", "tokenizer/*.txt", "tokenizer/*.model"]
    there = hub_files(name) if variant is not None and not os.path.exists(os.path.expanduser(name)) else None
    for part, stem in WEIGHTED.items():
        own = [f"{part}/{pattern}" for pattern in weight_patterns(stem, variant)]
        if there is not None and not any(fnmatch(file, pattern) for file in there for pattern in own):
            own = [f"{part}/{pattern}" for pattern in weight_patterns(stem, None)]
        wanted += [f"{part}/config.json", *own]
    return local_path(name, wanted, "pipeline")
