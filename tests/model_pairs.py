"""Our models beside those of diffusers and transformers, with the same weights."""

from collections.abc import Iterator

import torch
import transformers
from torch import nn

from latentdiff.models.text_encoder import TextEncoder


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False)))


def transformers_twin(encoder: TextEncoder) -> transformers.CLIPTextModel:
    """transformers' own model with the config and a copy of the weights of ours, in eval mode."""
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**encoder.to_transformers()))
    theirs.load_state_dict(encoder.model.state_dict(), strict=True)
    return theirs.eval()
