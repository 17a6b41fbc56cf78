"""The text-conditioned UNet of stage 2: noisy latents, timesteps and context -> model output (Rombach et al. 2022)."""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.config import UNetConfig
from latentdiff.formats.diffusers_folder import FolderModel
from latentdiff.models.layers import (
    Downsample,
    KeysAndValues,
    ProjectedContext,
    ResnetBlock,
    TextTimeEmbedding,
    TimestepEmbedding,
    Transformer2D,
    Upsample,
    initialize,
    run,
    sinusoidal_features,
)


class UNetBlock(nn.Module):
    """One level: ResNet blocks, each followed by a transformer where the level has attention.

    `kind` is the block type of the config: CrossAttn..., LinearAttn... (its self-attention is linear) or neither.
    `in_channels` gives the input width of each ResNet block (on the way up they also take a skip connection).
    """

    def __init__(self, config: UNetConfig, kind: str, level: int, in_channels: list[int], out_channels: int) -> None:
        super().__init__()
        attention = kind.startswith(("CrossAttn", "LinearAttn"))
        linear = kind.startswith("LinearAttn")
        self.resnets = nn.ModuleList([resnet(config, width, out_channels) for width in in_channels])
        # An empty list has no keys in the state dict, like diffusers' blocks without attention.
        self.attentions = nn.ModuleList(
            [transformer(config, level, linear_attention=linear) for _ in in_channels] if attention else []
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        self.gradient_checkpointing = False

    def layer(self, j: int, x: Tensor, embedding: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """The j-th ResNet block and its transformer."""
        x = run(self.resnets[j], x, embedding, checkpointed=self.gradient_checkpointing)
        if self.attentions:
            own = _of(context, self.attentions[j])
            x = run(self.attentions[j], x, own, checkpointed=self.gradient_checkpointing)
        return x


class MidBlock(nn.Module):
    """ResNet, transformer, ResNet at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList([resnet(config, width, width) for _ in range(2)])
        self.attentions = nn.ModuleList([transformer(config, -1, linear_attention=False)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        x = run(self.resnets[0], x, embedding, checkpointed=self.gradient_checkpointing)
        own = _of(context, self.attentions[0])
        x = run(self.attentions[0], x, own, checkpointed=self.gradient_checkpointing)
        return run(self.resnets[1], x, embedding, checkpointed=self.gradient_checkpointing)


def _of(context: Tensor | ProjectedContext, transformer: nn.Module) -> Tensor | tuple[KeysAndValues, ...]:
    """What a transformer takes of a context. (Chosen outside of it, so that compiled transformers share their code.)"""
    if isinstance(context, Tensor):
        return context
    assert isinstance(transformer.index, int), "the UNet numbers its transformers"
    return context.pairs[transformer.index]


def resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    """A ResNet block with the config's norms and time embedding."""
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        embedding_width=config.embedding_width,
    )


def transformer(config: UNetConfig, level: int, *, linear_attention: bool) -> Transformer2D:
    """The transformer of a level, by the config's per-level width, heads and depth."""
    return Transformer2D(
        config.block_out_channels[level],
        heads=config.heads[level],
        depth=config.transformer_depths[level],
        context_width=config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        upcast=config.upcast_attention,
        linear_attention=linear_attention,
    )


class UNet(FolderModel[UNetConfig]):
    """Predicts the schedule's target (noise, velocity or clean latents) from noisy latents and text states.

    State-dict keys and config are those of diffusers' UNet2DConditionModel, Stable Diffusion 1 and 2 structure. Blocks
    of the kind LinearAttn... have the weights of CrossAttn... ones and another self-attention; diffusers refuses them.
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        top = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.embedding_width)
        self.add_embedding: TextTimeEmbedding | None = None
        if config.addition_embed_type == "text":
            self.add_embedding = TextTimeEmbedding(
                config.cross_attention_dim, config.embedding_width, heads=config.addition_embed_type_num_heads
            )

        skips = [widths[0]]  # channels of the skip connections, in the order in which they are made
        self.down_blocks = nn.ModuleList()
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            in_channels = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1)
            block = UNetBlock(config, kind, i, in_channels, width)
            skips += [width] * config.layers_per_block
            if i < top:
                block.downsamplers.append(Downsample(width, asymmetric=False))
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = MidBlock(config)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, kind in enumerate(config.up_block_types):
            level = top - i
            width = widths[level]
            in_channels = [(below if j == 0 else width) + skips.pop() for j in range(config.layers_per_block + 1)]
            block = UNetBlock(config, kind, level, in_channels, width)
            if i < top:
                block.upsamplers.append(Upsample(width))
            self.up_blocks.append(block)
            below = width
        assert not skips

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for index, one in enumerate(self._transformers()):
            one.index = index

    def _transformers(self) -> list[Transformer2D]:
        return [module for module in self.modules() if isinstance(module, Transformer2D)]

    def project(self, context: Tensor) -> ProjectedContext:
        """What `forward` makes of context [B, L, D] alone, to use instead of it at any number of timesteps.

        Raises ValueError if the context's width is not the model's.
        """
        self._check_width(context)
        pairs = [one.project(context) for one in self._transformers()]
        return ProjectedContext(pairs, self._pooled(context))

    def embed(self, timesteps: Tensor) -> Tensor:
        """What `forward` makes of timesteps [B] alone, [B, E], to use instead of them with any latents and context."""
        features = sinusoidal_features(
            timesteps,
            self.config.block_out_channels[0],
            cos_first=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        return self.time_embedding(features.to(self.conv_in.weight.dtype))

    def _pooled(self, context: Tensor) -> Tensor | None:
        return None if self.add_embedding is None else self.add_embedding(context)

    def _check_width(self, context: Tensor) -> None:
        if context.shape[-1] != self.config.cross_attention_dim:
            raise ValueError(
                f"context is {context.shape[-1]} wide, the UNet's cross_attention_dim is "
                f"{self.config.cross_attention_dim}"
            )

    def init_weights(self, generator: torch.Generator) -> None:
        """Start from random weights; residual branches start as the identity, the output as 0 (`layers.initialize`)."""
        initialize(self, ("conv2", "proj_out", "conv_out"), generator)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory: recompute each ResNet block and transformer in the backward pass."""
        for block in cast(Iterable[UNetBlock | MidBlock], (*self.down_blocks, self.mid_block, *self.up_blocks)):
            block.gradient_checkpointing = enabled

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """[B, C, h, w], timesteps [B], context [B, L, D] -> model output [B, C_out, h, w].

        Timesteps are int64, or float between the trained ones; `embed` of them and `project` of the context do as well.

        Raises ValueError if h or w is not a multiple of `downsampling`, or channels or context width not the model's.
        """
        config = self.config
        channels, height, width = noisy_latents.shape[1:]
        if channels != config.in_channels:
            raise ValueError(f"noisy latents have {channels} channels, but this UNet takes {config.in_channels}")
        if height % config.downsampling or width % config.downsampling:
            raise ValueError(
                f"latent size {height}x{width} is not divisible by {config.downsampling}, the UNet's downsampling"
            )
        if isinstance(context, Tensor):
            self._check_width(context)
        embedding = timesteps if timesteps.ndim == 2 else self.embed(timesteps)  # [B, E]
        pooled = context.pooled if isinstance(context, ProjectedContext) else self._pooled(context)
        if pooled is not None:
            embedding = embedding + pooled

        x = self.conv_in(noisy_latents)
        skips = [x]
        for block in cast(Iterable[UNetBlock], self.down_blocks):
            for j in range(len(block.resnets)):
                x = block.layer(j, x, embedding, context)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)

        x = self.mid_block(x, embedding, context)

        for block in cast(Iterable[UNetBlock], self.up_blocks):
            for j in range(len(block.resnets)):
                x = block.layer(j, torch.cat([x, skips.pop()], dim=1), embedding, context)
            for upsample in block.upsamplers:
                x = upsample(x)

        return self.conv_out(F.silu(self.conv_norm_out(x)))
