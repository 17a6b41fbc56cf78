"""LoRA adapters (Hu et al. 2021) on a network's layers, through peft: attached, scaled, stacked, fused and removed."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from latentdiff.formats.lora import LowRank

KINDS = (nn.Linear, nn.Conv2d)  # of layers that can have adapters


def adaptable_layers(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of all layers that can have adapters, by the layer's name."""
    adapters = dict(_adapters(network))
    inner = tuple(f"{name}." for name in adapters)
    layers = {name: layer.get_base_layer() for name, layer in adapters.items()}
    for name, module in network.named_modules():
        if isinstance(module, KINDS) and not name.startswith(inner):
            layers[name] = module
    return {name: tuple(layer.weight.shape) for name, layer in layers.items()}


def matching_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers whose name is one of `targets`, or ends with a dot and one of them."""
    return [name for name in adaptable_layers(network) if any(f".{name}".endswith(f".{end}") for end in targets)]


def attach(network: nn.Module, adapter: str, changes: Mapping[str, LowRank]) -> None:
    """Add an adapter with given matrices, active with scale 1 beside those that are there already.

    The network's own weights stay what they are. It is frozen, as a network with adapters is not trained by itself.
    """
    if not changes:
        return
    active = {name: scale for name, scale in adapter_scales(network).items() if scale}
    _inject(network, adapter, {name: (change.rank, change.alpha) for name, change in changes.items()})
    for name, layer in _adapters(network):
        if name in changes:
            with torch.no_grad():
                layer.lora_A[adapter].weight.copy_(changes[name].down)
                layer.lora_B[adapter].weight.copy_(changes[name].up)
    network.requires_grad_(False)
    set_scales(network, {**active, adapter: 1.0})


def attach_new(
    network: nn.Module, adapter: str, layers: Sequence[str], rank: int, alpha: float, generator: torch.Generator
) -> None:
    """Add an adapter to train: all else is frozen.

    As peft starts it: `down` uniform in +-1 / sqrt(fan-in), `up` zero, so that the network computes what it did.
    """
    _inject(network, adapter, dict.fromkeys(layers, (rank, alpha)))
    network.requires_grad_(False)
    for _, layer in _adapters(network):
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            with torch.no_grad():
                bound = down[0].numel() ** -0.5
                down.copy_(torch.rand(down.shape, generator=generator, device="cpu") * (2 * bound) - bound)
                up.zero_()
            down.requires_grad_(True)
            up.requires_grad_(True)


def low_rank_changes(network: nn.Module, adapter: str) -> dict[str, LowRank]:
    """The matrices of an adapter, by the layer's name; copies in float32 on the CPU."""
    changes: dict[str, LowRank] = {}
    for name, layer in _adapters(network):
        if adapter in layer.lora_A:
            down, up = (
                half[adapter].weight.detach().to("cpu", torch.float32, copy=True)
                for half in (layer.lora_A, layer.lora_B)
            )
            changes[name] = LowRank(down, up, float(layer.lora_alpha[adapter]))
    return changes


def adapter_scales(network: nn.Module) -> dict[str, float]:
    """The scale of every adapter; 0 for those that are not active."""
    scales: dict[str, float] = {}
    for _, layer in _adapters(network):
        for adapter in layer.lora_A:
            factor = layer.scaling[adapter] * layer.r[adapter] / layer.lora_alpha[adapter]
            # Without what the division has rounded.
            scales[adapter] = float(f"{factor:.12g}") if adapter in layer.active_adapters else 0.0
    return scales


def set_scales(network: nn.Module, scales: Mapping[str, float]) -> None:
    """Make these adapters act, each times its scale, and no others."""
    for _, layer in _adapters(network):
        active = [adapter for adapter in layer.lora_A if scales.get(adapter)]
        trained = {name: p.requires_grad for name, p in layer.named_parameters()}
        layer.set_adapter(active)  # lets what is active be trained, which is not asked for here
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trained[name])
        for adapter in active:
            layer.set_scale(adapter, scales[adapter])


def fuse(network: nn.Module) -> None:
    """Add what the active adapters change to the network's own weights, and remove them all.

    Raises ValueError, and nothing is changed, if a weight becomes NaN or infinite.
    """
    layers = dict(_adapters(network))
    weights = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
    for name, layer in layers.items():
        try:
            layer.merge(safe_merge=True)  # never in place: a weight may be mapped to a file
        except ValueError:
            for other, weight in weights.items():
                layers[other].get_base_layer().weight.data = weight
                layers[other].merged_adapters.clear()
            raise ValueError(
                f"the LoRA makes the weight of {name} infinite in {weights[name].dtype}: choose smaller scales, or "
                "float32"
            ) from None
    detach(network)


def detach(network: nn.Module) -> None:
    """Remove all adapters: each layer is again the one it was."""
    for name, layer in list(_adapters(network)):
        network.set_submodule(name, layer.get_base_layer(), strict=True)


def _adapters(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, peft's LoraLayer, by name."""
    if "peft" not in sys.modules:  # slow to import, and nothing has an adapter without it
        return
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _inject(network: nn.Module, adapter: str, layers: Mapping[str, tuple[int, float]]) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # slow

    first = next(iter(layers.values()))
    others = {name: value for name, value in layers.items() if value != first}
    config = LoraConfig(
        r=first[0],
        lora_alpha=first[1],  # pyright: ignore[reportArgumentType]
        target_modules=list(layers),
        rank_pattern={name: rank for name, (rank, _) in others.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in others.items()},  # pyright: ignore[reportArgumentType]
    )
    with torch.random.fork_rng(devices=[]):  # its random matrices are replaced
        inject_adapter_in_model(config, network, adapter)
    del network.peft_config  # else peft warns of the next adapter
