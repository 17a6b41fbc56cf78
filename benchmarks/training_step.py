"""CPU time of a training step, ours beside diffusers', in one process and with one thread.

python benchmarks/training_step.py [--rounds 6] [--precision bf16|fp32]

Stage 2 has the demo's UNet and text encoder and takes latents and token ids as from the cache; diffusers' side
is UNet2DConditionModel and transformers' CLIPTextModel with the fastest settings that its users can choose: fused
AdamW and a foreach EMA. Stage 1 has the demo's autoencoder on crops, with the MSE and the KL. Both sides compute the
same: gradients, clipping, AdamW, EMA. They take turns, and the table has the median of the process's own time, in which
other processes count less than on the clock.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TheirAutoencoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.training.ema import EMA
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.plan import completed
from latentdiff.training.vae_losses import reconstruction_error

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
ADAMW = ["optimizer.kind=adamw", "optimizer.lr=1.0e-3"]


class Theirs(nn.Module):
    """Diffusers' UNet with transformers' text encoder."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """[B, C, h, w], [B], [B, L] -> [B, C, h, w]."""
        return self.unet(latents, timesteps, self.text_encoder(input_ids).last_hidden_state).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each; one more is not timed")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {arguments.precision} | ours, ms | diffusers, ms | diffusers / ours |\n|---|---|---|---|")
    for name, sides in (("stage 2, demo", stage_2()), ("stage 1, demo", stage_1())):
        ours, theirs = (median(times) for times in alternated(sides, arguments.rounds, arguments.precision))
        print(f"| {name} | {1e3 * ours:.0f} | {1e3 * theirs:.0f} | {theirs / ours:.2f} |", flush=True)


def alternated(sides: tuple[Callable[..., None], ...], rounds: int, precision: str) -> list[list[float]]:
    """CPU seconds of each round of each side, the first round left out."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, own in zip(sides, times, strict=True):
            start = time.process_time()
            side(torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext())
            if turn:
                own.append(time.process_time() - start)
    return times


def stage_2() -> tuple[Callable[..., None], Callable[..., None]]:
    """Steps of our network and of theirs, with the demo's shapes."""
    vae = load_config(VAETrainingConfig, CONFIGS / "vae.yaml").model
    config = completed(load_config(UNetTrainingConfig, CONFIGS / "unet.yaml", ADAMW), vae)
    assert isinstance(config, UNetTrainingConfig) and config.text.config is not None
    text = TextEncoder.from_config(config.text.config, 0)
    ours = TextConditionedUNet(UNet.from_config(config.model, 0), text)
    unet = UNet2DConditionModel.from_config(config.model.to_diffusers())
    assert isinstance(unet, UNet2DConditionModel)
    theirs = Theirs(unet, CLIPTextModel(CLIPTextConfig(**config.text.config))).train()
    batch, size = config.train.batch_size, config.model.sample_size
    latents, noise = torch.randn(2, batch, config.model.in_channels, size, size).unbind()
    ids = torch.randint(0, 49407, (batch, text.max_length))
    timesteps = torch.randint(0, 1000, (batch,))
    schedule = config.diffusion

    def loss(model: nn.Module) -> Tensor:
        return diffusion_loss(model, schedule, latents, ids, noise, timesteps, config.loss).mean()

    return our_step(ours, config, loss), their_step(theirs, config, loss)


def stage_1() -> tuple[Callable[..., None], Callable[..., None]]:
    """Steps of our autoencoder and of theirs on the demo's crops."""
    config = load_config(VAETrainingConfig, CONFIGS / "vae.yaml", ADAMW)
    crop, batch = config.train.crop_size, config.train.batch_size
    assert crop is not None
    pixels = torch.rand(batch, config.model.in_channels, crop, crop) * 2 - 1
    ours = AutoencoderKL(config.model)
    ours.init_weights(torch.Generator().manual_seed(0))
    theirs = TheirAutoencoder.from_config(config.model.to_diffusers())
    assert isinstance(theirs, TheirAutoencoder)
    factor = config.model.downsampling
    noise = torch.randn(batch, config.model.latent_channels, crop // factor, crop // factor)

    def our_loss(model: nn.Module) -> Tensor:
        reconstruction, moments = model(pixels, noise)
        error = reconstruction_error(config.loss.reconstruction, reconstruction, pixels).mean()
        return error + config.loss.kl_weight * ours.unit_posterior(moments.float()).kl().mean()

    def their_loss(model: nn.Module) -> Tensor:
        posterior = theirs.encode(pixels).latent_dist
        reconstruction = theirs.decode(posterior.sample()).sample
        error = F.mse_loss(reconstruction.float(), pixels)
        return error + config.loss.kl_weight * posterior.kl().mean()

    return our_step(ours, config, our_loss), their_step(theirs, config, their_loss)


Config = VAETrainingConfig | UNetTrainingConfig
Loss = Callable[[nn.Module], Tensor]


def our_step(model: nn.Module, config: Config, loss: Loss) -> Callable[..., None]:
    """An optimiser step as the training scripts make it."""
    ema = EMA(model)
    return step(model, build_optimizer(model, config.optimizer), loss, lambda: ema.update(model, 0.999))


def their_step(model: nn.Module, config: Config, loss: Loss) -> Callable[..., None]:
    """An optimiser step as diffusers' training scripts make it, with their fastest settings."""
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    ema = EMAModel(model.parameters(), foreach=True)
    return step(model, optimizer, loss, lambda: ema.step(model.parameters()))


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, average: Callable[[], None]
) -> Callable[..., None]:
    """Forward and backward pass, clipping, update, EMA."""

    def run(autocast: torch.autocast | nullcontext) -> None:
        with autocast:
            value = loss(model)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average()

    return run


if __name__ == "__main__":
    main()
