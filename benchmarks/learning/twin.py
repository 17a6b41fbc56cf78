"""The twin: diffusers' UNet2DConditionModel and a CLIP text encoder of the config's shapes, trained as in diffusers'
examples/text_to_image/train_text_to_image.py.

The text encoder is ours, whose numbers and initial weights are those of transformers' CLIPTextModel. As there are
torch's initial weights, independent timesteps, MSE, AdamW, gradients clipped to a norm,
EMAModel with its own defaults. Images, their order, captions with dropout, batch, steps and learning rate are those of
the config, so that the twin and our own training see the same.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latentdiff.config import UNetTrainingConfig
from latentdiff.data.batches import StepBatches, loader
from latentdiff.data.captioned_images import open_images
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.optimizer import learning_rate_at, set_learning_rate
from latentdiff.training.unet_inputs import UNetInputs
from latentdiff.training.unet_model import build_text_encoder, generation_defaults, open_latent_space


class Twin(nn.Module):
    """Diffusers' UNet with a CLIP text encoder: called like `TextConditionedUNet`."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """[B, C, h, w], [B] int64, [B, L] int64 -> the UNet's output [B, C, h, w]."""
        return self.unet(noisy_latents, timesteps, self.text_encoder(input_ids)).sample


def build_twin(config: UNetTrainingConfig) -> Twin:
    """With random weights that depend on train.seed, as the two libraries draw them."""
    set_seed(config.train.seed)
    unet = UNet2DConditionModel.from_config(config.model.to_diffusers())
    assert isinstance(unet, UNet2DConditionModel)
    return Twin(unet, build_text_encoder(config.text, seed_for(config.train.seed, Stream.TEXT_INIT))).train()


def build_twin_optimizer(network: Twin, config: UNetTrainingConfig) -> torch.optim.AdamW:
    """One parameter group, as in the script: weight decay is for all parameters alike."""
    settings = config.optimizer
    return torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def train_twin(config: UNetTrainingConfig, after_step: Callable[[], None]) -> None:
    """Train for train.steps and save the pipeline of the averaged weights in output.folder."""
    train, schedule, folder = config.train, config.diffusion, Path(config.output.folder)
    config, vae = open_latent_space(config)
    accelerator, plan = start_accelerator(config)
    assert plan.accumulation == 1, "the twin takes a batch at once"
    images, _ = open_images(config.data, vae.config.in_channels, train.seed, progress=False)
    network = build_twin(config)
    tokenizer = CLIPTokenizer.load(max_length=network.text_encoder.max_length)
    inputs = UNetInputs(config, vae, tokenizer, network.text_encoder, accelerator)
    data = inputs.open(images, folder, progress=False)
    order = StepBatches(len(images), plan, 0, train.seed, 0, train.steps, config.data.repeat)
    model, optimizer = accelerator.prepare(network, build_twin_optimizer(network, config))
    ema = EMAModel(network.parameters())
    for step, batch in enumerate(loader(data, order, 0, pin_memory=False)):
        set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
        latents, input_ids, _, _ = inputs(batch)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.num_train_timesteps, (len(latents),), device=latents.device)
        loss = diffusion_loss(model, schedule, latents, input_ids, noise, timesteps).mean()
        accelerator.backward(loss)
        if config.optimizer.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        after_step()
    ema.copy_to(network.parameters())
    unet = UNet(config.model)
    unet.load_state_dict(network.unet.state_dict())
    defaults = generation_defaults(config.validation)
    pipeline = LatentDiffusionPipeline(vae, unet, network.text_encoder, tokenizer, schedule, defaults)
    pipeline.save_pretrained(folder)
    accelerator.end_training()
