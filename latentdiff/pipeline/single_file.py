"""A pipeline's single file in Stable Diffusion's layout: opened and written."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from latentdiff.formats.diffusers_folder import PREVIEW_FILE
from latentdiff.formats.files import write_json, write_safetensors
from latentdiff.formats.scheduler_config import read_scheduler_config
from latentdiff.formats.single_file import (
    NAMES,
    PADDING,
    PREDICTIONS,
    TOKENS,
    from_folder,
    read_single_file,
)
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline.folder import GENERATION_FILE, Parts, read_defaults
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.trained_on import TrainedOn

SUFFIX = ".safetensors"


def open_single_file(path: Path, dtype: torch.dtype | None, prediction_type: str | None) -> Parts:
    """The parts of a single file.

    prediction_type: None: what the file says, else epsilon for Stable Diffusion 1 and v_prediction for 2. The size of
    the images is what the file says, else 512, or 768 for Stable Diffusion 2 with v_prediction.
    Raises ValueError as `read_single_file`, and if a tensor is missing or of another shape.
    """
    file = read_single_file(path)
    scheduler = file.scheduler_config(prediction_type)
    weights = file.weights()
    unet_config, vae_config = file.unet, file.vae
    if "unet/config.json" not in file.folder:
        side = 96 if file.layout == "sd2" and scheduler["prediction_type"] == "v_prediction" else 64
        unet_config = unet_config.model_copy(update={"sample_size": side})
        vae_config = vae_config.model_copy(update={"sample_size": side * vae_config.downsampling})
    unet = UNet.from_weights(unet_config, weights["unet"], f"{path}, its UNet", dtype)
    vae = AutoencoderKL.from_weights(vae_config, weights["vae"], f"{path}, its autoencoder", dtype)
    text_encoder = TextEncoder.from_weights(
        file.text_encoder, weights["text_encoder"], f"{path}, its text encoder", dtype or torch.float32
    )
    tokenizer = CLIPTokenizer.load(max_length=TOKENS, pad_token=PADDING[file.layout])
    try:
        schedule, sampler, sigmas = read_scheduler_config(scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with tempfile.TemporaryDirectory() as place:  # the readers of these small files read them from a folder
        folder = Path(place)
        for name, values in file.folder.items():
            write_json(values, folder / name)
        defaults = read_defaults(folder / GENERATION_FILE, sampler, sigmas)
        has_preview = (folder / "vae" / PREVIEW_FILE).is_file()
        preview = LatentPreview.load(folder / "vae") if has_preview else None
        trained_on = TrainedOn.load(folder)
    return Parts(vae, unet, text_encoder, tokenizer, schedule, defaults, preview, trained_on)


def write_single_file(folder: Path, path: Path) -> None:
    """Write the single file of a pipeline's folder, which another file of that name is replaced by.

    Warns if other tools will take the network's output for something else.
    Raises ValueError, which says why, if no single file names the model.
    """
    tensors, metadata, layout = from_folder(folder)
    said: Any = metadata["modelspec.prediction_type"]
    if said[0] != PREDICTIONS[layout][0]:
        warnings.warn(
            f"most tools take a file of {NAMES[layout]} for {PREDICTIONS[layout]}: tell them that this one is "
            f"{'v_prediction' if said == 'v' else said}",
            stacklevel=2,
        )
    write_safetensors(tensors, path, metadata)
