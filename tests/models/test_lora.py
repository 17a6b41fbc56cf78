"""Adapters by peft against the formula itself, W + scale * alpha / rank * up @ down."""

from pathlib import Path

import pytest
import torch
from lora_files import EVERYWHERE, matching, product, random_changes
from tiny import normal, relative_error, tiny_pipeline, tiny_unet
from torch import Tensor

from latentdiff.models.lora import (
    adaptable_layers,
    adapter_scales,
    attach,
    attach_new,
    detach,
    fuse,
    low_rank_changes,
    matching_layers,
    set_scales,
)
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline

INPUTS = (normal(2, 4, 8, 8, seed=1), torch.tensor([3, 700]), normal(2, 5, 16, seed=2))


def frozen_unet(**changes: object) -> UNet:
    """What an adapter is attached to. PyTorch's kernels compute other roundings with weights that need gradients."""
    return tiny_unet(**changes).requires_grad_(False)


@torch.no_grad()
def output(unet: UNet) -> Tensor:
    return unet(*INPUTS)


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_adapters_stack_and_fuse_as_the_formula_says(linear: bool) -> None:
    """Linear layers, 1x1 convolutions (on the CPU computed over tokens) and 3x3 ones, one LoRA or two on a layer."""
    unet = frozen_unet(use_linear_projection=linear)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = output(unet)
    both = {"a": matching(unet, *EVERYWHERE), "b": matching(unet, "to_q", "proj_in", "conv2")}
    changes = {
        "a": random_changes(both["a"], alpha=3.0, rank=2),
        "b": random_changes(both["b"], alpha=1.0, rank=3, seed=500),
    }
    random = torch.random.get_rng_state()
    for name, own in changes.items():
        attach(unet, name, own)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert adapter_scales(unet) == {"a": 1.0, "b": 1.0}

    def by_hand(**scales: float) -> Tensor:
        other = frozen_unet(use_linear_projection=linear)
        weights = other.state_dict()
        for name, scale in scales.items():
            for layer, change in changes[name].items():
                weights[f"{layer}.weight"] += scale * product(change)
        return output(other)

    assert relative_error(output(unet), by_hand(a=1, b=1)) < 1e-5
    set_scales(unet, {"b": -0.5})
    assert adapter_scales(unet) == {"a": 0.0, "b": -0.5}
    assert relative_error(output(unet), by_hand(b=-0.5)) < 1e-5
    set_scales(unet, {})
    # A 1x1 convolution with an adapter is computed as one.
    assert relative_error(output(unet), plain) <= (0 if linear else 1e-6)
    assert adapter_scales(unet) == {"a": 0.0, "b": 0.0}
    detach(unet)
    assert torch.equal(output(unet), plain) and adapter_scales(unet) == {}
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())

    for name, own in changes.items():
        attach(unet, name, own)
    set_scales(unet, {"a": 0.3, "b": 2.0})
    unfused = output(unet)
    assert relative_error(unfused, plain) > 0.01
    fuse(unet)
    assert unet.state_dict().keys() == before.keys() and not adapter_scales(unet)
    assert relative_error(output(unet), unfused) < 1e-5
    assert relative_error(output(unet), by_hand(a=0.3, b=2.0)) < 1e-5


def test_only_new_adapters_are_trained() -> None:
    unet = frozen_unet()
    plain = output(unet)
    layers = matching_layers(unet, ["to_q", "conv1"])
    assert "down_blocks.0.resnets.0.conv1" in layers and all(name.endswith(("to_q", "conv1")) for name in layers)
    random = torch.random.get_rng_state()
    attach_new(unet, "new", layers, 4, 8.0, torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(output(unet), plain)  # `up` is zero
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers) and all(".lora_" in name for name in trained)
    for name, change in low_rank_changes(unet, "new").items():
        bound = change.down[0].numel() ** -0.5
        assert not change.up.any() and 0.5 * bound < change.down.abs().max() < bound
        assert change.alpha == 8.0, name
    # Layers with adapters are found as before.
    assert adaptable_layers(unet).keys() == adaptable_layers(frozen_unet()).keys()
    assert sorted(matching_layers(unet, ["to_q", "conv1"])) == sorted(layers)
    again = frozen_unet()
    attach_new(again, "new", layers, 4, 8.0, torch.Generator().manual_seed(3))
    theirs = low_rank_changes(again, "new")
    assert all(torch.equal(theirs[name].down, own.down) for name, own in low_rank_changes(unet, "new").items())


def test_mapped_files_stay_what_they_are(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    unet = LatentDiffusionPipeline.from_pretrained(tmp_path).unet
    attach(unet, "a", random_changes(matching(unet, *EVERYWHERE)))
    unfused = output(unet)
    fuse(unet)
    assert relative_error(output(unet), unfused) < 1e-5
    assert path.read_bytes() == before


def test_weights_of_other_types() -> None:
    """In bf16 to its rounding; and what is not finite in float16 leaves the network as it was."""
    unet = frozen_unet()
    changes = random_changes(matching(unet, *EVERYWHERE))
    attach(unet, "a", changes)
    exact = output(unet)
    unet.bfloat16()
    inputs = [INPUTS[0].bfloat16(), INPUTS[1], INPUTS[2].bfloat16()]
    with torch.no_grad():
        unfused = unet(*inputs).float()
        late = frozen_unet().bfloat16()
        attach(late, "a", changes)
        assert {p.dtype for p in late.parameters()} == {torch.bfloat16}
        assert torch.equal(late(*inputs).float(), unfused)
        fuse(unet)
        assert relative_error(unfused, exact) < 0.1 and relative_error(unet(*inputs).float(), exact) < 0.1

    half = frozen_unet().half()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    attach(half, "a", changes)
    set_scales(half, {"a": 1e6})
    with pytest.raises(ValueError, match=r"the LoRA makes the weight of \S+ infinite in torch.float16: choose smaller"):
        fuse(half)
    assert adapter_scales(half) == {"a": 1e6}
    detach(half)
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
