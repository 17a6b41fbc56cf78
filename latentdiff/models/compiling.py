"""torch.compile for the networks: of their repeated blocks, one graph for each kind, or of the whole as one graph."""

from typing import Any

from torch import nn

from latentdiff.config import Compile
from latentdiff.models.clip_text import CLIPEncoderLayer
from latentdiff.models.layers import AttentionBlock, ResnetBlock, Transformer2D

BLOCKS = (ResnetBlock, Transformer2D, AttentionBlock, CLIPEncoderLayer)
MAX_GRAPHS = 64  # kinds of a block times shapes of the input; torch's own 8 are fewer than Stable Diffusion 1 has kinds


def compile_network(network: nn.Module, how: Compile, *, cuda_graphs: bool = False, **options: Any) -> None:
    """Let a network, which keeps its parameters and their names, compute with compiled code.

    blocks: each of `BLOCKS` by itself; blocks of one kind and input shape share their code. step: the whole network,
    with `cuda_graphs` as one CUDA graph for a forward and one for a backward pass: there an output stays valid until
    the next call. Each shape has code of its own; more than `MAX_GRAPHS` run uncompiled, with a warning.
    options: of torch.compile.
    """
    if how == "off":
        return
    import torch._dynamo.config as dynamo  # slow, and not needed without compilation

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    if how == "step":
        graphs = {"mode": "reduce-overhead"} if cuda_graphs else {}
        network.compile(dynamic=False, **graphs | options)
        return
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.compile(dynamic=False, **options)
