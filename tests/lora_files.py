"""LoRAs of random numbers for the tests, under the names of every layout."""

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from tiny import normal
from torch import Tensor, nn

from latentdiff.config import LoRAConfig
from latentdiff.formats.lora import Layers, LoRA, LowRank
from latentdiff.models.lora import adaptable_layers, matching_layers
from latentdiff.pipeline import LatentDiffusionPipeline

UNET_TARGETS = LoRAConfig().targets
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
EVERYWHERE = (*UNET_TARGETS, "proj_in", "proj_out", "ff.net.2", "conv1", "linear_1")  # layers of every kind


def random_changes(layers: Layers, alpha: float = 3.0, rank: int = 2, seed: int = 0) -> dict[str, LowRank]:
    """Large enough to change an image."""
    changes = {}
    for i, (name, (outputs, inputs, *kernel)) in enumerate(layers.items()):
        down = 0.3 * normal(rank, inputs, *kernel, seed=seed + 2 * i)
        up = 0.3 * normal(outputs, rank, *[1] * len(kernel), seed=seed + 2 * i + 1)
        changes[name] = LowRank(down, up, alpha)
    return changes


def matching(network: nn.Module, *targets: str) -> Layers:
    shapes = adaptable_layers(network)
    return {name: shapes[name] for name in matching_layers(network, targets)}


def random_lora(
    pipeline: LatentDiffusionPipeline, *targets: str, alpha: float = 3.0, rank: int = 2, seed: int = 0
) -> LoRA:
    """Of both networks. targets: of the UNet's layers; none: those that are usual."""
    unet = random_changes(matching(pipeline.unet, *(targets or UNET_TARGETS)), alpha, rank, seed)
    text = random_changes(matching(pipeline.text_encoder.model, *TEXT_TARGETS, "fc1"), alpha, rank, seed + 1000)
    return LoRA(unet, text)


def product(change: LowRank) -> Tensor:
    """alpha / rank * up @ down, in the weight's shape, by an einsum."""
    up = change.up.flatten(1)
    return change.alpha / change.rank * torch.einsum("or,r...->o...", up, change.down)


def products(lora: LoRA) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": product(change)
        for part, changes in (("unet", lora.unet), ("text_encoder", lora.text_encoder))
        for name, change in changes.items()
    }


def kohya(lora: LoRA) -> dict[str, Tensor]:
    """The names of kohya's scripts, each with its alpha; the matrices of 1x1 convolutions are convolutions too."""
    tensors = {}
    for start, changes in (("lora_unet_", lora.unet), ("lora_te_text_model_", lora.text_encoder)):
        for layer, change in changes.items():
            name = start + layer.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = change.down
            tensors[f"{name}.lora_up.weight"] = change.up
            tensors[f"{name}.alpha"] = torch.tensor(change.alpha)
    return tensors


def renamed(lora: LoRA, unet: str, text_encoder: str, **endings: str) -> dict[str, Tensor]:
    """As alpha is not in these files, it must be the rank. unet, text_encoder: patterns with {layer} and {half}."""
    tensors = {}
    for pattern, changes in ((unet, lora.unet), (text_encoder, lora.text_encoder)):
        for layer, change in changes.items():
            for half, tensor in (("down", change.down), ("up", change.up)):
                key = pattern.format(layer=layer, half=endings.get(half, half))
                tensors[key] = tensor
    return tensors


def deltas(network: nn.Module, adapter: str) -> Mapping[str, Tensor]:
    """What peft itself says that an adapter adds to each weight."""
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
