"""The blocks that the autoencoder and the UNet are made of. Module names give diffusers' state-dict keys.

Shapes: B batch, C channels, H W height and width, N = H*W tokens, L context tokens, D context width, E embedding width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.devices import products_lack_avx512

# On CPUs the backward pass of PyTorch's fused attention takes 2 to 7 times as long as plain products in 16 bits up to
# about so many pairs of a query and a key (256 x 256), and as long in float32 (benchmarks/attention.py, docs/LOG.md).
MAX_PLAIN_WEIGHTS = 65_536
# From so many rows and input features on a product is faster as a convolution where `products_lack_avx512`, and not
# slower at any size that was tried (benchmarks/attention.py). With a backward pass it often is slower.
MIN_CONVOLVED = (256, 128)
# From so many pixels on (of the batch, before they are doubled) and not fewer than channels, `upsample_convolution` is
# faster on CPUs; with fewer, the making of its kernel costs more than it saves (benchmarks/attention.py).
MIN_UPSAMPLED_PIXELS = 1024


def run(module: Callable[..., Tensor], *inputs: Any, checkpointed: bool) -> Tensor:
    """Call `module`, recomputing its activations in the backward pass if `checkpointed` (Chen et al. 2016)."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def initialize(model: nn.Module, zero_outputs: tuple[str, ...], generator: torch.Generator) -> None:
    """Initialise every parameter of `model` with random numbers from `generator`.

    | parameter                                  | value                                                       |
    |--------------------------------------------|-------------------------------------------------------------|
    | name ends in one of `zero_outputs`         | 0 (a residual branch starts as the identity)                |
    | weight of a convolution or a linear layer  | uniform, standard deviation 1 / sqrt(fan_in) (LeCun 1998)   |
    | bias                                       | 0                                                           |
    | weight of a normalisation                  | 1                                                           |
    | positional embedding of a pooling          | Gaussian, standard deviation 1 / sqrt(width)                |
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            bound = 0.0 if name.endswith(zero_outputs) else math.sqrt(3 / fan_in)
            with torch.no_grad():
                module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, AttentionPooling):
            width = module.positional_embedding.shape[1]
            nn.init.normal_(module.positional_embedding, std=width**-0.5, generator=generator)


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-Conv3x3 twice plus a skip; `embedding` [B, E] is added between the two convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, embedding_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if embedding_width is None else nn.Linear(embedding_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [B, C_out, H, W]
        if self.time_emb_proj is not None:
            assert embedding is not None
            h = h + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        # Under autocast the sum stays in x's type, so that it isn't rounded again by every block (AutoencoderKL.decode)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x).to(x.dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the tensors' own types within the block; on the meta device, which has no autocast, as it is."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


KeysAndValues = tuple[Tensor, Tensor]


class ProjectedContext:
    """A context's keys and values in every cross-attention of a network, for use at all steps of a sampling run.

    pairs: of each transformer, by `Transformer2D.index`, and each of its blocks: keys and values [B, heads, L, C /
    heads]. pooled: what is added to the time embedding, [B, E], of a network that has `addition_embed_type` text.
    """

    def __init__(self, pairs: Sequence[Sequence[KeysAndValues]], pooled: Tensor | None = None) -> None:
        self.pairs = tuple(map(tuple, pairs))
        self.pooled = pooled

    def first(self, count: int) -> "ProjectedContext":
        """That of the first `count` contexts of the batch."""
        pooled = None if self.pooled is None else self.pooled[:count]
        return ProjectedContext([[(k[:count], v[:count]) for k, v in pairs] for pairs in self.pairs], pooled)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(c)) v in three operations; q [B, heads, N, c], k and v [B, heads, L, c] -> [B, heads, N, c].

    It keeps the N x L weights in memory, which `F.scaled_dot_product_attention` does not.
    """
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(later, -math.inf)
    return weights.softmax(dim=-1).to(v.dtype) @ v


def plain_attention_is_faster(device: torch.device, dtype: torch.dtype, weights: int, *, trains: bool) -> bool:
    """Whether separate products are faster than fused attention with N x L weights (benchmarks/attention.py)."""
    return device.type == "cpu" and dtype.itemsize == 2 and trains and weights <= MAX_PLAIN_WEIGHTS


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, eq. 1) by the implementation that is faster here.

    q [B, heads, N, c], k and v [B, heads, L, c] -> [B, heads, N, c]. Both agree up to rounding. causal: the n-th of the
    N = L tokens attends to the first n.
    """
    trains = torch.is_grad_enabled() and q.requires_grad
    if plain_attention_is_faster(q.device, q.dtype, q.shape[-2] * k.shape[-2], trains=trains):
        return plain_attention(q, k, v, causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def convolves_products(x: Tensor) -> bool:
    """Whether the product of x [..., C] with a matrix is faster as a convolution (benchmarks/attention.py)."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    rows, features = MIN_CONVOLVED
    return x.shape[-1] >= features and x.shape[:-1].numel() >= rows and products_lack_avx512()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by the implementation that is faster here: x [..., C], weight [C_out, C] -> [..., C_out].

    Both agree up to rounding.
    """
    if not convolves_products(x):
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, C, 1, rows], channels_last
    # A dilation means nothing to a 1x1 kernel, but PyTorch gives every such convolution to oneDNN.
    product = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return product.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear`, whose product is that of `linear`: for layers that see many rows."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def multiplies_tokens(device: torch.device) -> bool:
    """Whether a 1x1 convolution is faster as a product over tokens (benchmarks/attention.py)."""
    return device.type == "cpu"


def project_tokens(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution as the product that it is: [B, N, C] -> [B, N, C_out]."""
    if not isinstance(layer, nn.Conv2d):
        return layer(tokens)
    # The weight is whole under FSDP2 too: configs/accelerate/fsdp2.yaml shards Transformer2D, whose forward calls this.
    return linear(tokens, layer.weight.flatten(1), layer.bias)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose cost is linear in the number of tokens (Shen et al. 2021, eq. 3 and 4, softmax normalisation).

    q [B, heads, N, c], k and v [B, heads, L, c] -> [B, heads, N, c]. Each result is an average of the values: its
    weights softmax(q) softmax(k)^T are positive and sum to 1. So q is not scaled by 1 / sqrt(c) as in implementations
    that normalise the result.
    """
    summary = k.softmax(dim=-2).transpose(-2, -1) @ v  # [B, heads, c, c]: each feature of k averages over the tokens
    return q.softmax(dim=-1) @ summary


class Attention(nn.Module):
    """Multi-head attention of `x` [B, N, C] over `context` [B, L, D], or over itself.

    Softmax attention (Vaswani et al. 2017, eq. 1), or with `linear_attention` that of `efficient_attention`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        context_width: int | None = None,
        qkv_bias: bool = False,
        upcast: bool = False,
        linear_attention: bool = False,
    ) -> None:
        super().__init__()
        context_width = context_width or width
        self.heads = heads
        self.upcast = upcast
        self.linear_attention = linear_attention
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_width, width, bias=qkv_bias)
        self.to_v = Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, L, C / heads] of a context [B, L, D]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: Tensor | KeysAndValues | None = None) -> Tensor:
        """context: the tokens to attend to, or what `project` makes of them."""
        q = self._split(self.to_q(x))
        k, v = context if isinstance(context, tuple) else self.project(x if context is None else context)
        attend = efficient_attention if self.linear_attention else attention
        if self.upcast:
            with without_autocast(x.device):
                h = attend(q.float(), k.float(), v.float())  # [B, heads, N, C / heads]
        else:
            h = attend(q, k, v)
        h = h.transpose(1, 2).flatten(2).to(x.dtype)  # [B, N, C]
        return self.to_out[0](h)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AttentionBlock(Attention):
    """GroupNorm, single-head self-attention over the pixels of x [B, C, H, W] and a skip, for the autoencoder."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        h = super().forward(tokens)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. (`net.1` is diffusers' dropout, which has no weights.)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward, each after a LayerNorm and with a skip.

    `linear_attention` concerns the self-attention alone: the text is short.
    """

    def __init__(self, width: int, *, heads: int, context_width: int, upcast: bool, linear_attention: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=heads, upcast=upcast, linear_attention=linear_attention)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, context_width=context_width, upcast=upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | KeysAndValues) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of x [B, C, H, W], conditioned on context [B, L, D] (Rombach et al. 2022).

    Stable Diffusion 1 projects in and out with 1x1 convolutions, Stable Diffusion 2 with linear layers (`linear`).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_width: int,
        groups: int,
        linear: bool,
        upcast: bool,
        linear_attention: bool,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.index: int | None = None  # among the network's transformers
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [
                TransformerBlock(
                    channels,
                    heads=heads,
                    context_width=context_width,
                    upcast=upcast,
                    linear_attention=linear_attention,
                )
                for _ in range(depth)
            ]
        )
        self.proj_out = Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def project(self, context: Tensor) -> list[KeysAndValues]:
        """Keys and values of a context [B, L, D] in each block."""
        return [block.attn2.project(context) for block in self.transformer_blocks]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def forward(self, x: Tensor, context: Tensor | Sequence[KeysAndValues]) -> Tensor:
        """context: [B, L, D], or what `project` makes of it."""
        size = x.shape[2:]
        # A convolution with a LoRA adapter is a module of another kind.
        plain = isinstance(self.proj_in, nn.Conv2d) and isinstance(self.proj_out, nn.Conv2d)
        products = self.linear or (plain and multiplies_tokens(x.device))
        h = self.norm(x)
        if not products:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, N, C]
        if products:
            h = project_tokens(self.proj_in, h)
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, context if isinstance(context, Tensor) else context[i])
        if products:
            h = project_tokens(self.proj_out, h)
        h = h.transpose(1, 2).unflatten(2, size)  # [B, C, H, W]
        if not products:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """Halve H and W by a 3x3 convolution of stride 2.

    The autoencoder pads one row on the right and bottom only (`asymmetric`), the UNet on all sides.
    """

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


def upsample_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Twice the size by nearest neighbour and a 3x3 convolution, in 4/9 of its operations.

    x [B, C, H, W], weight [C_out, C, 3, 3] -> [B, C_out, 2H, 2W]. Each pixel stands there twice in a row, so the three
    taps of a row meet only two pixels. The sums of the taps are a transposed convolution of 4 taps and stride 2, equal
    up to rounding.
    """
    taps = weight.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float32)
    both = torch.kron(taps, taps).to(torch.promote_types(weight.dtype, torch.float32))  # [3 * 3, 4 * 4]
    with without_autocast(x.device):  # rounded once, as the weight itself would be
        kernel = (weight.flatten(2).to(both.dtype) @ both).to(weight.dtype).unflatten(2, (4, 4))
    return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=1)


def transposes_upsampling(x: Tensor) -> bool:
    """Whether `upsample_convolution` of x [B, C, H, W] is faster than its two operations (benchmarks/attention.py)."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return x.device.type == "cpu" and pixels >= max(MIN_UPSAMPLED_PIXELS, x.shape[1])


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution with a LoRA adapter is a module of another kind.
        if isinstance(self.conv, nn.Conv2d) and transposes_upsampling(x):
            return upsample_convolution(x, self.conv.weight, self.conv.bias).to(x.dtype)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).to(x.dtype)


class TimestepEmbedding(nn.Module):
    """Linear-SiLU-Linear on the sinusoidal features of the timestep: [B, C] -> [B, E]."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embedding_width)
        self.linear_2 = nn.Linear(embedding_width, embedding_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class AttentionPooling(nn.Module):
    """One vector from tokens [B, L, D] -> [B, D]: their mean attends to them and to itself (DeepFloyd IF)."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding.to(tokens.dtype)  # [B, 1, D]
        tokens = torch.cat([mean, tokens], dim=1)
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, 1 or L + 1, D / heads]
            for projection, x in ((self.q_proj, mean), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return attention(q, k, v).flatten(1)


class TextTimeEmbedding(nn.Module):
    """The context [B, L, D], pooled to what is added to the time embedding: [B, E]."""

    def __init__(self, context_width: int, embedding_width: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(context_width)
        self.pool = AttentionPooling(context_width, heads=heads)
        self.proj = nn.Linear(context_width, embedding_width)
        self.norm2 = nn.LayerNorm(embedding_width)

    def forward(self, context: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(context))))


def sinusoidal_features(timesteps: Tensor, width: int, *, cos_first: bool, freq_shift: float) -> Tensor:
    """Sine and cosine of the timesteps at `width` / 2 frequencies from 1 to 1/10000 (Vaswani et al. 2017, 3.5).

    timesteps [B] -> [B, width] float32, cosines before sines if `cos_first` (Stable Diffusion's order).
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)[None]
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    features = torch.cat(parts, dim=1)
    return F.pad(features, (0, width % 2))
