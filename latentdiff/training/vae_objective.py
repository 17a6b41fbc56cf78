"""Stage 1's loss as one object: reconstruction, KL, perceptual and adversarial terms, and the networks they train."""

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.config import OptimizerConfig, VAETrainingConfig
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentdiff.models.perceptual import PerceptualLoss, get_perceptual
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.adversarial import AdversarialLoss, DiscriminatorState
from latentdiff.training.loss_meter import Window
from latentdiff.training.optimizer import apply_gradients, build_optimizer, set_learning_rate
from latentdiff.training.vae_losses import gaussian_nll, reconstruction_error


class VAEObjective:
    """Reconstruction + kl_weight * KL (+ perceptual, adversarial, learned log-variance), each from its start step on.

    Call it on a micro-batch for the terms, "loss" among them; `learn` then trains the discriminator on the same
    micro-batch. `clip` and `step` end the optimiser step of the networks other than the autoencoder.
    names: of the terms, for the log.
    """

    def __init__(
        self, config: VAETrainingConfig, vae: AutoencoderKL, accelerator: Accelerator, smallest_side: int
    ) -> None:
        """smallest_side: of the training images, pixels. Raises ValueError for terms that would fail at their start."""
        self.config, self.loss, self.accelerator = config, config.loss, accelerator
        self.vae = vae
        self.perceptual: PerceptualLoss | None = None
        self.logvar: LearnedLogvar | None = None
        self.adversarial: AdversarialLoss | None = None
        self.names = ["loss", "reconstruction", "kl"]
        if self.loss.perceptual is not None:
            perceptual = get_perceptual(self.loss.perceptual, self.loss.perceptual_weights)
            self.perceptual = perceptual.to(accelerator.device)
            self.names += ["perceptual"]
        check_losses(config, self.perceptual, accelerator, smallest_side)
        if self.loss.learned_logvar:
            self.logvar = LearnedLogvar(config.optimizer, accelerator)
        if self.loss.adversarial is not None:
            state = DiscriminatorState(new_discriminator(config)).to(accelerator.device)
            last_layer = vae.decoder.conv_out.weight
            self.adversarial = AdversarialLoss(self.loss, config.optimizer, state, last_layer, accelerator)
            self.names += ["adversarial", "discriminator", "discriminator_accuracy"]

    @property
    def trained(self) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        """The networks with optimisers of their own, for the checkpoint."""
        parts: dict[str, tuple[nn.Module, Optimizer]] = {}
        if self.logvar is not None:
            parts["logvar"] = (self.logvar.module, self.logvar.optimizer)
        if self.adversarial is not None:
            parts["discriminator"] = (self.adversarial.state, self.adversarial.optimizer)
        return parts

    def __call__(
        self, pixels: Tensor, reconstruction: Tensor, moments: Tensor, step: int, weight: float
    ) -> dict[str, Tensor]:
        """Scalar terms of a micro-batch that makes up the fraction `weight` of the step's images.

        pixels, reconstruction: [b, C, H, W]; moments: [b, 2C, h, w].
        """
        error = reconstruction_error(self.loss.reconstruction, reconstruction, pixels)
        kl = self.vae.unit_posterior(moments.float()).kl() / pixels[0].numel()
        terms = {"reconstruction": error.mean(), "kl": kl.mean()}
        loss = terms["reconstruction"] if self.logvar is None else self.logvar.model(error).mean()
        if step >= self.loss.kl_start:
            loss = loss + self.loss.kl_weight * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = torch.zeros_like(loss)
            if step >= self.loss.perceptual_start:
                terms["perceptual"] = self.perceptual(reconstruction, pixels).mean()
                loss = loss + self.loss.perceptual_weight * terms["perceptual"]
        if self.adversarial is not None:
            terms |= dict.fromkeys(self.names[-3:], torch.zeros_like(loss))
            if self.adversarial.active(step):
                weighted, terms["adversarial"] = self.adversarial.generator_term(
                    terms["reconstruction"], reconstruction, weight
                )
                loss = loss + weighted
        return terms | {"loss": loss}

    def trial(self, model: nn.Module, pixels: Tensor, noise: Tensor) -> Tensor:
        """The loss of a micro-batch without the adversarial term, to find out how many images fit into memory."""
        reconstruction, moments = model(pixels, noise)
        loss = reconstruction_error(self.loss.reconstruction, reconstruction, pixels).mean()
        loss = loss + self.loss.kl_weight * self.vae.unit_posterior(moments.float()).kl().mean()
        if self.perceptual is not None:
            loss = loss + self.perceptual(reconstruction, pixels).mean()
        return loss

    def learn(
        self, pixels: Tensor, reconstruction: Tensor, step: int, weight: float, *, last: bool
    ) -> dict[str, Tensor]:
        """Accumulate the discriminator's gradients on a micro-batch; its loss and accuracy. Empty without one."""
        if self.adversarial is None or not self.adversarial.active(step):
            return {}
        loss, accuracy = self.adversarial.learn(pixels, reconstruction.detach(), weight, last=last)
        return {"discriminator": loss, "discriminator_accuracy": accuracy}

    def clip(self, step: int) -> list[Tensor]:
        """Clip the discriminator's gradients. Returns the norms before; if one is not finite, the step is skipped."""
        if self.adversarial is None or not self.adversarial.active(step):
            return []
        return [self.adversarial.clip()]

    def step(self, step: int, lr: float, skip: Tensor) -> None:
        """The optimiser steps of log-variance and discriminator, or none where `skip` is 1.0."""
        if self.logvar is not None:
            self.logvar.step(lr, skip)
        if self.adversarial is not None and self.adversarial.active(step):
            self.adversarial.step(lr * self.loss.discriminator_lr_factor, skip)

    def values(self, finished_steps: int, window: Window) -> dict[str, float]:
        """Values for the log line after `finished_steps`; pauses or resumes the adversarial term. The host waits."""
        if self.adversarial is None:
            return {}
        values = self.adversarial.values()
        if window.means:
            message = self.adversarial.update_pause(finished_steps, window.means["reconstruction"])
            if message is not None:
                self.accelerator.print(f"\n{message}")
        return values


class Logvar(nn.Module):
    """The log-variance of the decoder's output, one number for all pixels; it starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, error: Tensor) -> Tensor:
        """Reconstruction errors [B] -> their negative log-likelihoods [B], up to a constant."""
        return gaussian_nll(error, self.log_variance)


class LearnedLogvar:
    """Trains the log-variance: the smaller the error, the more the reconstruction weighs against the other terms."""

    def __init__(self, config: OptimizerConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.module = Logvar().to(accelerator.device)
        self.model: nn.Module
        self.optimizer: AcceleratedOptimizer
        self.model, self.optimizer = accelerator.prepare(self.module, build_optimizer(self.module, config))

    def step(self, lr: float, skip: Tensor) -> None:
        """An optimiser step, or none where `skip` is 1.0."""
        set_learning_rate(self.optimizer, lr)
        apply_gradients(self.accelerator, self.optimizer, skip)


def check_losses(
    config: VAETrainingConfig, perceptual: PerceptualLoss | None, accelerator: Accelerator, smallest_side: int
) -> None:
    """Raise ValueError, before training, for crops or terms of stage 1's loss that would fail at their start step.

    smallest_side: of the training images, pixels.
    """
    loss, crop = config.loss, config.train.crop_size
    if crop is not None and crop > smallest_side:
        raise ValueError(
            f"train.crop_size is {crop}, must be at most {smallest_side}, the shortest side of the buckets; or set "
            "data.buckets=false"
        )
    size = crop or smallest_side
    if perceptual is not None and size < perceptual.smallest_side:
        raise ValueError(
            f"loss.perceptual {loss.perceptual} needs images of {perceptual.smallest_side} px, these have {size}"
        )
    if loss.adversarial is not None and size < _discriminator_config(config).smallest_side:
        raise ValueError(
            f"loss.discriminator_layers {loss.discriminator_layers} needs images of "
            f"{_discriminator_config(config).smallest_side} px, these have {size}: use fewer layers"
        )
    several = [key for key in ("adversarial", "learned_logvar") if getattr(loss, key)]
    if several and accelerator.is_fsdp2:
        raise ValueError(f"loss.{several[0]} is not possible under FSDP2; the autoencoder fits without sharding")
    if several and accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"loss.{several[0]} is not possible with train.precision fp16, whose loss scale serves one optimiser: use "
            "bf16"
        )


def _discriminator_config(config: VAETrainingConfig) -> DiscriminatorConfig:
    return DiscriminatorConfig(
        in_channels=config.model.out_channels,
        width=config.loss.discriminator_width,
        layers=config.loss.discriminator_layers,
        norm_num_groups=math.gcd(32, 2 * config.loss.discriminator_width),
    )


def new_discriminator(config: VAETrainingConfig) -> PatchDiscriminator:
    """The discriminator of stage 1, its weights a function of the seed."""
    seed = seed_for(config.train.seed, Stream.DISCRIMINATOR_INIT)
    return PatchDiscriminator.from_config(_discriminator_config(config), seed)
