"""Attention: its formula, its precision, its memory."""

import math

import pytest
import torch
from tiny import (
    LargestOutput,
    normal,
    perturb,
    relative_error,
    tiny_unet,
    tiny_vae,
)

from latentdiff.models.layers import Attention


@pytest.mark.parametrize("upcast", [False, True])
def test_attention_is_softmax_of_scaled_products(upcast: bool) -> None:
    attention = perturb(Attention(12, heads=3, context_width=5, qkv_bias=True, upcast=upcast)).double()
    x, context = normal(2, 6, 12).double(), normal(2, 4, 5, seed=1).double()
    with torch.no_grad():
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):  # three heads of four channels
            scores = torch.einsum("bnc,blc->bnl", q[..., part], k[..., part]) / math.sqrt(4)
            weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
            heads.append(torch.einsum("bnl,blc->bnc", weights, v[..., part]))
        expected = torch.cat(heads, dim=-1) @ attention.to_out[0].weight.T + attention.to_out[0].bias
        tolerance = 1e-6 if upcast else 1e-12  # upcast is to float32
        assert relative_error(attention(x, context), expected) <= tolerance
        with pytest.raises(RuntimeError):
            attention(x)  # itself is 12 wide, its context 5


@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_attention_rounds_only_its_result(upcast: bool) -> None:
    attention = Attention(16, heads=1, upcast=upcast).bfloat16()
    x = normal(4, 64, 16).bfloat16()
    with torch.no_grad():
        attention.to_out[0].weight.copy_(torch.eye(16))
        attention.to_out[0].bias.zero_()
        q, k, v = (layer(x).double() for layer in (attention.to_q, attention.to_k, attention.to_v))
        expected = ((q @ k.transpose(1, 2)) / 4).softmax(dim=-1) @ v
        out = attention(x)
    rounded_otherwise = (out != expected.bfloat16()).float().mean().item()
    assert out.dtype == torch.bfloat16
    assert rounded_otherwise < 0.005 if upcast else rounded_otherwise > 0.05


def test_no_attention_matrix_is_kept() -> None:
    """Over N = 1024 pixels the N x N scores of one head would be the largest tensor by far."""
    unet, vae, size = tiny_unet(), tiny_vae(), 32
    latents = normal(1, 4, size, size)
    for run_model in (
        lambda: unet(latents, torch.tensor([5]), normal(1, 3, 16)).sum().backward(),
        lambda: vae.encode(normal(1, 3, 2 * size, 2 * size)).sum().backward(),
        lambda: vae.decode(latents).sum().backward(),
    ):
        with LargestOutput() as largest:
            run_model()
        assert 10_000 < largest.elements < size**4 / 4
