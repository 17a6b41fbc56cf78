"""The KL-regularised autoencoder of stage 1: pixels [B, 3, H, W] <-> latents [B, C, h, w] (Rombach et al. 2022)."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.config import STABLE_DIFFUSION_SCALING_FACTOR, AutoencoderKLConfig
from latentdiff.formats.diffusers_folder import PIPELINE_FILE, FolderModel, autoencoder_folder, read_config
from latentdiff.formats.single_file import read_single_file
from latentdiff.models.layers import AttentionBlock, Downsample, ResnetBlock, Upsample, initialize, run

NORM_EPS = 1e-6
# Names of the attention's four layers before diffusers 0.17; files on the hub still have them.
OLD_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z|x) that the encoder predicts, from moments [B, 2C, h, w]: mean, then log-variance."""

    moments: Tensor

    @property
    def mean(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[0]

    @property
    def log_variance(self) -> Tensor:
        """Clamped to [-30, 20], as in Stable Diffusion."""
        return self.moments.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise (Kingma & Welling 2014, eq. 10); noise [B, C, h, w] is unit Gaussian."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL divergence from the unit Gaussian in nats, summed over C, h, w: [B] (Kingma & Welling 2014, app. B)."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.float().sum(dim=(1, 2, 3))


class MidBlock(nn.Module):
    """ResNet, self-attention over all pixels, ResNet."""

    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2)],
        )
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, groups=groups, eps=NORM_EPS)] if attention else [],
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownEncoderBlock(nn.Module):
    """ResNet blocks, then (but on the last level) half the size."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(in_channels if j == 0 else out_channels, out_channels, groups=groups, eps=NORM_EPS)
                for j in range(layers)
            ]
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock(nn.Module):
    """ResNet blocks, then (but on the last level) twice the size."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(in_channels if j == 0 else out_channels, out_channels, groups=groups, eps=NORM_EPS)
                for j in range(layers)
            ]
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """pixels [B, C_in, H, W] -> [B, 2C, H / f, W / f], f = 2 ** (levels - 1)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownEncoderBlock(
                    widths[max(i - 1, 0)],
                    width,
                    layers=config.layers_per_block,
                    groups=groups,
                    downsample=i < len(widths) - 1,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for block in (*self.down_blocks, self.mid_block):
            x = run(block, x, checkpointed=self.gradient_checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """[B, C, h, w] -> pixels [B, C_out, f * h, f * w]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups=groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                UpDecoderBlock(
                    widths[max(i - 1, 0)],
                    width,
                    layers=config.layers_per_block + 1,
                    groups=groups,
                    upsample=i < len(widths) - 1,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, *, bf16_products: bool = False) -> Tensor:
        x = self.conv_in(z)
        with torch.autocast(z.device.type, torch.bfloat16) if bf16_products else nullcontext():
            for block in (self.mid_block, *self.up_blocks):
                x = run(block, x, checkpointed=self.gradient_checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(FolderModel[AutoencoderKLConfig]):
    """Compresses pixels [B, 3, H, W] in [-1, 1] to unit-scale latents [B, C, H / f, W / f] and back.

    It owns the latent scale: `sample`, `unit_posterior` and `decode` apply `scaling_factor` and `shift_factor`, and
    nobody else does.
    State-dict keys and config are those of diffusers' AutoencoderKL.
    """

    config_class = AutoencoderKLConfig
    is_pixel_space: Literal[False] = False
    moments_dtype = torch.float32

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    @property
    def moments_channels(self) -> int:
        """Channels of what `encode` returns."""
        return 2 * self.config.latent_channels

    def init_weights(self, generator: torch.Generator) -> None:
        """Start from random weights; every residual branch starts as the identity (table: `layers.initialize`)."""
        initialize(self, ("conv2", "to_out.0"), generator)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory: keep one activation a block instead of all of them."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, C_in, H, W] in [-1, 1] -> moments [B, 2C, H / f, W / f] of the posterior, before any scaling.

        Raises ValueError if H or W is not a multiple of `downsampling`, or the channels are not the model's.
        """
        f = self.config.downsampling
        _, channels, height, width = pixels.shape
        if channels != self.config.in_channels:
            raise ValueError(f"pixels have {channels} channels, but this autoencoder takes {self.config.in_channels}")
        if height % f or width % f:
            raise ValueError(f"image size {height}x{width} is not divisible by {f}, the autoencoder's downsampling")
        moments = self.encoder(pixels)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of unit-scale latents [B, C, h, w] from the posterior; its mean if `noise` is None."""
        posterior = Posterior(moments)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unit_posterior(self, moments: Tensor) -> Posterior:
        """The posterior of unit-scale latents."""
        log_variance = Posterior(moments).log_variance + 2 * math.log(self.config.scaling_factor)
        return Posterior(torch.cat([self.sample(moments), log_variance], dim=1))

    def decode(self, latents: Tensor, *, bf16_products: bool = False) -> Tensor:
        """Unit-scale latents [B, C, h, w] -> pixels [B, C_out, f * h, f * w], about [-1, 1], not clamped.

        bf16_products: with float32 weights and outside autocast, the inner convolutions and the attention compute in
            bfloat16, the first and the last layer and the sum of the residual branches in float32.
        """
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z, bf16_products=bf16_products)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """pixels -> (reconstruction [B, C_out, H, W], moments [B, 2C, h, w]), through one posterior sample."""
        moments = self.encode(pixels)
        return self.decode(self.sample(moments, noise)), moments

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make latents zero-mean and unit-scale per channel, given their measured mean and std [C] (float).

        The normalisation is folded into the two 1x1 convolutions such that `scaling_factor` is Stable Diffusion's. That
        leaves the reconstruction as it was, and right any reader that knows only `scaling_factor` or has it fixed.
        Without those convolutions the one factor 1 / std is set instead: the decoder's first layer pads with zeros,
        so no mean can be folded into it. The statistics are those of `sample` with a scaling factor of 1 and no shift.
        """
        assert self.config.scaling_factor == 1.0 and not self.config.shift_factor, (
            "statistics of already scaled latents"
        )
        if self.quant_conv is None or self.post_quant_conv is None:
            self.set_scaling_factor(mean, std)
            return
        channels = self.config.latent_channels
        # On the CPU, as not every device has float64.
        weight, bias = (p.cpu().double() for p in self.quant_conv.parameters())
        mean = mean.to(weight)
        unit = std.to(weight) * STABLE_DIFFUSION_SCALING_FACTOR  # what is 1 in the new moments
        # Posterior mean: (z - mean) / unit. Its log-variance: less 2 log unit.
        weight[:channels] /= unit[:, None, None, None]
        bias[:channels] = (bias[:channels] - mean) / unit
        bias[channels:] -= 2 * unit.log()
        _set(self.quant_conv, weight, bias)
        # The decoder's first layer undoes it: W (unit z + mean) + b.
        weight, bias = (p.cpu().double() for p in self.post_quant_conv.parameters())
        _set(self.post_quant_conv, weight * unit[None, :, None, None], bias + weight[:, :, 0, 0] @ mean)
        self._set_scale(STABLE_DIFFUSION_SCALING_FACTOR)

    def set_scaling_factor(self, mean: Tensor, std: Tensor) -> None:
        """Make latents unit-scale over all channels together by the one factor, from the posterior's statistics [C]."""
        scale = float((std.square() + (mean - mean.mean()).square()).mean().sqrt())
        self._set_scale(1.0 / scale)

    def _set_scale(self, factor: float) -> None:
        self.config = self.config.model_copy(update={"scaling_factor": factor, "shift_factor": None})

    @staticmethod
    def upgrade_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Current keys for a state dict with the attention names of diffusers <= 0.16; others are unchanged."""
        upgraded = {}
        for key, value in state_dict.items():
            parts = key.split(".")
            if "attentions" in parts and parts[-2] in OLD_ATTENTION_KEYS:
                parts[-2] = OLD_ATTENTION_KEYS[parts[-2]]
            upgraded[".".join(parts)] = value
        return upgraded


def open_autoencoder(name: str | Path, what: str = "autoencoder", dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The autoencoder of a stage 1 run, of a pipeline's folder or single file, or of a hub repository of either.

    what: stands before the name in messages. dtype: None keeps that of the files.
    Raises ValueError if there is none, or as `from_pretrained` does.
    """
    path = Path(name).expanduser()
    if path.is_file():
        file = read_single_file(path)
        return AutoencoderKL.from_weights(file.vae, file.weights()["vae"], f"{path}, its autoencoder", dtype)
    return AutoencoderKL.from_pretrained(autoencoder_folder(name, what), dtype=dtype)


def read_autoencoder_config(name: str | Path, what: str = "autoencoder") -> AutoencoderKLConfig:
    """The config of what `open_autoencoder` opens; no weights are read or fetched. ValueError if there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return read_single_file(path).vae
    file = autoencoder_folder(name, what, (PIPELINE_FILE, "config.json", "vae/config.json")) / "config.json"
    return AutoencoderKLConfig.from_diffusers(read_config(file, AutoencoderKLConfig.diffusers_class), str(file))


def _set(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert convolution.bias is not None
    convolution.weight.copy_(weight)
    convolution.bias.copy_(bias)
