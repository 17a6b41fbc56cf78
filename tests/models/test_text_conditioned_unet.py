"""UNet and text encoder as one module."""

import torch
from model_pairs import count
from tiny import (
    normal,
    tiny_text_encoder,
    tiny_unet,
    tokenizer,
)

from latentdiff.models.text_conditioned_unet import TextConditionedUNet


def test_text_conditioned_unet_takes_input_ids_or_context() -> None:
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    latents, timesteps = normal(2, 4, 8, 8), torch.tensor([1, 500])
    input_ids = tokenizer()(["a red apple", "a green boat"])
    context = text_encoder(input_ids)
    trained_along, frozen = TextConditionedUNet(unet, text_encoder), TextConditionedUNet(unet, None)
    with torch.no_grad():
        expected = unet(latents, timesteps, context)
        assert torch.equal(trained_along(latents, timesteps, input_ids), expected)
        assert torch.equal(frozen(latents, timesteps, context), expected)
    assert count(trained_along) == count(unet) + count(text_encoder)
    assert count(frozen) == count(unet)
    trained_along(latents, timesteps, input_ids).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in text_encoder.model.encoder.layers[0].mlp.parameters())
