"""Linear self-attention at chosen levels of the UNet: the formula, its cost, and that nothing else changes."""

from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tiny import LargestOutput, normal, perturb, relative_error, tiny_unet
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.models.layers import Attention, efficient_attention
from latentdiff.models.unet import UNet

LINEAR = {
    "down_block_types": ["LinearAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "LinearAttnUpBlock2D"],
}
INPUTS = (normal(2, 4, 8, 12), torch.tensor([10, 900]), normal(2, 5, 16, seed=1))  # latents, timesteps, context


def unet_loss(unet: UNet) -> Tensor:
    return F.mse_loss(unet(*INPUTS), normal(2, 4, 8, 12, seed=2))


# ----------------------------------------------------------------------------------------------------------------------
# The formula


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_its_explicit_matrix(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (2 * normal(2, 3, n, c, seed=s).double() for n, c, s in [(35, 4, 0), (20, 4, 1), (20, 6, 2)])
    over_features = q.exp() / q.exp().sum(dim=3, keepdim=True)
    over_tokens = k.exp() / k.exp().sum(dim=2, keepdim=True)
    weights = torch.einsum("bhnc,bhlc->bhnl", over_features, over_tokens)
    expected = torch.einsum("bhnl,bhlc->bhnc", weights, v)

    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 3, 35).double())  # each result averages the values
    assert relative_error(efficient_attention(*(t.to(dtype) for t in (q, k, v))).double(), expected) <= tolerance


@pytest.mark.parametrize("upcast", [False, True])
def test_heads_are_consecutive_channels(upcast: bool) -> None:
    attention = perturb(Attention(12, heads=3, upcast=upcast, linear_attention=True), scale=1).double()
    x = normal(2, 6 * 5, 12).double()
    with torch.no_grad():
        q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):  # three heads of four channels
            weights = q[..., part].softmax(dim=2) @ k[..., part].softmax(dim=1).transpose(1, 2)  # [2, 30, 30]
            heads.append(weights @ v[..., part])
        expected = torch.cat(heads, dim=-1) @ attention.to_out[0].weight.T + attention.to_out[0].bias
        assert relative_error(attention(x), expected) <= (1e-5 if upcast else 1e-12)  # upcast is to float32


@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_leaves_autocast(upcast: bool) -> None:
    attention = Attention(16, heads=2, upcast=upcast, linear_attention=True).bfloat16()
    x = normal(4, 64, 16).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        attention.to_out[0].weight.copy_(torch.eye(16))
        attention.to_out[0].bias.zero_()
        q, k, v = (
            layer(x).double().unflatten(2, (2, 8)).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        exact = (q.softmax(dim=3) @ k.softmax(dim=2).transpose(2, 3) @ v).transpose(1, 2).flatten(2)
        out = attention(x)
    rounded_otherwise = (out != exact.bfloat16()).float().mean().item()
    assert out.dtype == torch.bfloat16
    assert rounded_otherwise < 0.005 if upcast else rounded_otherwise > 0.05


# ----------------------------------------------------------------------------------------------------------------------
# The cost


def flops(attention: Attention, pixels: int) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(normal(1, pixels, 12))
    return counter.get_total_flops()


def test_cost_is_linear_in_the_pixels() -> None:
    linear = Attention(12, heads=3, linear_attention=True)
    softmax = Attention(12, heads=3)
    for n in (64, 256):
        projections = 4 * 2 * n * 12 * 12
        assert flops(linear, n) == projections + 3 * 2 * (2 * n * 4 * 4)  # 3 heads, 2 products of [n, 4] and [4, 4]
        assert flops(softmax, n) == projections + 3 * 2 * (2 * n * n * 4)
    assert flops(linear, 256) == 4 * flops(linear, 64)
    assert flops(softmax, 256) > 10 * flops(softmax, 64)


@pytest.mark.parametrize("upcast", [False, True])
def test_nothing_is_larger_than_the_tokens(upcast: bool) -> None:
    attention = Attention(12, heads=3, upcast=upcast, linear_attention=True)
    with LargestOutput() as largest:
        attention(normal(1, 1024, 12)).sum().backward()
    assert largest.elements == 1024 * 12


# ----------------------------------------------------------------------------------------------------------------------
# In the UNet


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (["LinearAttnDownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "LinearAttnUpBlock2D"]),
        (["DownBlock2D", "LinearAttnDownBlock2D"], ["LinearAttnUpBlock2D", "UpBlock2D"]),
        (["LinearAttnDownBlock2D", "DownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]),
        (["DownBlock2D", "DownBlock2D"], ["UpBlock2D", "UpBlock2D"]),
    ],
)
def test_each_level_has_its_kind(down: list[str], up: list[str]) -> None:
    unet = tiny_unet(down_block_types=down, up_block_types=up, transformer_layers_per_block=2)
    expected = {}
    kinds = {f"down_blocks.{i}": (kind, 1) for i, kind in enumerate(down)}
    kinds |= {f"up_blocks.{i}": (kind, 2) for i, kind in enumerate(up)}
    for block, (kind, transformers) in ({"mid_block": ("CrossAttn", 1)} | kinds).items():
        if kind.startswith(("CrossAttn", "LinearAttn")):
            for place in [
                f"{block}.attentions.{i}.transformer_blocks.{j}" for i in range(transformers) for j in (0, 1)
            ]:
                expected |= {f"{place}.attn1": kind.startswith("LinearAttn"), f"{place}.attn2": False}
    found = {name: m.linear_attention for name, m in unet.named_modules() if isinstance(m, Attention)}
    assert found == expected


@pytest.mark.parametrize("changes", [{}, {"upcast_attention": True, "use_linear_projection": True}])
def test_weights_are_those_of_softmax_attention_but_not_the_output(changes: dict) -> None:
    linear, softmax = tiny_unet(**LINEAR, **changes), tiny_unet(**changes)
    assert list(linear.state_dict()) == list(softmax.state_dict())
    for a, b in zip(linear.parameters(), softmax.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert relative_error(linear(*INPUTS), softmax(*INPUTS)) > 1e-3
        # The self-attention is all that differs.
        for attention in (m for m in linear.modules() if isinstance(m, Attention)):
            attention.linear_attention = False
        assert torch.equal(linear(*INPUTS), softmax(*INPUTS))


def test_saved_weights_give_the_same_output(tmp_path: Path) -> None:
    unet = tiny_unet(**LINEAR)
    unet.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == unet.config
    with torch.no_grad():
        assert torch.equal(again(*INPUTS), unet(*INPUTS))


@pytest.mark.parametrize("side", ["down_block_types", "up_block_types"])
def test_diffusers_refuses_the_folder(tmp_path: Path, side: str) -> None:
    """It would compute softmax attention with these weights."""
    tiny_unet().save_pretrained(tmp_path / "softmax")
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "softmax")

    unet = tiny_unet(**{side: LINEAR[side]})
    unet.save_pretrained(tmp_path / "linear")
    with pytest.raises(ValueError, match=r"LinearAttn(Down|Up)Block2D does not exist"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "linear")
    with pytest.raises(ValueError, match=r"LinearAttn(Down|Up)Block2D does not exist"):
        diffusers.UNet2DConditionModel.from_config(unet.config.to_diffusers())


def test_projected_context_gives_the_same_output() -> None:
    unet = tiny_unet(**LINEAR)
    latents, timesteps, context = INPUTS
    with torch.no_grad():
        projected = unet.project(context)
        assert len(projected.pairs) == 4  # one transformer down, one in the middle, two up
        assert torch.equal(unet(latents, timesteps, projected), unet(*INPUTS))
        assert relative_error(unet(latents, timesteps, -context), unet(*INPUTS)) > 1e-3


def test_gradients_with_and_without_checkpointing() -> None:
    plain, saving = tiny_unet(**LINEAR), tiny_unet(**LINEAR)
    saving.enable_gradient_checkpointing()
    calls = {"plain": 0, "saving": 0}
    for name, unet in [("plain", plain), ("saving", saving)]:
        linear = [m for m in unet.modules() if isinstance(m, Attention) and m.linear_attention]
        for attention in linear:
            attention.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        unet_loss(unet).backward()
    assert calls == {"plain": 3, "saving": 6}

    scale = max(parameter.grad.abs().max() for parameter in plain.parameters())
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad.abs().max() > 1e-6 * scale, name  # to_q, to_k and to_v of attn1 among them
        assert torch.equal(a.grad, b.grad), name


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (normal(1, 2, 6, 3, seed=s).double().requires_grad_() for s in range(3))
    assert torch.autograd.gradcheck(efficient_attention, (q, k, v))
