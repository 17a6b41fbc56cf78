"""Model folders: to and from diffusers, bit for bit; broken ones are reported."""

import json
import os
import stat
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import assert_same_weights, without
from tiny import UNET, VAE, perturb, tiny_unet, tiny_vae
from torch import nn

from latentdiff.formats.files import (
    read_json,
    read_safetensors,
)
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"


THEIRS = {AutoencoderKL: (diffusers.AutoencoderKL, VAE), UNet: (diffusers.UNet2DConditionModel, UNET)}


BUILDERS = [pytest.param(tiny_vae, id="vae"), pytest.param(tiny_unet, id="unet")]


KINDS = [pytest.param(AutoencoderKL, id="vae"), pytest.param(UNet, id="unet")]


def diffusers_model(kind: type) -> nn.Module:
    """Diffusers' counterpart of random weights."""
    theirs, config = THEIRS[kind]
    return perturb(theirs(**config))


@pytest.fixture
def saved_vae(tmp_path: Path) -> Path:
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("build", BUILDERS)
def test_round_trip_is_bitwise(build, tmp_path: Path) -> None:
    model = build().train()
    random_state = torch.manual_seed(5).get_state()
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = type(model).from_pretrained(str(tmp_path / "new" / "folder"))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("build", BUILDERS)
def test_memory_format_and_dtype(build, tmp_path: Path) -> None:
    """channels_last weights are stored in plain order; a file's dtype is kept unless another one is asked for."""
    model = build().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)

    half = build().to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), half)
    full = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_weights(full, half.float())


@pytest.mark.parametrize("build", BUILDERS)
def test_opens_in_diffusers(build, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    theirs, info = THEIRS[type(model)][0].from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    assert not info["error_msgs"]
    assert_same_weights(theirs, model)
    for key, value in model.config.model_dump(mode="json").items():
        assert theirs.config[key] == value, key


@pytest.mark.parametrize("kind", KINDS)
def test_opens_what_diffusers_wrote(kind: type, tmp_path: Path) -> None:
    theirs = diffusers_model(kind)
    theirs.save_pretrained(tmp_path)
    assert_same_weights(kind.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_variants(kind: type, tmp_path: Path) -> None:
    theirs = diffusers_model(kind).half()
    theirs.save_pretrained(tmp_path, variant="fp16")
    assert_same_weights(kind.from_pretrained(tmp_path, variant="fp16"), theirs)
    full = kind.from_pretrained(tmp_path, variant="fp16", dtype=torch.float32)
    assert_same_weights(full, theirs.float())
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors does not exist.*has .*\.fp16\."):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(kind: type, variant: str | None, tmp_path: Path) -> None:
    theirs = diffusers_model(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / WEIGHTS).exists()
    assert_same_weights(kind.from_pretrained(tmp_path, variant=variant), theirs)

    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} does not exist"):
        kind.from_pretrained(tmp_path, variant=variant)

    next(tmp_path.glob("*.index*.json")).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        kind.from_pretrained(tmp_path, variant=variant)


def test_header_describes_the_file(saved_vae: Path) -> None:
    with safe_open(saved_vae / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["config"]) == read_json(saved_vae / "config.json")


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        tiny_vae().save_pretrained(tmp_path)
        assert os.umask(0o027) == 0o027  # saving has not changed it
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | changes))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights_are_named(saved_vae: Path, keep: int) -> None:
    content = (saved_vae / WEIGHTS).read_bytes()
    (saved_vae / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or not a safetensors file"):
        AutoencoderKL.from_pretrained(saved_vae)


@pytest.mark.parametrize("lost", ["dtype", "shape"])
def test_a_header_without_one_of_its_entries(saved_vae: Path, lost: str) -> None:
    content = (saved_vae / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["decoder.conv_in.bias"][lost]
    changed = json.dumps(header).encode()
    (saved_vae / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is .* \(its header says of decoder.conv_in.bias: {{"):
        AutoencoderKL.from_pretrained(saved_vae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "post_quant_conv.bias"), r"missing post_quant_conv\.bias$"),
        (lambda t: without(t, "decoder."), r"missing decoder\.conv_in\.bias, .* and \d+ more$"),
        (lambda t: t | {"extra.weight": torch.zeros(2)}, r"unexpected extra\.weight$"),
        (
            lambda t: without(t, "encoder.conv_in.bias") | {"encoder.conv_on.bias": torch.zeros(8)},
            r"missing encoder\.conv_in\.bias; unexpected encoder\.conv_on\.bias$",
        ),
        (
            lambda t: t | {"encoder.conv_in.weight": torch.zeros(8, 1, 3, 3)},
            r"encoder\.conv_in\.weight is \[8, 1, 3, 3\], the config says \[8, 3, 3, 3\]$",
        ),
    ],
    ids=["missing", "many-missing", "unexpected", "misspelt", "shape"],
)
def test_weights_that_do_not_fit_are_listed(saved_vae: Path, change, message: str) -> None:
    change_weights(saved_vae, change)
    with pytest.raises(ValueError, match=rf"{saved_vae / WEIGHTS} does not fit the model: {message}"):
        AutoencoderKL.from_pretrained(saved_vae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "config.json: act_fn is 'gelu', but only 'silu' is supported"),
        ({"latents_mean": [0.0] * 4}, "config.json: latents_mean is .*, but only None is supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "config.json: down_block_types.0: .*DownEncoderBlock2D"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "config.json: down_block_types has 1 entries.* has 2"),
        ({"scaling_factor": 0}, "config.json: scaling_factor: .*greater than 0"),
        ({"norm_num_groups": 3}, "config.json: block_out_channels has 8, which norm_num_groups 3 does not divide"),
        ({"use_magic": True}, "config.json: unknown key use_magic"),
        ({"_class_name": "VQModel"}, "config.json describes a VQModel, not a AutoencoderKL"),
    ],
)
def test_autoencoder_configs_that_are_not_supported_are_named(saved_vae: Path, changes: dict, message: str) -> None:
    change_config(saved_vae, **changes)
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_pretrained(saved_vae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu', but only 'silu' is supported"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift', but only 'default'"),
        ({"mid_block_type": None}, "mid_block_type is None, but only 'UNetMidBlock2DCrossAttn'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type: .*'text', got 'text_time'"),
        ({"addition_embed_type": "text"}, "addition_embed_type_num_heads 64 does not divide cross_attention_dim 16"),
        ({"class_embed_type": "timestep"}, "unknown key class_embed_type"),
        ({"attention_head_dim": [2, 4, 8]}, "attention_head_dim has 3 entries, block_out_channels has 2"),
        ({"attention_head_dim": 3}, "block_out_channels has 8, which 3 attention heads do not divide"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types.1: .*CrossAttnUpBlock2D"),
        ({"cross_attention_dim": "wide"}, "cross_attention_dim: .*integer.*'wide'"),
        ({"_class_name": "AutoencoderKL"}, "config.json describes a AutoencoderKL, not a UNet2DConditionModel"),
    ],
)
def test_unet_configs_that_are_not_supported_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    tiny_unet().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)


def test_unknown_keys_without_effect_are_ignored(saved_vae: Path) -> None:
    change_config(saved_vae, future_option=None, future_switch=False)
    assert AutoencoderKL.from_pretrained(saved_vae).config == tiny_vae().config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"sample_size": ', "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json is not text in UTF-8"),
        (b"[1, 2]", "config.json must hold a JSON object, not list"),
        (None, "config.json does not exist"),
    ],
)
def test_broken_config_files_are_named(saved_vae: Path, content: bytes | None, message: str) -> None:
    (saved_vae / "config.json").unlink()
    if content is not None:
        (saved_vae / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_pretrained(saved_vae)


def test_missing_files_are_named(saved_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^UNet '.*nowhere' does not exist"):
        UNet.from_pretrained(tmp_path / "nowhere")
    (saved_vae / WEIGHTS).unlink()
    (saved_vae / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not exist; .* has no safetensors file"):
        AutoencoderKL.from_pretrained(saved_vae)
    with pytest.raises(ValueError, match="x.safetensors does not exist"):
        read_safetensors(tmp_path / "x.safetensors")
