"""The patch discriminator: the paper's shapes, its initialisation, and what a logit depends on."""

import pytest
import tiny
import torch

from latentdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator

SMALL = DiscriminatorConfig(width=8, layers=2, norm_num_groups=4)


def test_layers_of_the_paper():
    """C64-C128-C256-C512 and the logits (Isola et al. 2017, app. 6.1.2): 2,763,840 weights in the convolutions."""
    with torch.device("meta"):
        model = PatchDiscriminator(DiscriminatorConfig())
    convs = [*model.convs, model.conv_out]
    assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 1, 1]
    assert sum(conv.weight.numel() for conv in convs) == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert len(model.norms) == 3


def test_width_stops_growing():
    with torch.device("meta"):
        model = PatchDiscriminator(DiscriminatorConfig(layers=5))
    assert [conv.out_channels for conv in model.convs] == [64, 128, 256, 512, 512, 512]


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field(layers, field):
    """Of the convolutions alone (the normalisations are made constant): 70 px for three layers, as in the paper."""
    model = PatchDiscriminator.from_config(DiscriminatorConfig(width=4, layers=layers, norm_num_groups=4), 0).double()
    model.norms = torch.nn.ModuleList([torch.nn.Identity() for _ in model.norms])
    side = 2 ** (layers + 5)
    pixels = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = model(pixels)
    assert logits.shape == (1, 1, side // 2**layers - 2, side // 2**layers - 2)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    seen = pixels.grad[0].abs().sum(dim=0) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == field


def test_initial_weights():
    state = torch.get_rng_state()
    model = PatchDiscriminator.from_config(DiscriminatorConfig(), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    weight = model.convs[3].weight  # two million draws
    assert weight.mean().item() == pytest.approx(0, abs=1e-4) and weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert all((conv.bias == 0).all() for conv in model.convs) and model.conv_out.bias is None
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in model.norms)


def test_seed_decides_the_weights():
    first, again, other = (PatchDiscriminator.from_config(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["convs.0.weight"], other["convs.0.weight"])


@pytest.mark.parametrize("channels", [1, 3])
def test_image_alone_and_in_a_batch(channels):
    """In training too: no statistics over the batch."""
    config = DiscriminatorConfig(in_channels=channels, width=8, layers=2, norm_num_groups=4)
    model = tiny.perturb(PatchDiscriminator.from_config(config, 0)).train()
    pixels = tiny.normal(3, channels, 24, 16)
    logits = model(pixels)
    assert logits.shape == (3, 1, 4, 2)
    torch.testing.assert_close(model(pixels[1:2]), logits[1:2])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_side(layers):
    """One logit at the limit, a clear error 1 px below it."""
    config = DiscriminatorConfig(width=4, layers=layers, norm_num_groups=4)
    model = PatchDiscriminator.from_config(config, 0)
    side = config.smallest_side
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    message = f"images of {side}x{side - 1} px are too small for a discriminator of {layers} layers, which needs {side}"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, side, side - 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "discriminator layers is 0, must be at least 1"),
        ({"width": 24}, "norm_num_groups 32 does not divide 48 channels"),
    ],
)
def test_impossible_config(changes, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**changes)
