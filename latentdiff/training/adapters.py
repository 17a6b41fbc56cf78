"""The LoRA adapters of stage 2: added to the model of init_from, trained alone, and saved as diffusers' file."""

from pathlib import Path

import torch
from torch import nn

from latentdiff.config import LoRAConfig, UNetTrainingConfig
from latentdiff.formats.lora import LORA_FILE, LoRA, write_lora
from latentdiff.models.lora import adaptable_layers, attach_new, low_rank_changes, matching_layers
from latentdiff.models.pretrained_text import AnyTextEncoder
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.printable import shown
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.model_card import base_name

ADAPTER = "default"  # what the adapter that is trained is called


def trained_network(config: UNetTrainingConfig, unet: UNet, text_encoder: AnyTextEncoder) -> TextConditionedUNet:
    """What stage 2 trains: all of the UNet, and of a text encoder that is not frozen; with `lora` new adapters alone.

    Raises ValueError if no layer has a name of lora.targets.
    """
    if config.trains_adapters:
        attach_adapters(config.lora, config.train.seed, unet, text_encoder)
    return TextConditionedUNet(unet, text_encoder if config.trains_text_encoder else None)


def attach_adapters(config: LoRAConfig, seed: int, unet: UNet, text_encoder: AnyTextEncoder) -> None:
    """Freeze both and add the adapters to train; ValueError if no layer has a name of lora.targets."""
    text_targets = config.text_targets
    if text_targets and not isinstance(text_encoder, TextEncoder):
        raise ValueError(f"lora.targets has {text_targets[0]}, but only a CLIP text encoder can have adapters")
    unet_targets = tuple(target for target in config.targets if target not in text_targets)
    parts: list[tuple[nn.Module, tuple[str, ...], str, Stream]] = [(unet, unet_targets, "UNet", Stream.INIT)]
    if isinstance(text_encoder, TextEncoder):
        parts.append((text_encoder.model, text_targets, "text encoder", Stream.TEXT_INIT))
    for network, targets, name, stream in parts:
        network.requires_grad_(False)
        for target in targets:
            if not matching_layers(network, [target]):
                ends = sorted({layer.rpartition(".")[2] for layer in adaptable_layers(network)} - {"0", "2"})
                raise ValueError(
                    f"lora.targets has {shown(target)}, which is no layer of the {name}; such are {', '.join(ends)}"
                )
        if targets:
            generator = torch.Generator().manual_seed(seed_for(seed, stream))
            assert config.rank is not None
            layers = matching_layers(network, targets)
            attach_new(network, ADAPTER, layers, config.rank, config.used_alpha, generator)


def save_adapters(config: UNetTrainingConfig, network: TextConditionedUNet, folder: Path) -> None:
    """Write the trained adapters as diffusers' file; ValueError if a number is not finite."""
    text = network.text_encoder.model if isinstance(network.text_encoder, TextEncoder) else None
    changes = {} if text is None else low_rank_changes(text, ADAPTER)
    write_lora(LoRA(low_rank_changes(network.unet, ADAPTER), changes, base_name(config)), folder / LORA_FILE)
