"""The inputs of stage 2's loss for a micro-batch: latents, condition, noise, timesteps.

Each is a function of (seed, step, index in the global batch): a resume or another number of processes changes nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.config import UNetTrainingConfig
from latentdiff.data.batches import Batch
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.latent_cache import LatentCache
from latentdiff.data.shapes import Shape
from latentdiff.devices import to_device
from latentdiff.diffusion.objective import drop_captions
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.models.pretrained_text import AnyTextEncoder, Tokenizer
from latentdiff.randomness import Stream, logit_normal_quantiles, normal, spread_timesteps, uniform


class Inputs(NamedTuple):
    """Arguments of `diffusion_loss` for one micro-batch, on the device."""

    latents: Tensor  # [b, C, h, w], a sample of the posterior
    condition: Tensor  # input_ids [b, L], or context [b, L, D] of a frozen text encoder
    noise: Tensor  # [b, C, h, w]
    timesteps: Tensor  # [b] int64


class UNetInputs:
    """Maps a micro-batch (images, or their cached moments) to the inputs of the loss."""

    def __init__(
        self,
        config: UNetTrainingConfig,
        vae: Autoencoder,
        tokenizer: Tokenizer,
        text_encoder: AnyTextEncoder,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.train = config, config.train
        self.vae, self.tokenizer, self.accelerator, self.device = vae, tokenizer, accelerator, accelerator.device
        self.frozen_text = None if config.trains_text_encoder else text_encoder
        self.unconditional_ids = tokenizer([""])[0].to(self.device)
        self.unconditional_context: Tensor | None = None

    def open(self, images: CaptionedImages, run: Path, progress: bool) -> LatentCache | CaptionedImages:
        """The data set to load: the images, or the cache of their moments, which is completed first."""
        if not self.train.cache_latents:
            return images
        shared = self.train.cache_folder
        cache = LatentCache.open(
            run / "latents" if shared is None else Path(shared).expanduser(),
            "train",
            images,
            self.vae,
            self.tokenizer,
            self.frozen_text,
            self.config.validation.batch_size,
            self.accelerator,
            progress,
            replace=shared is None,
        )
        if cache.unconditional_context is not None:
            self.unconditional_context = cache.unconditional_context.to(self.device)
        return cache

    def __call__(self, batch: Batch) -> Inputs:
        latents = self._latents(batch)
        return Inputs(latents, self._condition(batch), self._noise(batch, latents.shape[1:]), self._timesteps(batch))

    def blank(self, count: int, shape: Shape) -> Inputs:
        """Zeros in the shapes of a micro-batch of `count` images, to find out how many fit into memory.

        shape: height and width of the images, pixels.
        """
        grid = [side // self.vae.config.downsampling for side in shape]
        latents = torch.zeros(count, self.config.model.in_channels, *grid, device=self.device)
        timesteps = torch.zeros(count, dtype=torch.long, device=self.device)
        return Inputs(latents, self.encode(self.unconditional_ids.expand(count, -1)), latents, timesteps)

    def encode(self, input_ids: Tensor) -> Tensor:
        """What the model takes as its condition: the frozen encoder's context, or input_ids where it is trained."""
        if self.frozen_text is None:
            return input_ids
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.frozen_text(input_ids)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        if "moments" in batch:
            moments = to_device(batch["moments"], self.device)
        else:
            assert "pixels" in batch
            moments = self.vae.encode(to_device(batch["pixels"], self.device))
        shape = (self.config.model.in_channels, *moments.shape[-2:])
        noise = normal(shape, self.train.seed, Stream.POSTERIOR, batch["step"], batch["sample_indices"])
        return self.vae.sample(moments, to_device(noise, self.device))

    def _condition(self, batch: Batch) -> Tensor:
        """The conditioning of a batch, with caption dropout applied."""
        draws = uniform(self.train.seed, Stream.CAPTION_DROPOUT, batch["step"], batch["sample_indices"])
        draws = to_device(draws, self.device)
        dropout = caption_dropout_at(batch["step"], self.train.steps, self.train.caption_dropout)
        if self.unconditional_context is not None:
            assert "context" in batch
            context = to_device(batch["context"], self.device)
            return drop_captions(context, self.unconditional_context, dropout, draws)
        ids = self.tokenizer(batch["captions"])
        return self.encode(drop_captions(to_device(ids, self.device), self.unconditional_ids, dropout, draws))

    def _noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit Gaussian noise [b, *shape]; train.offset_noise shifts each channel of it (Guttenberg 2023)."""
        step, samples = batch["step"], batch["sample_indices"]
        noise = normal(shape, self.train.seed, Stream.NOISE, step, samples)
        if self.train.offset_noise:
            shift = normal((shape[0], 1, 1), self.train.seed, Stream.OFFSET_NOISE, step, samples)
            noise = noise + self.train.offset_noise * shift
        return to_device(noise, self.device)

    def _timesteps(self, batch: Batch) -> Tensor:
        train = self.train
        logit_normal = train.timestep_density == "logit_normal"
        timesteps = spread_timesteps(
            self.config.diffusion.num_train_timesteps,
            train.seed,
            batch["step"],
            batch["sample_indices"],
            train.batch_size,
            logit_normal_quantiles(train.logit_mean, train.logit_std) if logit_normal else None,
        )
        return to_device(timesteps, self.device)


def caption_dropout_at(step: int, total_steps: int, dropout: float | tuple[float, float]) -> float:
    """Fraction of captions dropped at optimiser step `step` (0-based); a pair is linear from first to last step."""
    if not isinstance(dropout, tuple):
        return dropout
    first, last = dropout
    return first + (last - first) * min(1.0, step / max(1, total_steps - 1))
