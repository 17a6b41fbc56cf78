"""Autoencoder and UNet: parity with diffusers, sizes, gradients, initial weights."""

import json
import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from model_pairs import assert_same_weights, count, layers
from tiny import (
    UNET,
    VAE,
    normal,
    perturb,
    relative_error,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor, nn

from latentdiff.config import AutoencoderKLConfig, UNetConfig
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.unet import UNet

# config.json of Stable Diffusion 1.5 and 2.1, with the sparse keys of the files on the hub.
SD1_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


SD1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


SD2_UNET = SD1_UNET | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def vae_pair(**changes: object) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Ours and diffusers', of the same weights; `changes` are config keys."""
    theirs = perturb(diffusers.AutoencoderKL(**{**VAE, **changes})).eval()
    config = AutoencoderKLConfig.from_diffusers(dict(theirs.config), "config.json of diffusers")
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert count(ours) == count(theirs) and epsilons(ours) == epsilons(theirs)
    return ours, theirs


def unet_pair(**changes: object) -> tuple[UNet, diffusers.UNet2DConditionModel]:
    """Ours and diffusers', of the same weights; `changes` are config keys."""
    theirs = perturb(diffusers.UNet2DConditionModel(**{**UNET, **changes})).eval()
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config), "config.json of diffusers")).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert count(ours) == count(theirs) and epsilons(ours) == epsilons(theirs)
    return ours, theirs


def epsilons(model: nn.Module) -> dict[str, float]:
    return {
        name: module.eps for name, module in model.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)
    }


def levels(kinds: str) -> dict[str, list]:
    """UNet keys from one letter a level, the highest resolution first: c with cross-attention, p plain."""
    down = {"c": "CrossAttnDownBlock2D", "p": "DownBlock2D"}
    up = {"c": "CrossAttnUpBlock2D", "p": "UpBlock2D"}
    return {"down_block_types": [down[k] for k in kinds], "up_block_types": [up[k] for k in reversed(kinds)]}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="two-levels"),
        pytest.param({"in_channels": 1, "out_channels": 1}, id="grey"),
        pytest.param({"in_channels": 2, "out_channels": 2}, id="two-channels"),
        pytest.param({"in_channels": 4, "out_channels": 4}, id="four-channels"),
        pytest.param({"use_quant_conv": False, "use_post_quant_conv": False}, id="no-quant-convs"),
        pytest.param({"use_post_quant_conv": False}, id="one-quant-conv"),
        pytest.param({"mid_block_add_attention": False}, id="no-mid-attention"),
        pytest.param({"shift_factor": 0.3, "scaling_factor": 1.7, "latent_channels": 16}, id="shift"),
        pytest.param({"block_out_channels": [12], "layers_per_block": 2}, id="one-level"),
        pytest.param({"block_out_channels": [4, 8, 12], "layers_per_block": 3}, id="three-levels"),
        pytest.param({"block_out_channels": [4, 8, 8, 16, 16]}, id="five-levels"),
    ],
)
def test_autoencoder_equals_diffusers(changes: dict) -> None:
    depth = len(changes.get("block_out_channels", VAE["block_out_channels"]))
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    ours, theirs = vae_pair(**{**kinds, **changes})
    pixels = normal(3, theirs.config.in_channels, 32, 16)
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        moments = ours.encode(pixels)
        assert relative_error(moments, posterior.parameters) <= 1e-5
        assert relative_error(Posterior(moments).log_variance, posterior.logvar) <= 1e-5
        assert relative_error(Posterior(moments).kl(), posterior.kl()) <= 1e-5

        latents = (posterior.mode() - shift) * scale
        assert relative_error(ours.sample(moments), latents) <= 1e-5
        noise = normal(*latents.shape, seed=1)
        sample = (posterior.mean + posterior.std * noise - shift) * scale
        assert relative_error(ours.sample(moments, noise), sample) <= 1e-5

        assert relative_error(ours.decode(latents), theirs.decode(latents / scale + shift).sample) <= 1e-5
        reconstruction, same_moments = ours(pixels)
        assert relative_error(reconstruction, theirs(pixels).sample) <= 1e-5
        assert torch.equal(same_moments, moments)


SD2_STRUCTURE = {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="sd1"),
        pytest.param({"layers_per_block": 2, "attention_head_dim": 4}, id="sd1-two-layers"),
        pytest.param(SD2_STRUCTURE, id="sd2"),
        pytest.param(SD2_STRUCTURE | {"transformer_layers_per_block": 2, "layers_per_block": 2}, id="sd2-deep"),
        pytest.param({"transformer_layers_per_block": [1, 2], **levels("cc")}, id="deeper-below"),
        pytest.param(levels("pc") | {"layers_per_block": 3}, id="attention-below"),
        pytest.param(levels("c") | {"block_out_channels": [12]}, id="one-level"),
        pytest.param(levels("pcp") | {"block_out_channels": [4, 8, 12]}, id="three-levels"),
        pytest.param(levels("cpccp") | {"block_out_channels": [4, 8, 8, 16, 16]}, id="five-levels"),
        pytest.param({"flip_sin_to_cos": False, "freq_shift": 1}, id="sine-first"),
        pytest.param({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, id="pooled-text"),
        pytest.param({"addition_embed_type": "text", "cross_attention_dim": 128}, id="pooled-text-64-heads"),
        pytest.param({"in_channels": 9, "out_channels": 3, "cross_attention_dim": 5, "norm_eps": 1e-3}, id="odd-sizes"),
    ],
)
def test_unet_equals_diffusers(changes: dict) -> None:
    ours, theirs = unet_pair(**changes)
    latents = normal(3, theirs.config.in_channels, 16, 32)
    context = normal(3, 7, theirs.config.cross_attention_dim, seed=1)
    timesteps = torch.tensor([0, 421, 999])
    with torch.no_grad():
        expected = theirs(latents, timesteps, context).sample
        assert relative_error(ours(latents, timesteps, context), expected) <= 1e-5
        # Each input changes the output, so that the line above can fail.
        assert relative_error(ours(latents, timesteps.flip(0), context), expected) > 1e-3
        assert relative_error(ours(latents, timesteps, context.flip(0)), expected) > 1e-3


def test_unet_samples_do_not_mix() -> None:
    unet = tiny_unet()
    latents, context, timesteps = normal(3, 4, 8, 8), normal(3, 5, 16, seed=1), torch.tensor([3, 500, 999])
    with torch.no_grad():
        together = unet(latents, timesteps, context)
        alone = torch.cat([unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)])
        later = unet(latents, torch.tensor([3, 600, 999]), context)
    assert relative_error(together, alone) <= 1e-5
    changed = (later - together).abs().amax(dim=(1, 2, 3))
    assert changed[1] > 1e-3 and changed[0] < 1e-5 and changed[2] < 1e-5


@pytest.mark.parametrize(
    ("values", "parameters", "tensors"),
    [
        pytest.param(SD1_VAE, 83_653_863, 248, id="sd1-vae"),
        pytest.param(SD1_UNET, 859_520_964, 686, id="sd1-unet"),
        pytest.param(SD2_UNET, 865_910_724, 686, id="sd2-unet"),
    ],
)
def test_full_size_configs_have_diffusers_tensors(values: dict, parameters: int, tensors: int) -> None:
    kind = AutoencoderKL if values["_class_name"] == "AutoencoderKL" else UNet
    with torch.device("meta"):
        ours = kind(kind.config_class.from_diffusers(values, "config.json"))
        theirs = getattr(diffusers, values["_class_name"]).from_config(values)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert (count(ours), len(shapes)) == (parameters, tensors)
    # The exported config says the same to diffusers, and reads back as itself.
    exported = ours.config.to_diffusers()
    assert kind.config_class.from_diffusers(exported, "config.json") == ours.config
    with torch.device("meta"):
        read_back = type(theirs).from_config(exported)
    assert plain(read_back.config) == plain(theirs.config)


def plain(config: dict) -> dict:
    """A diffusers config without its bookkeeping, tuples as lists."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(kept))


def test_wrong_sizes_are_refused() -> None:
    vae, unet = tiny_vae(), tiny_unet()
    with pytest.raises(ValueError, match="15x16 is not divisible by 2"):
        vae.encode(normal(1, 3, 15, 16))
    with pytest.raises(ValueError, match="16x17 is not divisible by 2"):
        vae.encode(normal(1, 3, 16, 17))
    with pytest.raises(ValueError, match="1 channels, but this autoencoder takes 3"):
        vae.encode(normal(1, 1, 16, 16))

    t = torch.tensor([1])
    with pytest.raises(ValueError, match="7x8 is not divisible by 2"):
        unet(normal(1, 4, 7, 8), t, normal(1, 3, 16))
    with pytest.raises(ValueError, match="8x9 is not divisible by 2"):
        unet(normal(1, 4, 8, 9), t, normal(1, 3, 16))
    with pytest.raises(ValueError, match="context is 12 wide.* is 16"):
        unet(normal(1, 4, 8, 8), t, normal(1, 3, 12))
    with pytest.raises(ValueError, match="3 channels, but this UNet takes 4"):
        unet(normal(1, 3, 8, 8), t, normal(1, 3, 16))


def vae_loss(vae: AutoencoderKL) -> Tensor:
    pixels = normal(2, 3, 16, 16)
    reconstruction, _ = vae(pixels, noise=normal(2, 4, 8, 8, seed=1))
    return F.mse_loss(reconstruction, pixels)


def unet_loss(unet: UNet) -> Tensor:
    output = unet(normal(2, 4, 8, 8), torch.tensor([10, 900]), normal(2, 5, 16, seed=1))
    return F.mse_loss(output, normal(2, 4, 8, 8, seed=2))


MODELS = [pytest.param(tiny_vae, vae_loss, id="vae"), pytest.param(tiny_unet, unet_loss, id="unet")]


@pytest.mark.parametrize(("build", "loss"), MODELS)
def test_gradients_reach_every_parameter(build, loss) -> None:
    at_init = type(build()).from_config(build().config, seed=0)
    loss(at_init).backward()
    assert all(parameter.grad is not None for parameter in at_init.parameters())
    assert any(parameter.grad.any() for parameter in at_init.parameters())

    perturbed = build()
    loss(perturbed).backward()
    scale = max(parameter.grad.abs().max() for parameter in perturbed.parameters())
    # A key's bias adds the same to every score of a query, which softmax ignores: its gradient is rounding only.
    silent = {name for name, p in perturbed.named_parameters() if p.grad.abs().max() < 1e-6 * scale}
    assert silent == {name for name, _ in perturbed.named_parameters() if name.endswith("to_k.bias")}


def test_reconstruction_alone_trains_mean_and_variance() -> None:
    vae = tiny_vae()
    vae_loss(vae).backward()
    for layer in (vae.quant_conv, vae.encoder.conv_out):
        mean, log_variance = layer.bias.grad.chunk(2)
        assert (mean != 0).all() and (log_variance != 0).all()

    without_noise = tiny_vae()
    pixels = normal(2, 3, 16, 16)
    F.mse_loss(without_noise(pixels)[0], pixels).backward()
    mean, log_variance = without_noise.quant_conv.bias.grad.chunk(2)
    assert (mean != 0).all() and (log_variance == 0).all()


@pytest.mark.parametrize(("build", "loss"), MODELS)
def test_gradient_checkpointing_changes_memory_only(build, loss) -> None:
    plain, saving = build(), build()
    saving.enable_gradient_checkpointing()
    calls = {"plain": 0, "saving": 0}
    for name, model in [("plain", plain), ("saving", saving)]:
        resnets = [m for n, m in model.named_modules() if n.split(".")[-2:-1] == ["resnets"]]
        for resnet in resnets:
            resnet.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    losses = [loss(plain), loss(saving)]
    for value in losses:
        value.backward()
    assert calls["plain"] == len(resnets) and calls["saving"] == 2 * len(resnets)
    assert torch.equal(*losses)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)

    saving.enable_gradient_checkpointing(False)
    loss(saving).backward()
    assert calls["saving"] == 3 * len(resnets)


def wide_vae(seed: int) -> AutoencoderKL:
    config = AutoencoderKLConfig.from_diffusers({**VAE, "block_out_channels": [32, 64]}, "config.json")
    return AutoencoderKL.from_config(config, seed)


def wide_unet(seed: int) -> UNet:
    config = UNetConfig.from_diffusers({**UNET, "block_out_channels": [32, 64], "cross_attention_dim": 64}, "config")
    return UNet.from_config(config, seed)


@pytest.mark.parametrize(
    ("build", "zero"),
    [(wide_vae, ("conv2", "to_out.0")), (wide_unet, ("conv2", "proj_out", "conv_out"))],
    ids=["vae", "unet"],
)
def test_initial_weights_are_the_documented_ones(build, zero: tuple[str, ...]) -> None:
    measured = zeros = 0
    for name, layer in layers(build(seed=1)):
        if layer.bias is not None:
            assert not layer.bias.any(), name
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            assert (layer.weight == 1).all(), name
        elif name.endswith(zero):
            assert not layer.weight.any(), name
            zeros += 1
        else:
            fan_in = layer.weight[0].numel()
            assert layer.weight.abs().max() <= math.sqrt(3 / fan_in), name
            if layer.weight.numel() >= 4096:  # the error of a measured std is then below 2 %
                assert layer.weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=0.05), name
                measured += 1
    assert measured >= 8 and zeros >= 8


def test_pooling_starts_as_in_diffusers() -> None:
    config = {**UNET, "cross_attention_dim": 4096, "addition_embed_type": "text"}
    unet = UNet.from_config(UNetConfig.from_diffusers(config, "config"), 0)
    assert unet.add_embedding is not None
    embedding = unet.add_embedding.pool.positional_embedding
    assert embedding.std().item() * 4096**0.5 == pytest.approx(1, abs=0.05)
    assert unet.add_embedding.proj.weight.any() and not unet.add_embedding.proj.bias.any()


def test_initial_residual_branches_are_silent() -> None:
    vae, unet = wide_vae(seed=1), wide_unet(seed=1)
    x, embedding, context = normal(2, 64, 4, 4), normal(2, 128), normal(2, 5, 64)
    with torch.no_grad():
        assert torch.equal(vae.encoder.mid_block(x), x)
        assert torch.equal(unet.mid_block(x, embedding, context), x)
        output = unet(normal(2, 4, 8, 8), torch.tensor([1, 2]), context)
        assert output.shape == (2, 4, 8, 8) and not output.any()
        assert vae.decode(normal(2, 4, 8, 8)).std() > 0.1  # the autoencoder's output is not zero: its loss has no scale


@pytest.mark.parametrize("build", [wide_vae, wide_unet], ids=["vae", "unet"])
def test_initial_weights_depend_on_the_seed_alone(build) -> None:
    state = torch.get_rng_state()
    first = build(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert_same_weights(build(seed=5), first)
    other = build(seed=6)
    drawn = [
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.unique().numel() > 1
    ]
    assert len(drawn) > 10 and not any(drawn)


def test_construction_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        models = AutoencoderKL(wide_vae(0).config), UNet(wide_unet(0).config)
    for model in models:
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        loaded = type(model).from_config(model.config, seed=0)
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        assert all(parameter.requires_grad for parameter in loaded.parameters())
