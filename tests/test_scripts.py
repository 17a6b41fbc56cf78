"""The two training scripts, run for real: tiny variants of the demo's own configs, and of the 512 px ones."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_line import refusal
from PIL import Image
from pretrained_texts import save_t5
from safetensors.torch import load_file, save_file
from scripts import ROOT, TINY_VAE, assert_same_weights, metrics, run_unet, run_vae
from tiny import TEXT_ENCODER

import train_unet
import train_vae
from latentdiff import AutoencoderKL, LatentDiffusionPipeline, UNet
from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.models.pretrained_text import PretrainedTextEncoder
from latentdiff.models.text_encoder import TextEncoder

# ----------------------------------------------------------------------------------------------------------------------
# The whole path


@pytest.mark.runs
def test_stage_1_writes_a_run(vae_run: Path) -> None:
    assert {path.name for path in vae_run.iterdir()} == {
        "README.md",
        "checkpoints",
        "config.json",
        "config.yaml",
        "diffusion_pytorch_model.safetensors",
        "images.json",
        "images.png",
        "index.html",
        "metrics.jsonl",
        "latent_preview.json",
        "report",
        "run.json",
        "samples",
        "vae_report.json",
        "vae_report.png",
    }
    assert [path.name for path in sorted((vae_run / "checkpoints").iterdir())] == ["step_00000003", "step_00000006"]
    assert [path.name for path in sorted((vae_run / "samples").iterdir())] == [
        f"step_{step:08d}.png" for step in (0, 3, 6)
    ]
    # Four originals of 16 px over four reconstructions, two pixels apart.
    assert Image.open(vae_run / "samples" / "step_00000006.png").size == (4 * 18 - 2, 2 * 18 - 2)
    assert list(metrics(vae_run, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(vae_run, "validation/psnr")) == [0, 3, 6]
    resolved = load_config(VAETrainingConfig, vae_run / "config.yaml")
    assert resolved.train.steps == 6 and resolved.model.block_out_channels == (8, 16)


@pytest.mark.runs
def test_stage_1_measures_the_latent_scale(vae_run: Path) -> None:
    """Over the whole training set the latents of the saved autoencoder have mean 0 and std 1 in each channel."""
    from latentdiff.data.captioned_images import open_images

    vae = AutoencoderKL.from_pretrained(vae_run)
    config = load_config(VAETrainingConfig, vae_run / "config.yaml")
    images, _ = open_images(config.data, 3, 0, progress=False)
    pixels = torch.cat([pixels for _, pixels in images.batches(8)])
    with torch.no_grad():
        moments = vae.encode(pixels)
        draws = torch.cat([vae.sample(moments, torch.randn(20, 4, 8, 8)) for _ in range(50)])
    torch.testing.assert_close(draws.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(draws.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


@pytest.mark.runs
def test_stage_2_writes_a_pipeline(unet_run: Path) -> None:
    names = {path.name for path in unet_run.iterdir()}
    assert names == {
        *("checkpoints", "config.yaml", "latents", "metrics.jsonl", "report", "run.json", "samples"),
        *("README.md", "images.json", "images.png", "index.html", "vae_report.json", "vae_report.png"),
        *("generation_config.json", "model_index.json", "trained_on.json"),
        *("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    }
    assert list(metrics(unet_run, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(unet_run, "validation/loss")) == [0, 3, 6]
    assert Image.open(unet_run / "samples" / "step_00000006.png").size == (2 * 18 - 2, 16)
    images = LatentDiffusionPipeline.from_pretrained(unet_run)("red apple", seed=0, progress=False).images
    assert images[0].size == (16, 16)


@pytest.mark.runs
def test_no_pickle_in_a_run(vae_run: Path, unet_run: Path) -> None:
    """Neither by name nor by content: a pickle starts with its protocol, torch.save's files are zip archives."""
    for run in (vae_run, unet_run):
        files = [path for path in run.rglob("*") if path.is_file()]
        kinds = {".safetensors", ".json", ".jsonl", ".yaml", ".txt", ".png", ".html", ".md"}
        assert {path.suffix for path in files} <= kinds
        assert {"optimizer.safetensors", "ema.safetensors", "loss_meter.safetensors"} <= {path.name for path in files}
        for path in files:
            head = path.read_bytes()[:4]
            assert not head.startswith((b"PK", b"\x80")), path
            if path.suffix == ".safetensors":
                load_file(path)


@pytest.mark.runs
def test_a_checkpoint_names_what_made_it(unet_run: Path) -> None:
    manifest = json.loads((unet_run / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["pending"] is False
    assert manifest["config"]["train"]["batch_size"] == 8 and len(manifest["config_sha256"]) == 64
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.runs
def test_the_log_says_whether_it_learns(unet_run: Path) -> None:
    """Validation by noise level beside the constant predictor, and the gap to the training images."""
    losses, baselines = metrics(unet_run, "validation/loss"), metrics(unet_run, "validation/baseline")
    for step in (0, 3, 6):
        bins = [metrics(unet_run, f"validation/loss_bin_{b:02}")[step] for b in range(10)]
        assert sum(bins) / 10 == pytest.approx(losses[step], rel=0.1)
        gaps = [metrics(unet_run, f"validation/gap_bin_{b:02}")[step] for b in range(10)]
        assert sum(gaps) / 10 == pytest.approx(metrics(unet_run, "validation/gap")[step], abs=0.05)
    assert baselines[0] == baselines[3] == baselines[6] and 0.3 < baselines[0] < 1.2
    for name in ("loss", "validation_bins", "training", "samples"):
        assert Image.open(unet_run / "report" / f"{name}.png").size[0] > 40
    assert metrics(unet_run, "skipped") == dict.fromkeys(range(1, 7), 0)


@pytest.mark.runs
def test_trackers_see_what_the_log_says(tmp_path: Path, vae_run: Path) -> None:
    """TensorBoard, over a resume: each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = shutil.copytree(vae_run, tmp_path / "run")
    for name in ("checkpoints", "samples"):
        shutil.rmtree(run / name)
    run_vae(run, "logging.log_with=[tensorboard]")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    run_vae(run, "logging.log_with=[tensorboard]")
    events = EventAccumulator(str(run / "trackers" / "run"))
    events.Reload()
    for key in ("loss", "lr", "validation/psnr"):
        seen = {event.step: event.value for event in events.Scalars(key)}
        assert seen == pytest.approx(metrics(run, key), rel=1e-6)
        assert len(events.Scalars(key)) == len(seen)
    assert {event.step for event in events.Images("samples")} == {0, 3, 6}


@pytest.mark.runs
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "how"), [(1, "blocks"), (2, "blocks"), (2, "step")])
def test_compiled_follows_the_same_curve(stage: int, how: str, tmp_path: Path, vae_run: Path, unet_run: Path) -> None:
    run, compiled = tmp_path / "run", f"train.compile={how}"
    run_vae(run, compiled) if stage == 1 else run_unet(run, vae_run, compiled)
    straight = vae_run if stage == 1 else unet_run
    for step, loss in metrics(run, "loss").items():
        assert loss == pytest.approx(metrics(straight, "loss")[step], rel=1e-5)
    # The names in the files are those of the model, without a wrapper's prefix.
    last = "checkpoints/step_00000006/model.safetensors"
    assert load_file(run / last).keys() == load_file(straight / last).keys()


@pytest.mark.runs
def test_the_pipeline_has_the_averaged_weights(unet_run: Path) -> None:
    """Not the last step's own: the EMA is what a run is judged by."""
    last = unet_run / "checkpoints" / "step_00000006"
    average, own = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    saved = load_file(unet_run / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in saved.items():
        assert torch.equal(value, average[f"unet.{key}"])
    assert any(not torch.equal(value, own[f"unet.{key}"]) for key, value in saved.items())


@pytest.mark.runs
def test_the_text_encoder_is_trained_too(unet_run: Path) -> None:
    config = load_config(UNetTrainingConfig, unet_run / "config.yaml")
    from latentdiff.randomness import Stream, seed_for

    fresh = TextEncoder.from_config(config.text.config, seed_for(0, Stream.TEXT_INIT)).state_dict()
    trained = TextEncoder.from_pretrained(str(unet_run), frozen=True, subfolder="text_encoder").state_dict()
    changed = [key for key in fresh if not torch.equal(fresh[key], trained[key])]
    assert len(changed) == len(fresh)


@pytest.mark.runs
def test_diffusers_opens_what_was_trained(unet_run: Path) -> None:
    """The contract: the same latents, prompt and DDIM steps give the same image, to 2/255."""
    import numpy as np
    from diffusers import StableDiffusionPipeline

    ours = LatentDiffusionPipeline.from_pretrained(unet_run)
    theirs = StableDiffusionPipeline.from_pretrained(unet_run, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "latents": latents, "height": 16, "width": 16}
    a = ours("red apple", progress=False, **settings).images[0]
    b = theirs("red apple", **settings).images[0]
    assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2


@pytest.mark.runs
def test_generate_and_evaluate_from_the_shell(unet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    apple = tmp_path / "apple.png"
    main(["generate", str(unet_run), "a red apple", "--seed", "3", "--out", str(apple), "--no-progress"])
    expected = LatentDiffusionPipeline.from_pretrained(unet_run)("a red apple", seed=3, progress=False)[0]
    assert Image.open(apple).tobytes() == expected.tobytes()
    assert capsys.readouterr().out.strip() == f"{apple} (seed 3)"

    main(["generate", str(unet_run), "a", "b", "--num-images-per-prompt", "2", "--out", str(apple), "--no-progress"])
    assert {path.name for path in tmp_path.iterdir()} == {"apple.png", *(f"apple-{i}.png" for i in range(4))}

    run = shutil.copytree(unet_run, tmp_path / "run")
    log = tmp_path / "LOG.md"
    main(["evaluate", str(run), "--prompts", "5", "--no-progress", "--log", str(log)])
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["training_images"] == 20 and figures["held_out_images"] == 4 and figures["prompts"] == 5
    assert 0 <= figures["nearest_is_prompted"] <= 5
    assert "PSNR (dB)" in log.read_text() and f"{figures['training_psnr']:.2f}" in log.read_text()
    assert Image.open(run / "evaluation.png").size == (16 * 18 - 2, 16)


@pytest.mark.runs
def test_stage_1_trains_on_reconstruction_and_kl(tmp_path: Path, vae_run: Path) -> None:
    """loss = reconstruction + kl_weight * KL, and the weight does what it says."""
    heavy = run_vae(tmp_path / "heavy", "loss.kl_weight=1.0", "train.steps=30", "output.checkpoint_every=30")
    light = run_vae(tmp_path / "light", "loss.kl_weight=0.0", "train.steps=30", "output.checkpoint_every=30")
    for run, weight in [(heavy, 1.0), (light, 0.0), (vae_run, 0.005)]:
        for step, loss in metrics(run, "loss").items():
            parts = metrics(run, "reconstruction")[step] + weight * metrics(run, "kl")[step]
            assert loss == pytest.approx(parts, rel=1e-5)
    assert metrics(heavy, "kl")[30] < 0.5 * metrics(light, "kl")[30]


@pytest.mark.runs
def test_captions_are_dropped_for_guidance(tmp_path: Path, vae_run: Path, unet_run: Path) -> None:
    """Dropping all captions is the run without captions, to the bit, and not the run with them."""
    unguided = "validation.guidance_scale=1"  # more would need both branches
    dropped = run_unet(tmp_path / "dropped", vae_run, "train.caption_dropout=1.0", unguided)
    without = run_unet(tmp_path / "without", vae_run, "train.caption_dropout=0.0", "data.captions=none", unguided)
    assert metrics(dropped, "loss") == metrics(without, "loss")
    assert metrics(dropped, "loss") != metrics(unet_run, "loss")
    kept = run_unet(tmp_path / "kept", vae_run, "train.caption_dropout=0.0", unguided)
    assert metrics(kept, "loss") != metrics(unet_run, "loss")  # a fraction of 0.1 drops some of 48 captions


@pytest.mark.runs
def test_stage_2_starts_from_a_trained_model_at_another_size(tmp_path: Path, vae_run: Path, unet_run: Path) -> None:
    """16 px first, then 32 px: a run whose learning rate is next to nothing ends with the weights it started from."""
    larger = ["data.size=32", "model.sample_size=16", f"init_from={unet_run}", "train.steps=1", "optimizer.lr=1e-12"]
    run = run_unet(tmp_path / "run", vae_run, *larger)
    first, second = LatentDiffusionPipeline.from_pretrained(unet_run), LatentDiffusionPipeline.from_pretrained(run)
    assert (first.unet.config.sample_size, second.unet.config.sample_size) == (8, 16)
    for before, after in [(first.unet, second.unet), (first.text_encoder, second.text_encoder)]:
        for key, value in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[key], value, atol=1e-7, rtol=1e-6)
    assert first.trained_on == second.trained_on
    for overrides, message in [
        (
            ["model.block_out_channels=[8, 24]"],
            r"model.block_out_channels is \(8, 24\), but the UNet in .* has ",
        ),
        (
            ["diffusion.prediction_type=sample"],
            "diffusion.prediction_type is sample, but the UNet in .* predicts v",
        ),
        (["text.config.num_hidden_layers=2"], "text.config.num_hidden_layers is 2, but the text encoder in .* has 1"),
        ([f"init_from={tmp_path}"], "init_from '.*' is not the folder of a pipeline or of a finished run"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_unet(tmp_path / "wrong", vae_run, *larger, *overrides)
    assert not (tmp_path / "wrong" / "config.yaml").exists()


@pytest.mark.runs
def test_caption_dropout_falls_over_the_steps(tmp_path: Path, vae_run: Path) -> None:
    """From 1 to 0: at first the run in which all captions are dropped, later another one."""
    unguided = "validation.guidance_scale=1"
    falling = run_unet(tmp_path / "falling", vae_run, "train.caption_dropout=[1.0, 0.0]", unguided)
    dropped = run_unet(tmp_path / "dropped", vae_run, "train.caption_dropout=1.0", unguided)
    falling, dropped = metrics(falling, "loss"), metrics(dropped, "loss")
    assert falling[1] == dropped[1] and falling[6] != dropped[6]


@pytest.mark.runs
@pytest.mark.parametrize("objective", ["loss_type: huber", "loss_type: l1", "weighting: min_snr", "weighting: p2"])
def test_objectives_train(tmp_path: Path, vae_run: Path, unet_run: Path, objective: str) -> None:
    """Another loss from the first step on; validation stays the plain error, so that runs compare, and falls."""
    steps = [
        "optimizer.lr=1e-2",
        "train.steps=60",
        "output.checkpoint_every=60",
        "validation.every=60",
        "validation.sample_every=60",
    ]
    run = run_unet(tmp_path / "run", vae_run, f"loss={{{objective}}}", *steps)
    assert metrics(run, "loss")[1] != metrics(unet_run, "loss")[1]
    validation = metrics(run, "validation/loss")
    assert validation[0] == metrics(unet_run, "validation/loss")[0]
    assert validation[60] < 0.97 * validation[0]


@pytest.mark.runs
def test_training_learns(tmp_path: Path, vae_run: Path) -> None:
    """A few dozen steps lower the loss of both stages below where it starts."""
    vae = run_vae(tmp_path / "vae", "train.steps=60", "output.checkpoint_every=60", "validation.every=60")
    scores = metrics(vae, "validation/psnr")
    assert scores[60] > scores[0] + 3
    unet = run_unet(
        tmp_path / "unet", vae, "train.steps=60", "output.checkpoint_every=60", "validation.sample_every=60"
    )
    losses = list(metrics(unet, "loss").values())
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # the output starts as 0, the target has unit variance
    assert sum(losses[-10:]) / 10 < 0.9


# ----------------------------------------------------------------------------------------------------------------------
# Resume and invariance


@pytest.mark.runs
@pytest.mark.parametrize("stage", [1, 2])
def test_resume_is_bitwise(stage: int, tmp_path: Path, vae_run: Path, unet_run: Path) -> None:
    """A run that is cut off after step 3 and resumed equals the uninterrupted one, bit for bit."""
    straight = vae_run if stage == 1 else unet_run
    cut = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    for path in cut.glob("*.safetensors"):
        path.unlink()
    # The same command again; but for the folder, which is what makes it another run.
    _ = run_vae(cut) if stage == 1 else run_unet(cut, vae_run)
    for name in ("model", "ema", "optimizer"):
        assert_same_weights(straight, cut, f"checkpoints/step_00000006/{name}.safetensors")
    for key in ("loss", "validation/mse" if stage == 1 else "validation/loss"):
        assert metrics(straight, key) == metrics(cut, key)
    final = "diffusion_pytorch_model.safetensors"
    assert_same_weights(straight, cut, final if stage == 1 else f"unet/{final}")


@pytest.mark.runs
def test_a_finished_run_is_not_trained_again(tmp_path: Path, vae_run: Path) -> None:
    again = shutil.copytree(vae_run, tmp_path / "run")
    run_vae(again)
    assert (again / "metrics.jsonl").read_text() == (vae_run / "metrics.jsonl").read_text()
    assert_same_weights(vae_run, again, "diffusion_pytorch_model.safetensors")


@pytest.mark.runs
@pytest.mark.parametrize("text", ["trained along", "frozen"])
def test_cached_latents_follow_the_same_curve(text: str, tmp_path: Path, vae_run: Path) -> None:
    """Moments, flipped or not, and a frozen encoder's states: from the cache as encoded at each step."""
    overrides = ["data.flip=0.5", "train.caption_dropout=0.3"]
    if text == "frozen":
        TextEncoder.from_config(TEXT_ENCODER, seed=0).save_pretrained(tmp_path / "clip")
        overrides += [f"text.pretrained={tmp_path / 'clip'}", "text.config=null"]
    cached = run_unet(tmp_path / "cached", vae_run, *overrides)
    online = run_unet(tmp_path / "online", vae_run, *overrides, "train.cache_latents=false")
    assert any((cached / "latents").iterdir()) and not (online / "latents").exists()
    for step, loss in metrics(online, "loss").items():
        assert loss == pytest.approx(metrics(cached, "loss")[step], rel=1e-5)


@pytest.mark.runs
def test_a_cache_that_grew_trains_as_one_made_at_once(
    tmp_path: Path, vae_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit. The folder is shared with an earlier run, of a part of the images and captions."""
    TextEncoder.from_config(TEXT_ENCODER, seed=0).save_pretrained(tmp_path / "clip")
    overrides = [f"text.pretrained={tmp_path / 'clip'}", "text.config=null", "data.flip=0.5"]
    shared = f"train.cache_folder={tmp_path / 'shared'}"
    run_unet(tmp_path / "earlier", vae_run, *overrides, shared, "data.limit=15", "train.steps=1")
    grown = run_unet(tmp_path / "grown", vae_run, *overrides, shared)
    assert not (grown / "latents").exists()
    at_once = run_unet(tmp_path / "at_once", vae_run, *overrides)
    new = [int(count) for count in re.findall(r"^latents: (\d+) new of \d+ encoded", capsys.readouterr().out, re.M)]
    assert new == [11, 11, 20]  # two of the first are held out later
    assert_same_weights(at_once / "unet", grown / "unet", "diffusion_pytorch_model.safetensors")
    assert metrics(at_once, "loss") == metrics(grown, "loss")


@pytest.mark.runs
def test_bf16_and_checkpointing_and_channels_last_run(tmp_path: Path, vae_run: Path) -> None:
    extra = ["train.precision=bf16", "train.gradient_checkpointing=true", "train.channels_last=true"]
    vae = run_vae(tmp_path / "vae", *extra, "data.flip=0.5", "data.crop=random", "loss.reconstruction=l1")
    unet = run_unet(tmp_path / "unet", vae, *extra, "data.flip=0.5", "diffusion.prediction_type=epsilon")
    reference = metrics(vae_run, "loss")
    assert all(abs(loss) < 3 for loss in metrics(unet, "loss").values()) and len(reference) == 6
    for run, name in [(vae, "."), (unet, "unet")]:
        weights = load_file(run / name / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.runs
def test_a_wrong_input_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train_vae.py"), *TINY_VAE, "train.stepz=3", f"output.folder={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {ROOT}/configs/demo/vae.yaml: unknown key train.stepz; did you mean steps?"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.runs
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=./nowhere", "nowhere.*does not exist"),
        ("data.size=15", "data.size 15 is not divisible by 2"),
        ("train.batch_size=21", "train.batch_size 21 is larger than the 20 training images"),
        ("data.caption_column=title", "caption_column 'title' is not in .*columns are: text,.*label"),
        ("data.image_column=photo", "image_column is 'photo', but 'embedded' holds files, not columns"),
        ("train.micro_batch_size=3", "batch_size 8 is not divisible by train.micro_batch_size 3"),
        ("data.holdout=24", "holdout is 24.*only 24 images"),
        ("train.precision=fp16", "fp16 needs a GPU"),
        ("train.steps=many", "train.steps: .*integer.*got 'many'"),
        ("loss.kl_weight=-1", "loss.kl_weight: .*greater than or equal to 0"),
    ],
)
def test_stage_1_refuses(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_vae(tmp_path / "run", override)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.runs
def test_stage_2_refuses_an_unfit_autoencoder(tmp_path: Path, vae_run: Path) -> None:
    with pytest.raises(ValueError, match="vae '.*nowhere' does not exist; train one with `latentdiff train-vae`"):
        run_unet(tmp_path / "run", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.in_channels is 3, but the autoencoder in .* has 4 latent channels"):
        run_unet(tmp_path / "run", vae_run, "model.in_channels=3")
    with pytest.raises(ValueError, match="data.size is 18, must be a multiple of 4"):
        run_unet(tmp_path / "run", vae_run, "data.size=18")
    with pytest.raises(ValueError, match="model.sample_size is 8, must be the latents' size 16"):
        run_unet(tmp_path / "run", vae_run, "data.size=32", "model.sample_size=8")
    with pytest.raises(ValueError, match="text.config.hidden_size 16 is not model.cross_attention_dim 24"):
        run_unet(tmp_path / "run", vae_run, "model.cross_attention_dim=24")
    with pytest.raises(ValueError, match="validation.sampler: unknown sampler 'euler_b', must be one of ddpm, ddim"):
        run_unet(tmp_path / "run", vae_run, "validation.sampler=euler_b")


@pytest.mark.runs
def test_stage_2_refuses_a_damaged_autoencoder(tmp_path: Path, vae_run: Path) -> None:
    broken = shutil.copytree(vae_run, tmp_path / "vae")
    weights = broken / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is truncated"):
        run_unet(tmp_path / "run", broken)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["decoder.conv_in.wait"] = tensors.pop("decoder.conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="missing decoder.conv_in.weight; unexpected decoder.conv_in.wait"):
        run_unet(tmp_path / "run", broken)


@pytest.mark.runs
def test_resume_refuses_another_model_and_damage(tmp_path: Path, vae_run: Path) -> None:
    cut = shutil.copytree(vae_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"model.block_out_channels was \[8, 16\], now \[8, 24\]"):
        run_vae(cut, "model.block_out_channels=[8, 24]")
    assert before == {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    weights = cut / "checkpoints" / "step_00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="step_00000006/model.safetensors is missing or damaged"):
        run_vae(cut, "--resume", str(cut / "checkpoints" / "step_00000006"))
    # Nothing is lost: the checkpoint before it still works, and is taken.
    run_vae(cut)
    assert_same_weights(vae_run, cut, "diffusion_pytorch_model.safetensors")


@pytest.mark.runs
def test_starting_over_deletes_nothing(tmp_path: Path, vae_run: Path) -> None:
    run = shutil.copytree(vae_run, tmp_path / "run")
    run_vae(run, "--resume", "never", "train.seed=1")
    assert (run / "checkpoints.1" / "step_00000006").is_dir()
    assert metrics(run, "loss")[1] != metrics(vae_run, "loss")[1]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(metrics(run, "loss")) + 4


# ----------------------------------------------------------------------------------------------------------------------
# The full system at 512 px


def test_the_512_px_system_builds_on_the_meta_device() -> None:
    """SD1-shaped autoencoder and UNet: sizes, parameter counts and the way the parts fit."""
    stage_1 = load_config(VAETrainingConfig, ROOT / "configs/systems/pokemon-512/vae.yaml")
    stage_2 = load_config(UNetTrainingConfig, ROOT / "configs/systems/pokemon-512/unet.yaml")
    with torch.device("meta"):
        vae, unet = AutoencoderKL(stage_1.model), UNet(stage_2.model)
        pixels = torch.empty(1, 3, 512, 512)
        moments = vae.encode(pixels)
        latents = vae.sample(moments, torch.empty(1, 4, 64, 64))
        output = unet(latents, torch.empty(1, dtype=torch.long), torch.empty(1, 77, 768))
        reconstruction = vae.decode(output)
    assert (moments.shape, latents.shape) == ((1, 8, 64, 64), (1, 4, 64, 64))
    assert (output.shape, reconstruction.shape) == (latents.shape, pixels.shape)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert stage_2.text.pretrained == "openai/clip-vit-large-patch14"


NARROW = (
    ["model.block_out_channels=[16, 32, 32, 32]", "model.norm_num_groups=8"],
    ["model.block_out_channels=[32, 32, 64, 64]"],
)


@pytest.mark.runs
def test_a_frozen_text_encoder_may_be_another_one_than_clip(
    tmp_path: Path, vae_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_t5(tmp_path / "t5")
    text = [f"text.pretrained={tmp_path / 't5'}", "text.config=null"]
    run = run_unet(tmp_path / "run", vae_run, *text)
    assert "text encoder T5EncoderModel: Stable Diffusion tools cannot open this model" in capsys.readouterr().out
    pipeline = LatentDiffusionPipeline.from_pretrained(run)
    assert isinstance(pipeline.text_encoder, PretrainedTextEncoder)
    assert pipeline.encode_prompts(["a red apple"]).shape == (1, 12, 16)
    assert pipeline.unet.config.cross_attention_dim == 16
    error = refusal(capsys, "export", str(run), "--format", "diffusers", "--verify")
    assert "the text encoder is a T5EncoderModel, diffusers' StableDiffusionPipeline takes CLIP alone" in error
    card = (run / "README.md").read_text()
    assert "Its text encoder is not CLIP" in card and "from diffusers" not in card
    online = run_unet(tmp_path / "online", vae_run, *text, "train.cache_latents=false")
    for step, loss in metrics(online, "loss").items():
        assert loss == pytest.approx(metrics(run, "loss")[step], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [pytest.param(NARROW, id="narrow"), pytest.param(([], []), id="full-width")])
def test_one_step_of_each_stage_at_512_px(widths: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """The 512 px configs with one layer a block, on local images, with a frozen text encoder of CLIP-L's width."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for i in range(3):
        Image.effect_noise((600, 520), 40 + i).convert("RGB").save(images / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a noisy image, number {i}"}))
    (images / "metadata.jsonl").write_text("\n".join(rows))
    clip = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12}
    TextEncoder.from_config(clip, seed=0).save_pretrained(tmp_path / "clip")
    common = [
        *(f"data.source={images}", "data.holdout=1", "data.num_workers=0", "model.layers_per_block=1"),
        *("train.steps=1", "train.batch_size=1", "train.micro_batch_size=1", "logging.progress=false"),
        *("validation.batch_size=1",),
    ]
    train_vae.main(
        [str(ROOT / "configs/systems/pokemon-512/vae.yaml"), *common, *widths[0], f"output.folder={tmp_path}/vae"],
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    train_unet.main(
        [
            *(str(ROOT / "configs/systems/pokemon-512/unet.yaml"), *common, *widths[1]),
            *(f"vae={tmp_path}/vae", f"text.pretrained={tmp_path}/clip", f"output.folder={tmp_path}/run"),
            *("validation.num_inference_steps=1", "validation.prompts=[pikachu eating]", "validation.bins=1"),
            "allow_unfit_vae=true",
        ]
    )
    assert 0.5 < metrics(tmp_path / "run", "loss")[1] < 1.5
    assert Image.open(tmp_path / "run" / "samples" / "step_00000001.png").size == (512, 512)
    # The frozen encoder is passed on as it was.
    name = "model.safetensors"
    assert_same_weights(tmp_path / "clip", tmp_path / "run" / "text_encoder", name)
