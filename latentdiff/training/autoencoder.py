"""The autoencoder of stage 1 before and after its training: where it starts from, the scale of its latents."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.config import (
    VAETrainingConfig,
)
from latentdiff.evaluation.reconstruction import latent_statistics
from latentdiff.formats.diffusers_folder import autoencoder_folder
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.randomness import Stream, generator, seed_for


def start_autoencoder(config: VAETrainingConfig) -> AutoencoderKL:
    """Stage 1's model: new, or that of `init_from`; with `freeze_encoder` only its decoder is trained.

    ValueError if the folder's model is not the config's.
    """
    if config.init_from is None:
        # The scale of the latents is measured at the end; until then they are the posterior's own.
        unscaled = config.model.model_copy(update={"scaling_factor": 1.0, "shift_factor": None})
        return AutoencoderKL.from_config(unscaled, seed_for(config.train.seed, Stream.INIT))
    folder = Path(config.init_from).expanduser()
    vae = AutoencoderKL.from_pretrained(autoencoder_folder(folder))
    own = ("sample_size", "scaling_factor", "shift_factor", "force_upcast")  # the folder's say
    for key, value in config.model.model_dump(exclude=set(own)).items():
        if getattr(vae.config, key) != value:
            raise ValueError(f"model.{key} is {value}, but the autoencoder in {folder} has {getattr(vae.config, key)}")
    if config.freeze_encoder:
        for module in (vae.encoder, vae.quant_conv):
            if module is not None:
                module.requires_grad_(False)
    return vae


def scale_latents(
    vae: AutoencoderKL,
    config: VAETrainingConfig,
    batches: Iterable[tuple[list[int], Tensor]],
    accelerator: Accelerator,
) -> None:
    """At the end of stage 1: unit-scale latents over the batches of all processes, which are the training images.

    A new autoencoder gets it per channel, folded into its convolutions, a given one by its one factor; where the
    decoder alone was trained the latents stay what they were.
    """
    if config.freeze_encoder:
        return
    statistics = latent_statistics(vae, batches, accelerator)
    if config.init_from is None:
        vae.set_latent_statistics(*statistics)
    else:
        vae.set_scaling_factor(*statistics)


def random_crops(pixels: Tensor, size: int, seed: int, step: int, sample_indices: Sequence[int]) -> Tensor:
    """A square [B, C, size, size] of each image [B, C, H, W], at a place that depends on (seed, step, sample_index)."""
    room = torch.tensor([pixels.shape[2] - size, pixels.shape[3] - size])
    crops = []
    for image, sample_index in zip(pixels, sample_indices, strict=True):
        places = torch.rand(2, generator=generator(seed, Stream.TRAINING_CROP, step, sample_index))
        top, left = (places * (room + 1)).long().tolist()
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)
