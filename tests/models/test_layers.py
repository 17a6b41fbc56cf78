"""Attention: its formula, its precision, its memory; products, and how they are computed."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    LargestOutput,
    normal,
    perturb,
    relative_error,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor

from latentdiff.models import layers
from latentdiff.models.layers import (
    MAX_PLAIN_WEIGHTS,
    MIN_CONVOLVED,
    MIN_UPSAMPLED_PIXELS,
    Attention,
    Linear,
    Transformer2D,
    Upsample,
    attention,
    convolves_products,
    plain_attention,
    project_tokens,
    transposes_upsampling,
    upsample_convolution,
)


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


@pytest.mark.parametrize(("tokens", "context"), [(16, 16), (64, 64), (64, 77), (256, 32)])
def test_plain_attention_equals_the_fused_one(tokens: int, context: int) -> None:
    values = [normal(2, 3, n, 40, seed=i).requires_grad_() for i, n in enumerate((tokens, context, context))]
    plain, fused = plain_attention(*values), F.scaled_dot_product_attention(*values)
    assert relative_error(plain, fused) <= 1e-5
    upstream = normal(*plain.shape, seed=3)
    gradients = (torch.autograd.grad(output, values, upstream) for output in (plain, fused))
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_plain_attention_where_a_cpu_trains_in_16_bits_on_few_tokens() -> None:
    def chosen(tokens: int, dtype: torch.dtype) -> str:
        values = [normal(1, 2, tokens, 16, seed=i).to(dtype).requires_grad_() for i in range(3)]
        plain, fused = plain_attention(*values), F.scaled_dot_product_attention(*values)
        assert not torch.equal(plain, fused)  # the two round differently, so the result shows which one it was
        found = attention(*values)
        assert found.dtype == dtype
        return "plain" if torch.equal(found, plain) else "fused" if torch.equal(found, fused) else "neither"

    few = int(MAX_PLAIN_WEIGHTS**0.5)
    assert chosen(64, torch.bfloat16) == chosen(few, torch.bfloat16) == "plain"
    assert chosen(few + 1, torch.bfloat16) == "fused"
    assert chosen(64, torch.float32) == "fused"
    with torch.no_grad():
        assert chosen(64, torch.bfloat16) == "fused"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_as_a_product_over_tokens(memory_format: torch.memory_format) -> None:
    layer = perturb(torch.nn.Conv2d(24, 24, 1)).to(memory_format=memory_format)
    x = normal(2, 24, 4, 6).to(memory_format=memory_format).requires_grad_()
    convolved = layer(x).flatten(2).transpose(1, 2)
    multiplied = project_tokens(layer, x.flatten(2).transpose(1, 2))
    assert relative_error(multiplied, convolved) <= 1e-5
    upstream, leaves = normal(*convolved.shape, seed=3), [x, *layer.parameters()]
    gradients = (torch.autograd.grad(output, leaves, upstream) for output in (multiplied, convolved))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("shape", [(300, 130), (2, 130, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_as_a_convolution(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "products_lack_avx512", lambda: True)
    layer, x = perturb(Linear(shape[-1], 24, bias=bias)), normal(*shape)
    with torch.no_grad():
        assert convolves_products(x)
        found, expected = layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert found.shape == expected.shape and found.is_contiguous()
    assert relative_error(found, expected) <= 1e-6
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        assert relative_error(layer(x), expected) <= 1e-6


def test_products_are_convolutions_where_they_are_large_and_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features = MIN_CONVOLVED
    x = torch.zeros(rows, features)

    def chosen(lacks: bool, x: Tensor) -> bool:
        monkeypatch.setattr(layers, "products_lack_avx512", lambda: lacks)
        return convolves_products(x)

    assert not chosen(True, x)  # it has a gradient
    with torch.no_grad():
        assert chosen(True, x) and chosen(True, x.view(2, rows // 2, features))
        assert not chosen(False, x)
        assert not chosen(True, x[1:]) and not chosen(True, x[:, 1:])
        assert not chosen(True, x.bfloat16()) and not chosen(True, x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not chosen(True, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_and_a_convolution_in_one_operation(memory_format: torch.memory_format, bias: bool) -> None:
    """Values and gradients, in float64 to its rounding: at the borders, with odd sides, with more channels."""
    x = normal(2, 3, 5, 4).double().to(memory_format=memory_format).requires_grad_()
    weight = normal(7, 3, 3, 3, seed=1).double().to(memory_format=memory_format).requires_grad_()
    leaves = [x, weight] + ([normal(7, seed=2).double().requires_grad_()] if bias else [])
    larger = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(larger, weight, leaves[2] if bias else None, padding=1)
    found = upsample_convolution(x, weight, leaves[2] if bias else None)
    assert found.shape == (2, 7, 10, 8) and relative_error(found, expected) <= 1e-15
    upstream = normal(*expected.shape, seed=3).double()
    pairs = zip(*(torch.autograd.grad(output, leaves, upstream) for output in (found, expected)), strict=True)
    assert all(relative_error(ours, theirs) <= 1e-15 for ours, theirs in pairs)


def test_upsampling_under_autocast_rounds_as_much_as_the_two_operations() -> None:
    layer, x = perturb(Upsample(32)), normal(4, 32, 16, 16)
    assert transposes_upsampling(x)
    upstream = normal(4, 32, 32, 32, seed=1)
    exact = layer.double()(x.double())
    exact_gradient = torch.autograd.grad(exact, layer.conv.weight, upstream.double())[0]
    layer.float()
    errors = {}
    for name, convolve in (
        ("one", lambda: layer(x)),
        ("two", lambda: layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            output = convolve()
        gradient = torch.autograd.grad(output.float(), layer.conv.weight, upstream)[0]
        errors[name] = torch.tensor([relative_error(output, exact), relative_error(gradient, exact_gradient)])
    assert (errors["one"] <= 1.25 * errors["two"]).all(), errors


def test_upsampling_is_one_operation_where_that_is_faster() -> None:
    x = torch.zeros(4, 8, 16, MIN_UPSAMPLED_PIXELS // 64)
    assert transposes_upsampling(x)
    assert not transposes_upsampling(x[1:]) and not transposes_upsampling(x.to("meta"))
    assert not transposes_upsampling(torch.zeros(1, 2 * MIN_UPSAMPLED_PIXELS, 1, MIN_UPSAMPLED_PIXELS))


@pytest.mark.parametrize("linear", [False, True])
def test_the_choices_break_no_graph(linear: bool) -> None:
    sizes = {"heads": 2, "depth": 1, "context_width": 5, "groups": 4}
    transformer = Transformer2D(16, **sizes, linear=linear, upcast=False, linear_attention=False)
    x, context = normal(2, 16, 4, 4), normal(2, 3, 5)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, context), transformer(x, context))


def test_upsampling_breaks_no_graph() -> None:
    upsample, x = Upsample(8), normal(2, 8, 32, 32)
    assert transposes_upsampling(x)
    compiled = torch.compile(upsample, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), upsample(x))
