"""Runs that train LoRA adapters alone, by the script itself: what changes, what is kept, who opens it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from scripts import ROOT, arguments, assert_same_weights, launch, metrics, run_unet
from single_files import contents_of, small_sd
from tiny import normal, relative_error
from torch import Tensor

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.formats.headers import read_tensor_file
from latentdiff.formats.lora import LORA_FILE
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.lora import adaptable_layers
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.checkpoint import checkpoint_folder
from latentdiff.training.plan import counts, flops_by_step
from latentdiff.training.unet_model import open_checkpoint

pytestmark = pytest.mark.runs

SHORT = ["train.steps=2", "validation.every=2", "validation.sample_every=2", "output.checkpoint_every=2"]
BOTH = ["lora.targets=[to_q, conv1, q_proj, fc1]", "lora.alpha=4"]
FSDP2 = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2-cpu.yaml")]
NOISE = normal(1, 4, 8, 8, seed=5)


def lora_of(base: Path) -> list[str]:
    return [f"init_from={base}", "text=null", "lora.rank=2", "optimizer.lr=3e-2"]


def latents(pipeline: LatentDiffusionPipeline) -> Tensor:
    return pipeline("red apple", latents=NOISE, num_inference_steps=4, guidance_scale=2.0, progress=False).latents


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vae_run: Path, unet_run: Path) -> Path:
    """Adapters of both networks, on the tiny run of stage 2."""
    before = contents_of(unet_run)
    folder = run_unet(tmp_path_factory.mktemp("lora") / "lora", vae_run, *lora_of(unet_run), *BOTH)
    assert contents_of(unet_run) == before
    return folder


def test_adapters_alone_are_kept(run: Path, unet_run: Path) -> None:
    base = LatentDiffusionPipeline.from_pretrained(unet_run)
    unet = [name for name in adaptable_layers(base.unet) if name.endswith(("to_q", "conv1"))]
    text = [name for name in adaptable_layers(base.text_encoder.model) if name.endswith(("q_proj", "fc1"))]
    assert len(read_tensor_file(run / LORA_FILE).sizes) == 2 * (len(unet) + len(text))
    checkpoint = checkpoint_folder(run, 6)
    for weights in ("model", "ema"):
        keys = read_tensor_file(checkpoint / f"{weights}.safetensors").sizes
        assert len(keys) == 2 * (len(unet) + len(text)) and all(".lora_" in key for key in keys)
    assert not (run / "unet").exists()
    # Nobody else reads the path on this machine.
    assert str(unet_run) not in (run / LORA_FILE).read_bytes().decode("latin-1")

    trained, plain = LatentDiffusionPipeline.from_pretrained(run), latents(base)
    assert trained.adapters == {"lora": 1.0}
    assert relative_error(latents(trained), plain) > 1e-3
    assert relative_error(latents(open_checkpoint(checkpoint)), latents(trained)) < 1e-5
    raw = latents(open_checkpoint(checkpoint, "model"))
    assert relative_error(raw, latents(trained)) > 1e-4


def test_diffusers_draws_the_same(run: Path, unet_run: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(unet_run, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(run)
    ours = LatentDiffusionPipeline.from_pretrained(run)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0}
    expected = theirs("red apple", latents=NOISE, output_type="latent", **options).images
    actual = ours("red apple", latents=NOISE, sampler="dpm++2m", progress=False, **options).latents
    assert relative_error(actual, expected) < 1e-4


def test_resume_is_exact_and_ends(
    run: Path, vae_run: Path, unet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = shutil.copytree(run, tmp_path / "lora")
    shutil.rmtree(checkpoint_folder(other, 6))
    (other / LORA_FILE).unlink()
    settings = [*lora_of(unet_run), *BOTH]
    run_unet(other, vae_run, *settings)
    for name in ("model", "ema", "optimizer", "best"):
        assert_same_weights(run, other, f"checkpoints/step_00000006/{name}.safetensors")
    assert_same_weights(run, other, LORA_FILE)
    assert metrics(other, "loss") == metrics(run, "loss")
    capsys.readouterr()
    run_unet(other, vae_run, *settings)
    assert "is finished: 6 steps" in capsys.readouterr().out

    longer = [*settings, "train.steps=8"]
    with pytest.raises(ValueError, match="lora.rank was 2, now 3"):
        run_unet(other, vae_run, *longer, "lora.rank=3")
    moved = shutil.copytree(unet_run, tmp_path / "base")
    weights = load_file(path := moved / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({key: 1.1 * value for key, value in weights.items()}, path)
    with pytest.raises(ValueError, match="the weights of the UNet are others than it was trained with"):
        run_unet(other, vae_run, *longer, f"init_from={moved}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora.targets=[to_q, nothing]",
            "lora.targets has nothing, which is no layer of the UNet; such are conv, conv1, .*to_q",
        ),
        (
            "lora.targets=[text.q_proj]",
            "lora.targets has text.q_proj, which is no layer of the text encoder; such are fc1",
        ),
        ("init_from=null text.pretrained=x", "lora.rank needs init_from, the model that the adapters are for"),
        (
            "text.config={}",
            "text.config is given, but the adapters of lora.rank are used with the text encoder",
        ),
        ("lora.rank=0", "lora.rank.* greater than or equal to 1"),
        ("diffusion.beta_end=0.02", "diffusion.beta_end is 0.02, but the model in .* has 0.012, with which the LoRA"),
        ("text.pretrained=other", "text.pretrained other is given, but the adapters of lora.rank are used with"),
        ("init_from=RUN", "init_from '.*lora' is a LoRA: latentdiff export makes a pipeline of it to start from"),
    ],
)
def test_what_does_not_fit_is_refused(
    override: str, message: str, run: Path, vae_run: Path, unet_run: Path, tmp_path: Path
) -> None:
    overrides = [override] if "[" in override else override.replace("RUN", str(run)).split()
    text = ["text={}"] if override.startswith(("text.", "init_from=null")) else []
    with pytest.raises(ValueError, match=message):
        run_unet(tmp_path / "run", vae_run, *lora_of(unet_run), *text, *overrides)


@pytest.mark.parametrize("setting", ["train.gradient_checkpointing=true", "train.weights=bf16", "optimizer.kind=muon"])
def test_other_ways_to_train(setting: str, run: Path, vae_run: Path, unet_run: Path, tmp_path: Path) -> None:
    precision = ["train.precision=auto"] if "bf16" in setting else []
    other = run_unet(tmp_path / "other", vae_run, *lora_of(unet_run), *BOTH, setting, *precision)
    curve, expected = metrics(other, "loss"), metrics(run, "loss")
    assert curve == pytest.approx(expected, rel=1e-5 if "checkpointing" in setting else 0.02)
    tensors, theirs = load_file(other / LORA_FILE), load_file(run / LORA_FILE)
    assert {name: value.shape for name, value in tensors.items()} == {name: v.shape for name, v in theirs.items()}
    assert all(value.any() for value in tensors.values())  # all are trained


@pytest.mark.slow
def test_compiled(run: Path, vae_run: Path, unet_run: Path, tmp_path: Path) -> None:
    other = run_unet(tmp_path / "other", vae_run, *lora_of(unet_run), *BOTH, "train.compile=blocks")
    assert metrics(other, "loss") == pytest.approx(metrics(run, "loss"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], FSDP2], ids=["data parallel", "FSDP2"])
def test_two_processes_follow_the_same_curve(
    options: list[str], run: Path, vae_run: Path, unet_run: Path, tmp_path: Path
) -> None:
    launch(2, arguments(2, tmp_path / "run", vae_run, *lora_of(unet_run), *BOTH), *options)
    for key in ("loss", "validation/loss"):
        assert metrics(tmp_path / "run", key) == pytest.approx(metrics(run, key), rel=1e-5)
    theirs = load_file(run / LORA_FILE)
    assert max(relative_error(v, theirs[name]) for name, v in load_file(tmp_path / "run" / LORA_FILE).items()) < 1e-3


def test_from_a_single_file(tmp_path: Path) -> None:
    """Of the structure of Stable Diffusion 2, in float16 as most are, with linear layers around its transformers."""
    base = small_sd("sd2")
    base.vae.save_pretrained(tmp_path / "vae")
    base.text_encoder.save_pretrained(tmp_path / "text_encoder")
    base.to(dtype=torch.float16).save_single_file(tmp_path / "base.safetensors")
    model = base.unet.config.model_dump(mode="json")
    folder = run_unet(
        *(tmp_path / "lora", tmp_path / "vae", *lora_of(tmp_path), *SHORT, "lora.targets=[proj_in, attn2.to_k]"),
        *(f"init_from={tmp_path / 'base.safetensors'}", f"model={json.dumps(model)}", "data.size=32"),
        *(f"diffusion.prediction_type={base.schedule.prediction_type}", "train.batch_size=2"),
    )
    pipeline = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipeline.adapters == {"lora": 1.0}
    assert read_tensor_file(folder / LORA_FILE).tensors == 2 * 2 * 16  # transformers
    assert pipeline("apple", num_inference_steps=2, progress=False).images[0].size == (32, 32)


def test_what_plan_counts(run: Path, vae_run: Path, unet_run: Path) -> None:
    """The UNet with its adapters; of these alone averages, and the best of them."""
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    found = counts(config, AutoencoderKL.from_pretrained(vae_run).config, 20, torch.device("cpu"))
    adapters = sum(n for name, n in read_tensor_file(run / LORA_FILE).sizes.items() if name.startswith("unet."))
    unet = sum(p.numel() for p in LatentDiffusionPipeline.from_pretrained(unet_run).unet.parameters())
    assert found.weights_bytes == 4 * (unet + adapters)
    assert found.averages_bytes == 2 * 4 * adapters
    # Of the text encoder's alone the gradient goes through the UNet, and nothing of the UNet is trained.
    text = load_config(UNetTrainingConfig, run / "config.yaml", ["lora.targets=[q_proj]"])
    vae = AutoencoderKL.from_pretrained(vae_run).config
    assert 0 < flops_by_step(text, vae)(0) < flops_by_step(config, vae)(0)
    with pytest.raises(ValueError, match="lora.targets has layers of the text encoder alone"):
        counts(text, vae, 20, torch.device("cpu"))


def test_commands(run: Path, unet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    quiet = ["--no-progress", "--device", "cpu"]

    def said(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    copy = shutil.copytree(run, tmp_path / "lora")
    assert "LoRA" in said("info", copy)
    assert "LoRA" in said("info", copy / LORA_FILE)
    uploaded = said("push", copy, "someone/lora", "--dry-run")
    assert LORA_FILE in uploaded and "checkpoints" not in uploaded
    assert "UNet" in said("plan", copy / "config.yaml", "--no-measure", "--device", "cpu")
    said("evaluate", copy, "--prompts", "2", *quiet)
    assert json.loads((copy / "evaluation.json").read_text())["prompts"] == 2

    # An exported run is the model with the LoRA in its weights: diffusers sees the same.
    said("export", copy, "--format", "diffusers", "--out", tmp_path / "exported", "--verify")
    exported = LatentDiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert exported.adapters == {}
    assert relative_error(latents(exported), latents(LatentDiffusionPipeline.from_pretrained(run))) < 1e-4

    options = ["red apple", "--seed", "0", "--num-inference-steps", "2", *quiet]
    said("generate", unet_run, *options, "--lora", run, "--lora-scale", "0.5", "--out", tmp_path / "image.png")
    assert "lora" in said("info", tmp_path / "image.png")
    error = refusal(
        capsys, "generate", str(unet_run), *options, "--lora", str(run), "--lora-scale", "1", "--lora-scale", "2"
    )
    assert "--lora-scale has 2 numbers for 1 --lora" in error
