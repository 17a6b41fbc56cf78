"""Single files of Stable Diffusion's layout: there and back bit for bit, read by diffusers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import SD1, contents, contents_of, small_sd
from torch import Tensor

from latentdiff.formats.single_file import METADATA, read_single_file, schedule_buffers
from latentdiff.pipeline import LatentDiffusionPipeline

LAYOUTS = ("sd1", "sd2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd1/ and sd1.safetensors, sd2/ and sd2.safetensors."""
    place = tmp_path_factory.mktemp("single")
    for layout in LAYOUTS:
        pipeline = small_sd(layout)
        pipeline.save_pretrained(place / layout)
        pipeline.save_single_file(place / f"{layout}.safetensors")
    return place


def rewritten(source: Path, target: Path, metadata: dict[str, str] | None = None, **changes: Any) -> Path:
    """The file with other tensors (None: without them) and other metadata. dtype: of all of them."""
    dtype = changes.pop("dtype", None)
    tensors = {**load_file(source), **changes}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    if dtype is not None:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    save_file(tensors, target, metadata)
    return target


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_to_file_to_folder_is_bitwise(layout: str, saved: Path, tmp_path: Path) -> None:
    opened = LatentDiffusionPipeline.from_single_file(saved / f"{layout}.safetensors")
    opened.save_pretrained(tmp_path / "again")
    before, after = contents_of(saved / layout), contents_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name, content in before.items() if content != after[name]] == []
    opened.save_single_file(tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == contents(saved / f"{layout}.safetensors")


def test_names_are_stable_diffusions(saved: Path) -> None:
    """Keys that diffusers, ComfyUI and kohya tell these files by, and the shapes where the two sides differ."""
    sd1, sd2 = (load_file(saved / f"{layout}.safetensors") for layout in LAYOUTS)
    for key in (
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
    ):
        assert key in sd1 and key in sd2
    # As many as in Stable Diffusion's own files, where the widths grow at the same levels.
    assert sum(key.startswith("model.diffusion_model.") for key in sd1) == 686
    assert sd1["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert sd1["model.diffusion_model.input_blocks.1.1.proj_in.weight"].ndim == 4
    assert sd2["model.diffusion_model.input_blocks.1.1.proj_in.weight"].ndim == 2
    assert "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in sd1
    position = sd1["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert position.dtype == torch.int64 and position.tolist() == [list(range(77))]
    # Two layers and the one that nothing reads.
    blocks = {key.split(".")[4] for key in sd2 if key.startswith("cond_stage_model.model.transformer.resblocks.")}
    assert blocks == {"0", "1", "2"}
    assert sd2["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (384, 128)
    said = header(saved / "sd2.safetensors")
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.resolution"] == "32x32"
    assert header(saved / "sd1.safetensors")["modelspec.architecture"] == "stable-diffusion-v1"


def test_buffers_are_those_of_ldm() -> None:
    """Its formulas (register_schedule in ldm/models/diffusion/ddpm.py), in NumPy."""
    from latentdiff.diffusion.schedule import NoiseSchedule

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    previous = np.append(1.0, cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - cumprod)
    expected = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - cumprod),
    }
    buffers = schedule_buffers(NoiseSchedule())
    assert buffers.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(buffers[name].numpy(), values, rtol=1e-6, err_msg=name)
        assert buffers[name].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_configs_are_seen_in_the_shapes(layout: str, saved: Path, tmp_path: Path) -> None:
    """Of a file without our metadata, in half precision, with averages and Stable Diffusion's own spelling of zeros."""
    source = saved / f"{layout}.safetensors"
    tensors = load_file(source)
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): torch.full_like(tensor, torch.nan)
        for key, tensor in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    counts: dict[str, Any] = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}
    path = rewritten(source, tmp_path / "a.safetensors", dtype=torch.float16, **averages, **counts)
    opened = LatentDiffusionPipeline.from_single_file(path)
    expected = LatentDiffusionPipeline.from_pretrained(saved / layout)
    differing = {
        key: (value, getattr(expected.unet.config, key))
        for key, value in opened.unet.config
        if value != getattr(expected.unet.config, key)
    }
    side = 64 if layout == "sd1" else 96
    assert differing == {"sample_size": (side, 16)}
    assert opened.vae.config == expected.vae.config.model_copy(update={"sample_size": 2 * side})
    assert opened.tokenizer.pad_token_id == expected.tokenizer.pad_token_id == (49407 if layout == "sd1" else 0)
    assert opened.schedule.prediction_type == ("epsilon" if layout == "sd1" else "v_prediction")
    assert opened.defaults.sampler == ("pndm" if layout == "sd1" else "ddim")
    assert (opened.schedule.timestep_spacing, opened.schedule.set_alpha_to_one) == ("leading", False)
    for part in ("unet", "vae"):
        own, full = getattr(opened, part).state_dict(), getattr(expected, part).state_dict()
        assert own.keys() == full.keys()
        assert all(torch.equal(value, full[key].half()) for key, value in own.items())
    ids = expected.tokenizer(["a red apple"])
    own, full = opened.text_encoder(ids), expected.text_encoder(ids)
    assert own.dtype == torch.float32 and (own - full).abs().max() < 2e-3 * full.abs().max()
    other = LatentDiffusionPipeline.from_single_file(path, prediction_type="v_prediction", dtype=torch.bfloat16)
    assert other.schedule.prediction_type == "v_prediction" and other.dtype == torch.bfloat16
    assert other.unet.config.sample_size == side


def test_what_the_file_says_of_its_prediction(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved / "sd1.safetensors", tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    assert LatentDiffusionPipeline.from_single_file(path).schedule.prediction_type == "v_prediction"
    with pytest.warns(UserWarning, match="take a file of Stable Diffusion 1 for epsilon: tell them .* v_prediction"):
        small_sd(schedule={"prediction_type": "v_prediction"}).save_single_file(tmp_path / "b.safetensors")
    assert read_single_file(tmp_path / "b.safetensors").prediction_type == "v_prediction"


def test_older_names(saved: Path, tmp_path: Path) -> None:
    """Without text_model, and with the attention of the autoencoder as linear layers."""
    tensors: dict[str, Tensor | None] = {}
    for key, tensor in load_file(saved / "sd1.safetensors").items():
        if key.startswith("cond_stage_model.transformer.text_model."):
            tensors |= {key: None, key.replace("text_model.", ""): tensor}
        if ".attn_1." in key and tensor.ndim == 4:
            tensors[key] = tensor[:, :, 0, 0].clone()
    path = rewritten(saved / "sd1.safetensors", tmp_path / "a.safetensors", None, **tensors)
    opened = LatentDiffusionPipeline.from_single_file(path)
    expected = LatentDiffusionPipeline.from_pretrained(saved / "sd1")
    for part in ("unet", "vae", "text_encoder"):
        own, full = getattr(opened, part).state_dict(), getattr(expected, part).state_dict()
        assert own.keys() == full.keys() and all(torch.equal(own[key], full[key]) for key in own), part


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


ATTENTION = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": {"attention_head_dim": 4}}, r"has \[4, 4, 4, 4\] attention heads, which are 8 at every level there"),
        ({"unet": {"down_block_types": ATTENTION}}, "is not that of down_block_types, reversed"),
        ({"unet": {"transformer_layers_per_block": [1, 2, 1, 1]}}, r"is \[1, 2, 1, 1\], one number there"),
        ({"unet": {"norm_num_groups": 16}}, "norm_num_groups is 16, 32 there"),
        ({"unet": {"addition_embed_type": "text"}}, "addition_embed_type is text"),
        ({"vae": {"scaling_factor": 0.5}}, "the autoencoder's scaling_factor is 0.5, 0.18215 there"),
        ({"vae": {"mid_block_add_attention": False}}, "mid_block_add_attention is False, True there"),
        ({"text": {"num_attention_heads": 2}}, "text encoder has 2 heads, which are of width 64 there"),
        ({"pad_token": "!"}, "its tokenizer pads with '!', with '<|endoftext|>' in Stable Diffusion 1"),
        ({"schedule": {"beta_end": 0.02}}, "its schedule's beta_end is 0.02, 0.012 there"),
        ({"schedule": {"prediction_type": "sample"}}, "its prediction_type is sample, epsilon or v_prediction there"),
    ],
)
def test_models_that_no_single_file_names(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        small_sd(**changes).save_single_file(tmp_path / "a.safetensors")
    assert str(error.value).startswith("no single file names this model: ") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    kinds = {
        "down_block_types": ["LinearAttnDownBlock2D", *SD1["down_block_types"][1:]],
        "up_block_types": [*SD1["up_block_types"][:3], "LinearAttnUpBlock2D"],
    }
    with pytest.raises(ValueError, match="its UNet has linear attention"):
        small_sd(unet=kinds).save_single_file(tmp_path / "a.safetensors")


def tensor(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.diffusion_model.strange.weight": tensor(2)}, "of no part .*: model.diffusion_model.strange.weight"),
        ({"model_ema.strange": tensor(2)}, "of no part of Stable Diffusion 1: model_ema.strange"),
        ({"conditioner.embedders.0.x": tensor(2)}, "it is of Stable Diffusion XL"),
        ({"model.diffusion_model.label_emb.weight": tensor(2)}, "has class conditioning"),
        (
            {"first_stage_model.quant_conv.bias": None},
            "its autoencoder does not fit the model: missing quant_conv.bias",
        ),
        ({"first_stage_model.decoder.conv_in.weight": None}, "lacks decoder.conv_in.weight"),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, r"its noise schedule \(alphas_cumprod\) is not"),
        ({"scale_factor": torch.tensor(0.13)}, r"its latents' scale \(scale_factor\) is not"),
        (
            {"cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight": tensor(10**6, 0)},
            r"layers.1.mlp.fc1.weight is \[1000000, 0\], must be \[128, 64\]",
        ),
        (
            {"model.diffusion_model.input_blocks.4.0.in_layers.2.weight": tensor(3 * 10**4, 0, 3, 3)},
            "block_out_channels has 30000",
        ),
    ],
)
def test_files_that_are_refused(changes: dict, message: str, saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved / "sd1.safetensors", tmp_path / "a.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as error:
        LatentDiffusionPipeline.from_single_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    for name in ("a.ckpt", "a.pt"):
        with pytest.raises(ValueError, match="is pickled, which may run code.* convert it: python -c"):
            LatentDiffusionPipeline.from_single_file(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        LatentDiffusionPipeline.from_single_file(tmp_path / "a.safetensors")
    save_file({"a": tensor(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no single file of Stable Diffusion"):
        LatentDiffusionPipeline.from_single_file(tmp_path / "a.safetensors")
    for name in ("lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora.down.weight"):
        save_file({name: tensor(1)}, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match="it is a LoRA, not a whole model: open the model and add it"):
            LatentDiffusionPipeline.from_single_file(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is a file; open it with .*from_single_file"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "a.safetensors")
    for said in ("[1]", "{", json.dumps({"../x": {}}), json.dumps({"unet/config.json": 1})):
        path = rewritten(saved / "sd1.safetensors", tmp_path / "b.safetensors", {METADATA: said})
        with pytest.raises(ValueError, match="its metadata latentdiff is not as this project writes it"):
            LatentDiffusionPipeline.from_single_file(path)


def test_nothing_is_overwritten(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(ValueError, match="a.safetensors exists, delete it first"):
        LatentDiffusionPipeline.from_pretrained(saved / "sd1").save_single_file(path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------------------------
# Other tools


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_opens_the_same_model(layout: str, saved: Path) -> None:
    """Its own converter gives back every bit, and its pipeline draws the same image."""
    from diffusers import StableDiffusionPipeline
    from tiny import normal

    theirs: Any = StableDiffusionPipeline.from_single_file(
        str(saved / f"{layout}.safetensors"), config=str(saved / layout), local_files_only=True
    )
    ours = LatentDiffusionPipeline.from_single_file(saved / f"{layout}.safetensors")
    for part, folder in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "text_encoder")):
        (path,) = (saved / layout / folder).glob("*.safetensors")
        stored = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
        own = {key.removeprefix("text_model."): value for key, value in getattr(theirs, part).state_dict().items()}
        assert stored.keys() == own.keys() and all(torch.equal(stored[key], own[key]) for key in own), part
    latents = normal(1, 4, 16, 16)
    theirs.set_progress_bar_config(disable=True)
    image = theirs("a red apple", latents=latents, height=32, width=32, num_inference_steps=5, guidance_scale=2).images
    own = ours("a red apple", latents=latents, num_inference_steps=5, guidance_scale=2, progress=False)
    difference = np.asarray(image[0], dtype=int) - np.asarray(own[0], dtype=int)
    assert np.abs(difference).max() <= 2 and np.asarray(own[0]).std() > 10
