"""What a variant costs and how good it is: CPU time and FLOPs of a step, scores of the trained pipeline."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.config import UNetTrainingConfig, shape_of
from latentdiff.data.captioned_images import open_images
from latentdiff.data.compositions import CompositionSet, compositions
from latentdiff.data.latent_cache import encode_means
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.evaluation.compositions import score, some_of
from latentdiff.evaluation.prompts import generate
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.run import Run
from latentdiff.training.unet_evaluation import validation_loss


@dataclass
class StepClock:
    """CPU seconds, of all threads, of each optimiser step but the first."""

    seconds: list[float] = field(default_factory=list)
    last: float | None = None

    def tick(self) -> None:
        """After each step."""
        now = time.process_time()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, tick after each step of a training script."""
        original = Run.report

        def report(run: Run, *values: Any) -> None:
            self.tick()
            original(run, *values)

        with patch.object(Run, "report", report):
            yield


def flops_per_step(network: nn.Module, optimizer: Optimizer, config: UNetTrainingConfig, tokens: int) -> int:
    """FLOPs of an optimiser step: matrix products and convolutions of the network and of the optimiser.

    Forward and backward pass of one image are counted, times train.batch_size. tokens: the length of input_ids.
    """
    assert config.model.sample_size is not None
    latents = torch.zeros(1, config.model.in_channels, *shape_of(config.model.sample_size))
    timesteps, input_ids = torch.zeros(1, dtype=torch.long), torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as image:
        diffusion_loss(network, config.diffusion, latents, input_ids, latents, timesteps).mean().backward()
    with FlopCounterMode(display=False) as update:
        optimizer.step()
    return image.get_total_flops() * config.train.batch_size + update.get_total_flops()


def scores(pipeline: LatentDiffusionPipeline, config: UNetTrainingConfig, prompts: int) -> dict[str, Any]:
    """Of images of held-out compositions of one object (image i has seed i), and the loss on held-out images."""
    family = CompositionSet.of(config.data)
    held_out = [one for one in compositions(family, "held_out") if len(one.figures) == 1]
    wanted = some_of(held_out, prompts)
    batch_size = config.validation.batch_size
    images = generate(pipeline, [one.prompt for one in wanted], config.data.shape, 0, batch_size, progress=False)
    result = score(family, wanted, images)
    rates = {name: getattr(result, name).hits for name in ("exact", "style", "object", "colour", "background")}
    return {
        **rates,
        "copies": result.copies,
        "psnr": round(result.psnr, 3),
        "validation_loss": round(velocity_loss(pipeline, config), 5),
    }


def velocity_loss(pipeline: LatentDiffusionPipeline, config: UNetTrainingConfig) -> float:
    """The mean squared error of v on all held-out images with fixed noise, whatever the network predicts."""
    _, held_out = open_images(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=False)
    latents = encode_means(pipeline.vae, held_out, config.validation.batch_size)
    ids = pipeline.tokenizer(held_out.captions)
    network = TextConditionedUNet(pipeline.unet, pipeline.text_encoder).eval()
    schedule = pipeline.schedule

    def velocity(noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return as_velocity(schedule, network(noisy, timesteps, condition), noisy, timesteps)

    in_v = replace(schedule, prediction_type="v_prediction")
    batch_size, bins = config.validation.batch_size, config.validation.bins
    return validation_loss(velocity, in_v, latents, lambda indices: ids[list(indices)], batch_size, bins).mean


def as_velocity(schedule: NoiseSchedule, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """v = alpha * epsilon - sigma * x0 that an output implies, where noisy = alpha * x0 + sigma * epsilon."""
    alpha, sigma = schedule.alpha_sigma(timesteps, noisy)
    if schedule.prediction_type == "epsilon":
        return (output - sigma * noisy) / alpha
    if schedule.prediction_type == "sample":
        return (alpha * noisy - output) / sigma
    return output
