"""Runs of both stages on images of several shapes and on rectangles: the real scripts."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from image_sets import mixed_folder
from PIL import Image
from safetensors.torch import load_file
from scripts import OF_THE_MACHINE, arguments, assert_same_weights, launch, metrics, run_unet, run_vae

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import open_run_images
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.checkpoint import checkpoint_folder

pytestmark = pytest.mark.runs

STEPS = 11
LONG = [
    *(f"train.steps={STEPS}", "train.batch_size=4", "train.micro_batch_size=2", "output.checkpoint_every=4"),
    *("validation.every=4", "output.keep=9"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """24 images in three shapes; after 4 held-out ones at least a batch of each is left. Captions change by epoch."""
    folder = tmp_path_factory.mktemp("images") / "set"
    mixed_folder(folder, {"square": (20, 20, 9), "wide": (24, 40, 8), "tall": (40, 24, 7)})
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(row | {"text": [row["text"], "red, small, noise"]}) for row in rows]
    metadata.write_text("\n".join(lines), encoding="utf-8")
    return [f"data.source={folder}", "data.caption_column=text", "data.shuffle_caption=true", *LONG]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, mixed: list[str]) -> dict[str, Path]:
    """Stage 1, and on it stage 2 with cached latents and without."""
    folder = tmp_path_factory.mktemp("straight")
    vae = run_vae(folder / "vae", *mixed)
    online = run_unet(folder / "online", vae, *mixed, "train.cache_latents=false")
    return {"vae": vae, "cached": run_unet(folder / "cached", vae, *mixed), "online": online}


def log_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]


@pytest.mark.parametrize("kind", ["vae", "cached", "online"])
def test_resume_is_exact(kind: str, tmp_path: Path, mixed: list[str], straight: dict[str, Path]) -> None:
    """From a checkpoint inside an epoch of every bucket, in a copy of the run's folder that has no later one."""
    run = tmp_path / "run"
    shutil.copytree(straight[kind], run)
    for step in (8, STEPS):
        shutil.rmtree(checkpoint_folder(run, step))
    if kind == "vae":
        run_vae(run, *mixed)
    else:
        cached = [] if kind == "cached" else ["train.cache_latents=false"]
        run_unet(run, straight["vae"], *mixed, *cached)
    for name in ("model", "ema", "optimizer", "loss_meter", "best"):
        assert_same_weights(straight[kind], run, f"checkpoints/step_{STEPS:08d}/{name}.safetensors")
    assert log_of(run) == log_of(straight[kind])


def test_cached_and_encoded_latents_train_alike(straight: dict[str, Path]) -> None:
    one, other = (metrics(straight[kind], "loss") for kind in ("cached", "online"))
    assert list(one) == [*range(1, STEPS + 1)] and list(one.values()) == pytest.approx([*other.values()], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_follow_the_same_curve(
    stage: int, tmp_path: Path, mixed: list[str], straight: dict[str, Path]
) -> None:
    output = launch(2, arguments(stage, tmp_path / "run", straight["vae"], *mixed))
    assert "20 training images, 4 held out, 3 buckets" in output
    alone = straight["vae" if stage == 1 else "cached"]
    for key in ("loss", "validation/loss", "validation/baseline", "validation/mse", "validation/psnr"):
        values = metrics(tmp_path / "run", key)
        assert values == pytest.approx(metrics(alone, key), rel=1e-5, abs=0)


def test_steps_have_the_shapes_of_their_buckets(mixed: list[str], straight: dict[str, Path]) -> None:
    """The statistics and the report of stage 1 are over all shapes; the pipeline's own size is the square one."""
    run = straight["cached"]
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    vae = AutoencoderKL.from_pretrained(straight["vae"])
    images, held_out = open_run_images(config, vae.config, progress=False)
    assert images.layout == held_out.layout and images.layout.shapes == ((12, 20), (16, 16), (20, 12))
    values = []
    with torch.no_grad():
        for i in range(len(images)):
            values.append(vae.sample(vae.encode(images.pixels(i)[None])).flatten(2)[0])
    means = torch.cat(values, dim=1)
    assert means.mean(dim=1).abs().max() < 0.1  # weighted by latent values
    report = json.loads((straight["vae"] / "vae_report.json").read_text())["report"]
    assert (report["size"], report["buckets"], report["latent_shape"]) == (16, 3, [4, 8, 8])
    assert report["images"] == 4 and [example["kind"] for example in report["examples"]] == ["best", "median", "worst"]
    pipeline = LatentDiffusionPipeline.from_pretrained(run)
    assert pipeline("wide_0", num_inference_steps=2)[0].size == (16, 16)
    assert pipeline("wide_0", num_inference_steps=2, height=12, width=20)[0].size == (20, 12)


def test_commands_measure_images_of_several_shapes(
    straight: dict[str, Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight["cached"], run)
    main(["evaluate", str(run), "--prompts", "3", "--no-progress", "--device", "cpu"])
    figures = json.loads((run / "evaluation.json").read_text())
    assert (figures["training_images"], figures["held_out_images"], figures["prompts"]) == (20, 4, 3)
    main(["evaluate-vae", str(run), "--no-progress", "--device", "cpu"])
    assert "buckets" in capsys.readouterr().out


def test_crops_larger_than_a_bucket_are_refused(tmp_path: Path, mixed: list[str]) -> None:
    with pytest.raises(ValueError, match="^train.crop_size is 14, must be at most 12, the shortest side of the bucket"):
        run_vae(tmp_path / "run", *mixed, "train.crop_size=14")
    crops = run_vae(tmp_path / "crops", *mixed, "train.crop_size=12", "train.whole_image_steps=3", "train.steps=6")
    assert list(metrics(crops, "loss")) == [*range(1, 7)]


def test_rectangles_from_training_to_diffusers(tmp_path: Path) -> None:
    """Both stages at 16 x 24, and what they make: samples, report, pipeline and diffusers' pipeline of that size."""
    folder = mixed_folder(tmp_path / "images", {"wide": (24, 40, 10), "square": (20, 20, 4)})
    data = [f"data.source={folder}", "data.caption_column=text", "data.size=[16, 24]", "train.micro_batch_size=auto"]
    vae = run_vae(tmp_path / "vae", *data, "model.sample_size=[16, 24]", "train.steps=3")
    run = run_unet(tmp_path / "run", vae, *data, "model.sample_size=[8, 12]", "train.steps=3")
    assert json.loads((vae / "config.json").read_text())["sample_size"] == [16, 24]
    assert json.loads((vae / "vae_report.json").read_text())["report"]["latent_shape"] == [4, 8, 12]
    (part,) = (run / "latents").glob("train-latents-*")
    (shard,) = part.iterdir()
    assert load_file(shard)["moments"].shape[1:] == (1, 8, 8, 12)
    (sample,) = (run / "samples").iterdir()
    assert Image.open(sample).size == (2 * 24 + 2, 16)  # two prompts side by side
    pipeline = LatentDiffusionPipeline.from_pretrained(run)
    image = pipeline("wide_0", num_inference_steps=3, seed=1)[0]
    assert image.size == (24, 16)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run, safety_checker=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    output = theirs("wide_0", num_inference_steps=3, output_type="np").images
    assert np.asarray(output).shape == (1, 16, 24, 3)
    main(["evaluate", str(run), "--prompts", "2", "--no-progress", "--device", "cpu"])
    for wrong, message in [
        (["data.size=[16, 18]"], r"data.size is \[16, 18\], must be a multiple of 4: the downsampling 2"),
        (
            ["model.sample_size=8"],
            r"model.sample_size is 8, must be the latents' size \[8, 12\] \(data.size",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            run_unet(tmp_path / "wrong", vae, *data, "model.sample_size=[8, 12]", *wrong)
