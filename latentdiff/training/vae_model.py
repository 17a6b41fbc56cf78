"""The autoencoder before and after stage 1: what it starts from, and its final latent scale."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.config import VAETrainingConfig, refuse_other_model
from latentdiff.evaluation.reconstruction import latent_statistics
from latentdiff.formats.files import refuse_not_finite
from latentdiff.models.autoencoder import AutoencoderKL, open_autoencoder
from latentdiff.randomness import Stream, seed_for


def initial_autoencoder(config: VAETrainingConfig) -> AutoencoderKL:
    """The autoencoder that stage 1 starts from: random weights, or those of `init_from`, perhaps with a frozen encoder.

    Raises ValueError if the model there is not the config's, or not finite.
    """
    if config.init_from is None:
        # The scale of the latents is measured at the end; until then they are the posterior's own.
        unscaled = config.model.model_copy(update={"scaling_factor": 1.0, "shift_factor": None})
        return AutoencoderKL.from_config(unscaled, seed_for(config.train.seed, Stream.INIT))
    vae = open_autoencoder(config.init_from, "init_from", torch.float32)
    refuse_not_finite(vae.state_dict(), f"the autoencoder in {config.init_from}")
    taken = {"sample_size", "scaling_factor", "shift_factor", "force_upcast"}  # from it, not compared
    refuse_other_model(config.model, vae.config, "model", f"the autoencoder in {config.init_from}", taken)
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
    """At the end of stage 1, make the latents of the training images (the batches of all processes) unit-scale.

    From random weights the scale is per channel and folded into the convolutions, with Stable Diffusion's factor left
    to readers; an autoencoder of `init_from` gets one factor; with a frozen encoder the latents stay what they were.
    """
    if config.freeze_encoder:
        return
    statistics = latent_statistics(vae, batches, accelerator)
    if config.init_from is None:
        vae.set_latent_statistics(*statistics)
    else:
        vae.set_scaling_factor(*statistics)
