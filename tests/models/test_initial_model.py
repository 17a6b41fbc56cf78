"""Fine-tuning models that diffusers and transformers made: from a folder, a single file and the hub's cache."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from scripts import ROOT, assert_same_weights, demo_config
from tiny import SD1_SCHEDULER, normal, perturb, relative_error, tokenizer

import train_unet
from latentdiff import AutoencoderKL, LatentDiffusionPipeline, UNet
from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, load_config, to_yaml
from latentdiff.formats.files import write_json
from latentdiff.models.initial_model import with_initial_model
from latentdiff.models.pretrained_text import open_text_encoder, open_tokenizer
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.training.unet_model import build_tokenizer, for_text_encoder, open_checkpoint, start_from
from latentdiff.training.vae_model import initial_autoencoder

RECIPE = str(ROOT / "configs/finetune-sd15/unet.yaml")
HUB_ID = "someone/something"
VAE = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
SD1 = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
SD2 = SD1 | {
    "block_out_channels": [64, 64],
    "attention_head_dim": [1, 1],
    "cross_attention_dim": 128,
    "use_linear_projection": True,
}
TEXT = {"intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 49408, "max_position_embeddings": 77}
TEXT_SD1 = TEXT | {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
TEXT_SD2 = TEXT | {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}


def save_sd(folder: Path, layout: str) -> None:
    """A pipeline of the structure of Stable Diffusion 1 or 2 with random weights, made and saved by diffusers."""
    torch.manual_seed(0)
    sd1 = layout == "sd1"
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**(TEXT_SD1 if sd1 else TEXT_SD2)))
    tokenizer().save(folder / "words")
    own = transformers.CLIPTokenizer.from_pretrained(folder / "words", pad_token="<|endoftext|>" if sd1 else "!")
    shutil.rmtree(folder / "words")
    scheduler = diffusers.PNDMScheduler(**SD1_SCHEDULER)
    if not sd1:
        scheduler = diffusers.DDIMScheduler(
            **{key: value for key, value in SD1_SCHEDULER.items() if key != "skip_prk_steps"},
            prediction_type="v_prediction",
            clip_sample=False,
        )
    diffusers.StableDiffusionPipeline(
        vae=perturb(diffusers.AutoencoderKL(**VAE), scale=0.02).eval(),
        unet=diffusers.UNet2DConditionModel(**(SD1 if sd1 else SD2)).eval(),
        text_encoder=clip.eval(),
        tokenizer=own,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd1/ and sd2/ of diffusers; the same as single files that say nothing beside their tensors; the hub's cache."""
    place = tmp_path_factory.mktemp("initial")
    for layout in ("sd1", "sd2"):
        save_sd(place / layout, layout)
        LatentDiffusionPipeline.from_pretrained(place / layout).save_single_file(place / "ours.safetensors")
        single = load_file(place / "ours.safetensors")
        save_file(single, place / f"{layout}.safetensors")
        (place / "ours.safetensors").unlink()
    repository = place / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(place / "sd1", repository / "snapshots" / ("a" * 40))
    return place


@pytest.fixture
def source_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What a user writes: a folder, a single file or a hub id."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    return lambda kind: HUB_ID if kind == "hub" else str(place / kind)


def overrides(source: str, *more: str) -> list[str]:
    """Of the recipe, for a training of seconds."""
    return [
        *(f"vae={source}", f"init_from={source}", "data.source=embedded", "data.limit=24", "data.holdout=4"),
        *("data.size=16", "data.num_workers=0", "optimizer.warmup_steps=0", "logging.progress=false"),
        *("train.steps=2", "train.batch_size=4", "train.precision=fp32", "output.checkpoint_every=1"),
        *("validation.num_inference_steps=2", "validation.bins=1", "logging.every=1"),
        *more,
    ]


def config_of(source: str, *more: str) -> UNetTrainingConfig:
    return load_config(UNetTrainingConfig, RECIPE, overrides(source, *more), with_initial_model)


def train(run: Path, config: str, *given: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_unet.main([config, f"output.folder={run}", *given])
    return run


def pad_id(folder: Path) -> int:
    return LatentDiffusionPipeline.from_pretrained(folder).tokenizer.pad_token_id


KINDS = ["sd1", "sd1.safetensors", "hub", "sd2", "sd2.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_prediction_is_that_of_diffusers(kind: str, place: Path, source_of: Callable[[str], str]) -> None:
    """UNet, text encoder and VAE, with `model`, `text` and `diffusion` left out."""
    source, layout = source_of(kind), "sd2" if kind.startswith("sd2") else "sd1"
    config = config_of(source)
    assert config.diffusion.prediction_type == ("epsilon" if layout == "sd1" else "v_prediction")
    assert (config.diffusion.timestep_spacing, config.diffusion.set_alpha_to_one) == ("leading", False)
    assert config.text.pretrained == source and config.train.caption_dropout == 0.1
    vae, text_encoder = AutoencoderKL.from_pretrained(place / layout, subfolder="vae"), open_text_encoder(source)
    unet = UNet.from_config(config.model, seed=1)
    lines = start_from(config, vae, unet, text_encoder)
    channels = "32-64" if layout == "sd1" else "64-64"
    said = " (the file does not say it)" if kind.endswith(".safetensors") else ""
    assert lines == [
        f"starts from {source}: UNet of {channels} channels that predicts {config.diffusion.prediction_type}{said}; "
        "its text encoder, frozen; noise schedule scaled_linear 0.00085 .. 0.012, 1,000 timesteps; latents scaled by "
        "0.18215"
    ]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(place / layout, safety_checker=None)
    captions = ["a red apple", "rocket"]
    own, their = open_tokenizer(source, text_encoder), theirs.tokenizer
    ids = own(captions)
    assert torch.equal(ids, their(captions, padding="max_length", return_tensors="pt").input_ids)
    latents, timesteps = normal(2, 4, 8, 8), torch.tensor([3, 800])
    with torch.no_grad():
        context, expected = text_encoder(ids), theirs.text_encoder(ids).last_hidden_state
        assert relative_error(context, expected) < 1e-5
        expected = theirs.unet(latents, timesteps, expected).sample
        assert relative_error(unet(latents, timesteps, context), expected) < 1e-5


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["sd1", "sd1.safetensors", "hub"])
def test_a_fine_tuned_model_opens_in_diffusers(
    kind: str, place: Path, tmp_path: Path, source_of: Callable[[str], str]
) -> None:
    source = source_of(kind)
    run = train(tmp_path / "run", RECIPE, *overrides(source))
    resolved = load_config(UNetTrainingConfig, run / "config.yaml")
    assert (resolved.init_from, resolved.vae, resolved.text.pretrained) == (source, source, source)
    assert resolved.diffusion == config_of(source).diffusion and resolved.model.sample_size == 8
    before, after = (AutoencoderKL.from_pretrained(folder, subfolder="vae") for folder in (place / "sd1", run))
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    before, ours = (LatentDiffusionPipeline.from_pretrained(folder) for folder in (place / "sd1", run))
    assert all(
        torch.equal(value, ours.text_encoder.state_dict()[key])
        for key, value in before.text_encoder.state_dict().items()
    )
    assert not torch.equal(before.unet.conv_in.weight, ours.unet.conv_in.weight)

    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    options = {"latents": normal(1, 4, 8, 8), "num_inference_steps": 6, "guidance_scale": 3.0}
    image, expected = ours("a red apple", progress=False, **options).images[0], theirs("a red apple", **options).images
    assert np.abs(np.asarray(image, int) - np.asarray(expected[0], int)).max() <= 2

    opened = open_checkpoint(run / "checkpoints" / "step_00000001")
    assert isinstance(opened.text_encoder, TextEncoder) and opened.schedule == resolved.diffusion
    if kind == "hub":
        again = train(tmp_path / "again", str(run / "config.yaml"))
        assert_same_weights(run, again, "unet/diffusion_pytorch_model.safetensors")
        assert_same_weights(run, again, "checkpoints/step_00000002/optimizer.safetensors")


@pytest.mark.runs
def test_the_text_encoder_is_trained_on_where_it_is_asked_for(
    place: Path, tmp_path: Path, source_of: Callable[[str], str]
) -> None:
    """With the padding of the model that it comes from; and the base itself is not needed to open a checkpoint."""
    base = shutil.copytree(place / "sd2", tmp_path / "base")
    run = train(tmp_path / "run", RECIPE, *overrides(str(base), f"vae={place / 'sd2'}", "text.config={}"))
    resolved = load_config(UNetTrainingConfig, run / "config.yaml")
    assert resolved.text.config is not None and resolved.text.config["hidden_act"] == "gelu"
    assert resolved.text.pad_token == "!" and pad_id(run) == pad_id(base) == 0
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, run))
    changes = [(after[f"text_model.{key}"] - value).abs().max().item() for key, value in before.items()]
    assert 0 < max(changes) < 1e-3
    shutil.rmtree(base)
    opened = open_checkpoint(run / "checkpoints" / "step_00000001")
    assert opened.tokenizer.pad_token_id == 0 and opened.schedule.prediction_type == "v_prediction"


def test_what_differs_is_said_or_refused(
    place: Path, tmp_path: Path, source_of: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def started(config: UNetTrainingConfig, vae: Path = place / "sd1") -> list[str]:
        autoencoder = AutoencoderKL.from_pretrained(vae, subfolder="vae")
        text = open_text_encoder(config.text.pretrained or str(place / "sd1"))
        return start_from(config, autoencoder, UNet.from_config(config.model, seed=0), text)

    source = source_of("sd1")
    lines = started(config_of(source, "diffusion.beta_end=0.02", "diffusion.timestep_spacing=trailing"))
    assert lines[1:] == [
        f"diffusion.beta_end is 0.02, in {source} it is 0.012",
        f"diffusion.timestep_spacing is trailing, in {source} it is leading",
    ]
    with pytest.raises(ValueError, match="prediction_type is v_prediction, but the UNet in .* predicts epsilon; leave"):
        started(config_of(source, "diffusion.prediction_type=v_prediction"))
    # What a single file does not say is for the config to say.
    silent = config_of(source_of("sd1.safetensors"), "diffusion.prediction_type=v_prediction")
    assert "that predicts v_prediction (the file does not say it)" in started(silent)[0]
    with pytest.raises(ValueError, match=r"model.attention_head_dim is 4, but the UNet in .* has 8"):
        started(config_of(source, "model.attention_head_dim=4"))
    other = shutil.copytree(place / "sd1" / "vae", tmp_path / "other" / "vae")
    values = AutoencoderKL.from_pretrained(other).config.to_diffusers() | {"scaling_factor": 0.5}
    write_json(values, other / "config.json")
    with pytest.warns(UserWarning, match=r"latents of scaling_factor 0.18215 and .* those of vae .* have 0.5 and 0"):
        started(config_of(source, f"vae={other.parent}"), other.parent)
    t5 = {"model_type": "t5"}
    no_clip = shutil.copytree(place / "sd1", tmp_path / "t5")
    write_json(t5, no_clip / "text_encoder" / "config.json")
    with pytest.raises(ValueError, match="text.config is of CLIP, but the text encoder of init_from is 't5'; leave"):
        config_of(str(no_clip), "text.config={}")
    wide = config_of(source, f"text.pretrained={place / 'sd2'}")
    with pytest.raises(ValueError, match="model.cross_attention_dim is 64, but the text encoder .*sd2 has the width 1"):
        for_text_encoder(wide, open_text_encoder(place / "sd2"))
    with pytest.raises(ValueError, match="^vae is null, but the UNet of init_from is for latents; give its"):
        config_of(source, "vae=null")
    with pytest.raises(ValueError, match="^init_from 'someone/else' is no folder or file here, and was not loaded"):
        config_of("someone/else")
    with pytest.raises(SystemExit):
        main(["train-unet", RECIPE, *overrides("someone/else", f"output.folder={tmp_path / 'run'}")])
    error = capsys.readouterr().err
    assert "the hub can't be reached (HF_HUB_OFFLINE is set), and the cache has no whole copy" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_resolved_config_needs_no_model_to_be_read(place: Path, tmp_path: Path) -> None:
    config = config_of(str(place / "sd1"), "text.config={}")
    values = config.model_dump(mode="json") | {"init_from": str(tmp_path / "gone")}
    assert UNetTrainingConfig.model_validate(with_initial_model(values)).model == config.model
    assert build_tokenizer(config.text, TextEncoder.from_config(TEXT_SD1, seed=0)).pad_token_id == 49407


@pytest.mark.parametrize("kind", ["sd1", "sd1.safetensors", "hub"])
def test_stage_1_starts_from_the_same(
    kind: str, place: Path, tmp_path: Path, source_of: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And `evaluate-vae` measures it; of what is no folder of the user's, it writes nothing."""
    keys = ["layers_per_block=1", "block_out_channels=[32, 64]", "norm_num_groups=32", "sample_size=16"]
    config = demo_config(
        tmp_path,
        f"init_from={source_of(kind)}",
        "data.size=16",
        "data.holdout=4",
        "data.limit=8",
        *(f"model.{key}" for key in keys),
    )
    vae, wanted = initial_autoencoder(config), AutoencoderKL.from_pretrained(place / "sd1", subfolder="vae")
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in wanted.state_dict().items())
    if kind != "sd1":
        (tmp_path / "vae.yaml").write_text(to_yaml(config), encoding="utf-8")
        before = sorted(place.rglob("*"))
        main(["evaluate-vae", source_of(kind), "--config", f"{tmp_path}/vae.yaml", "--no-progress", "--device", "cpu"])
        assert "Measured on the 4 held-out images of 'embedded'" in capsys.readouterr().out
        assert sorted(place.rglob("*")) == before
