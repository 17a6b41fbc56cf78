"""CLIP's text transformer: input_ids [B, L] -> context [B, L, D] (Radford et al. 2021).

Module names, and their order, are those of transformers' CLIPTextModel: they give its state-dict keys and parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.config import CLIPTextConfig
from latentdiff.models.layers import attention, run


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}  # by the config's hidden_act


def _embedding(count: int, width: int) -> nn.Embedding:
    """Without values: on the meta device the Gaussian numbers of nn.Embedding itself import torch's compiler (2 s)."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class CLIPTextEmbeddings(nn.Module):
    """Learned vectors of the tokens plus those of their places: [B, L] -> [B, L, D]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(places)


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention over x [B, L, D]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, D / heads]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and a feed-forward, each after a LayerNorm and with a skip."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, skip: int) -> Tensor:
        for layer in self.layers[: len(self.layers) - skip]:
            x = run(layer, x, checkpointed=self.gradient_checkpointing)
        return x


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and a final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter with random numbers from `generator`, as transformers does: D width, n layers.

        | parameter                        | value, times the config's initializer_factor                |
        |----------------------------------|-------------------------------------------------------------|
        | token and position vectors       | Gaussian, standard deviation 0.02                           |
        | q_proj, k_proj, v_proj, fc2      | Gaussian, standard deviation 1 / sqrt(2 n D)                |
        | out_proj                         | Gaussian, standard deviation 1 / sqrt(D)                    |
        | fc1                              | Gaussian, standard deviation 1 / sqrt(2 D)                  |
        | bias; weight of a LayerNorm      | 0; 1                                                        |
        """
        factor, width = self.config.initializer_factor, self.config.hidden_size
        inward = (2 * max(1, len(self.encoder.layers)) * width) ** -0.5
        stds = {  # in the order of the draws
            **dict.fromkeys(("token_embedding", "position_embedding"), 0.02),
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), inward),
            "out_proj": width**-0.5,
            "fc1": (2 * width) ** -0.5,
            "fc2": inward,
        }
        # transformers draws every weight three times: where it is made, as any layer of its kind, and as CLIP's. With
        # all three a seed gives the same weights there and here.
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.uniform_(generator=generator)
                module.bias.uniform_(generator=generator)
        groups = [self.embeddings, *(part for layer in self.encoder.layers for part in (layer.self_attn, layer.mlp))]
        for group in groups:
            weights = {name: child.weight for name, child in group.named_children()}
            for weight in weights.values():
                weight.normal_(generator=generator)
            for name in [name for name in stds if name in weights]:
                weights[name].normal_(std=stds[name] * factor, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)

    def forward(self, input_ids: Tensor, skip: int = 0) -> Tensor:
        """int64 input_ids [B, L] -> context [B, L, D], after the final norm; skip: last layers left out."""
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), skip))
