"""Pixel space: the pipeline, cache, trainer and commands where latents are the images themselves."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import assert_same_weights, metrics, run_unet
from tiny import normal, tiny_text_encoder, tiny_unet, tokenizer
from transformers import CLIPTextModel

from latentdiff import LatentDiffusionPipeline
from latentdiff.commands.cli import main
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.images import to_images, to_pixels
from latentdiff.models.pixel_space import PixelSpace
from latentdiff.pipeline.preview import latent_preview
from latentdiff.pipeline.walks import interpolate, variations

GREY = ["model.in_channels=1", "model.out_channels=1", "model.sample_size=16"]
RGB = ["model.in_channels=3", "model.out_channels=3", "model.sample_size=16"]


def pixel_pipeline(channels: int = 3, seed: int = 0, **schedule: object) -> LatentDiffusionPipeline:
    """A pipeline in pixel space, 16x16, of random weights."""
    unet = tiny_unet(seed, sample_size=16, in_channels=channels, out_channels=channels)
    schedule = NoiseSchedule(**{"steps_offset": 1} | schedule)
    return LatentDiffusionPipeline(PixelSpace(channels), unet, tiny_text_encoder(seed), tokenizer(), schedule)


def make_images(channels: int, count: int = 2) -> list[Image.Image]:
    return to_images(normal(count, channels, 16, 16).clamp(-1, 1))


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


# ----------------------------------------------------------------------------------------------------------------------
# The space itself


def test_every_value_of_an_image_comes_back_bit_for_bit():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    pixels = to_pixels(image)[None]
    space = PixelSpace(1)
    moments = space.encode(pixels)
    assert moments.dtype == torch.uint8 and moments.flatten().tolist() == list(range(256))
    latents = space.sample(moments, torch.randn(1, 1, 16, 16))
    assert torch.equal(latents, pixels) and latents.dtype == torch.float32
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(space.decode(latents), pixels)
    assert np.array_equal(arrays(to_images(space.decode(latents))), arrays([image]))


def test_it_has_no_weights_and_no_type_to_lose():
    space = PixelSpace(3).to(torch.bfloat16)
    assert not list(space.parameters()) and not space.state_dict()
    assert space.dtype == torch.float32 and space.device == torch.device("cpu")
    assert PixelSpace(3).to("meta").device == torch.device("meta")
    config = space.config
    assert (config.in_channels, config.out_channels, config.latent_channels, config.downsampling) == (3, 3, 3, 1)


@pytest.mark.parametrize("channels", [0, 5, 8])
def test_channels_that_no_image_has(channels):
    with pytest.raises(ValueError, match=f"^pixel space has {channels} channels, must have the 1 to 4 of an image$"):
        PixelSpace(channels)


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="pixels have 3 channels, but this pixel space has 1"):
        PixelSpace(1).encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="the UNet takes 4 latent channels, but the autoencoder gives 3"):
        LatentDiffusionPipeline(PixelSpace(3), tiny_unet(), tiny_text_encoder(), tokenizer(), NoiseSchedule())


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_estimates_are_clipped_in_pixel_space_only(channels, sampler):
    def estimates(pipeline: LatentDiffusionPipeline) -> torch.Tensor:
        seen = []
        watch = lambda step, timestep, x, x0: seen.append(x0)  # noqa: E731
        options = {"num_inference_steps": 3, "guidance_scale": 4.0, "sampler": sampler, "progress": False}
        output = pipeline("a", seed=1, callback=watch, **options)
        assert output.images[0].mode == {1: "L", 3: "RGB"}[channels] and output.images[0].size == (16, 16)
        return torch.stack(seen)

    x0 = estimates(pixel_pipeline(channels))
    assert x0.abs().max() == 1
    pipeline = pixel_pipeline(channels)
    pipeline.vae.is_pixel_space = False  # as with an autoencoder, whose latents have no range
    assert estimates(pipeline).abs().max() > 1


def test_black_images_are_allowed():
    """Grey sets have them; with an autoencoder an all black image is a sign of overflow."""
    pipeline = pixel_pipeline(1)
    (image,) = pipeline.image_to_image("a", Image.new("L", (16, 16)), strength=0.0, progress=False)
    assert np.asarray(image).max() == 0


def test_infinite_estimates_are_no_image():
    """Clipping would make white or black of them."""
    pipeline = pixel_pipeline(3, prediction_type="v_prediction")
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, float("inf"))
    with pytest.raises(ValueError, match="latents that are not finite"):
        pipeline("a", num_inference_steps=2, progress=False)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((1, 3, 16, 16)), "latents are of type ndarray, must be a tensor"),
        (torch.zeros(1, 3, 8, 8), r"latents are \[1, 3, 8, 8\], must be \[1, 3, 16, 16\]"),
        (torch.ones(1, 3, 16, 16, dtype=torch.int64), "latents of type torch.int64 must be finite numbers of a float"),
        (torch.full((1, 3, 16, 16), float("nan")), "latents of type torch.float32 must be finite numbers of a float"),
    ],
)
def test_wrong_starting_noise_is_refused(latents, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pixel_pipeline(3)("a", latents=latents, num_inference_steps=2, progress=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_else_the_pipeline_does(channels):
    pipeline = pixel_pipeline(channels)
    options = {"num_inference_steps": 3, "progress": False}
    first, second = make_images(channels)
    assert np.array_equal(arrays(pipeline.decode(pipeline.encode([first, second]))), arrays([first, second]))
    assert torch.equal(pipeline.encode([first]), to_pixels(first)[None])
    kept = pipeline.image_to_image("a", first, strength=0.0, **options).images
    assert np.array_equal(arrays(kept), arrays([first]))
    changed = pipeline.image_to_image("a", first, strength=0.7, seed=0, **options).images
    assert not np.array_equal(arrays(changed), arrays([first]))

    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 7))
    (painted,) = pipeline.inpaint("a", first, mask, seed=0, **options)
    assert np.array_equal(np.asarray(painted)[7:], np.asarray(first)[7:])
    assert not np.array_equal(np.asarray(painted)[:7], np.asarray(first)[:7])

    assert len(interpolate(pipeline, ("a", "b"), (0, 1), 3, **options)) == 3
    assert len(variations(pipeline, "a", 0, 2, **options)) == 2
    wide = pipeline("a", seed=0, width=24, height=16, **options)
    assert wide.images[0].size == (24, 16) and wide.latents.shape == (1, channels, 16, 24)
    # Tiles change nothing where there is no autoencoder.
    tiled = pipeline.image_to_image("a", first.resize((32, 16)), 0.7, seed=0, tile=8, **options)
    whole = pipeline.image_to_image("a", first.resize((32, 16)), 0.7, seed=0, **options)
    assert np.abs(arrays(tiled.images) - arrays(whole.images)).max() == 0
    with pytest.raises(ValueError, match="width is 17, must be a multiple of 2"):
        pipeline("a", width=17, **options)


def test_a_preview_is_the_image():
    pipeline = pixel_pipeline(3)
    preview = latent_preview(pipeline)
    assert preview.factor == 1 and preview.r_squared == pytest.approx(1, abs=1e-6)
    image = make_images(3)[0]
    (seen,) = preview(pipeline.encode([image]))
    assert np.abs(arrays([seen]) - arrays([image])).max() <= 1


def test_a_given_noise_tensor_repeats_an_image():
    pipeline = pixel_pipeline(1)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(7))
    options = {"num_inference_steps": 4, "sampler": "ddim", "progress": False}
    assert np.array_equal(
        arrays(pipeline("a", latents=noise, **options).images), arrays(pipeline("a", seed=7, **options).images)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_round_trip(channels, tmp_path):
    pipeline = pixel_pipeline(channels, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["clip_sample"] is True
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(opened.vae, PixelSpace) and opened.schedule == pipeline.schedule
    options = {"num_inference_steps": 3, "seed": 2, "progress": False}
    assert np.array_equal(arrays(opened("a", **options).images), arrays(pipeline("a", **options).images))


def test_a_latent_folder_without_its_autoencoder_is_not_pixel_space(tmp_path):
    """diffusers saves such folders: but their scheduler does not clip."""
    pixel_pipeline(4).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"clip_sample": true', '"clip_sample": false'))
    with pytest.raises(ValueError, match=r"has no vae/ \(model_index.json: \[None, None\]\)"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_saving_warns_of_a_scheduler_that_does_not_clip(tmp_path):
    pipeline = pixel_pipeline(3)
    pipeline.defaults = replace(pipeline.defaults, sampler="dpm++2m")
    with pytest.warns(
        UserWarning, match="DPMSolverMultistepScheduler does not support clipping of the predicted image"
    ):
        pipeline.save_pretrained(tmp_path)


def test_a_missing_autoencoder_is_reported(tmp_path):
    """Pixel space is what the index says, not what is left over."""
    pixel_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no vae/ \(model_index.json: \['diffusers', 'AutoencoderKL'\]\)"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "options"), [("ddim", {"use_clipped_model_output": True}), ("ddpm", {})])
def test_the_parts_generate_equal_images_in_diffusers(tmp_path, prediction_type, sampler, options):
    """With diffusers' own UNet and scheduler and transformers' text encoder, all from the folder, without guidance."""
    pipeline = pixel_pipeline(1, prediction_type=prediction_type)
    pipeline.defaults = replace(pipeline.defaults, sampler=sampler)
    pipeline.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[sampler]
    scheduler = kind.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.clip_sample is True
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 1, 16, 16, generator=generator)
    with torch.no_grad():
        context = text_encoder(tokenizer()(["a"])).last_hidden_state
        for t in scheduler.timesteps:
            output = unet(x, t, context).sample
            x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    given = {"num_inference_steps": 10, "guidance_scale": 1.0, "progress": False}
    ours = pipeline("a", seed=5, **given)
    torch.testing.assert_close(ours.latents, x, atol=2e-4, rtol=0)


def test_the_folder_opens_as_a_diffusers_pipeline_without_autoencoder(tmp_path):
    """diffusers' pipeline takes images for latents then (8 pixels each), and never clips: so neither do we here."""
    pipeline = pixel_pipeline(3)
    pipeline.save_pretrained(tmp_path)
    pipeline.vae.is_pixel_space = False
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=None, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    size = {"height": 16 * theirs.vae_scale_factor, "width": 16 * theirs.vae_scale_factor}
    generated = theirs(
        "a", num_inference_steps=5, guidance_scale=3.0, latents=noise, output_type="latent", **size
    ).images
    ours = pipeline("a", num_inference_steps=5, guidance_scale=3.0, seed=3, progress=False).latents
    torch.testing.assert_close(ours, generated, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def grey_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_unet(tmp_path_factory.mktemp("grey") / "run", "null", *GREY, "data.flip=0.5", "ema.snapshot_every=3")


@pytest.mark.runs
def test_a_run_in_pixel_space_leaves_a_pipeline(grey_run):
    pipeline = LatentDiffusionPipeline.from_pretrained(grey_run)
    assert isinstance(pipeline.vae, PixelSpace) and pipeline.vae.is_pixel_space
    (image,) = pipeline("red apple", seed=0, progress=False)
    assert image.mode == "L" and image.size == (16, 16)
    assert len(metrics(grey_run, "validation/loss")) == 3
    assert (grey_run / "report" / "loss.png").is_file() and (grey_run / "samples" / "step_00000006.png").is_file()


@pytest.mark.runs
def test_the_cache_holds_bytes_and_changes_nothing(grey_run, tmp_path):
    (shard,) = (grey_run / "latents").glob("train-latents-*/*.safetensors")
    with safe_open(shard, framework="pt") as file:
        moments = file.get_tensor("moments")
    assert moments.dtype == torch.uint8 and moments.shape == (20, 2, 1, 16, 16)  # each also flipped
    assert torch.equal(moments[:, 1], moments[:, 0].flip(-1))
    online = run_unet(
        tmp_path / "online", "null", *GREY, "data.flip=0.5", "ema.snapshot_every=3", "train.cache_latents=false"
    )
    assert_same_weights(grey_run, online, "unet/diffusion_pytorch_model.safetensors")
    assert metrics(grey_run, "loss") == metrics(online, "loss")


@pytest.mark.runs
def test_a_resumed_run_is_the_same_run(grey_run, tmp_path):
    overrides = [*GREY, "data.flip=0.5", "ema.snapshot_every=3"]
    run_unet(tmp_path / "run", "null", *overrides, "train.steps=3", "optimizer.lr_schedule=constant")
    straight = run_unet(tmp_path / "straight", "null", *overrides, "optimizer.lr_schedule=constant")
    resumed = run_unet(tmp_path / "run", "null", *overrides, "optimizer.lr_schedule=constant")
    for name in ("model", "ema", "optimizer"):
        assert_same_weights(straight, resumed, f"checkpoints/step_00000006/{name}.safetensors")
    assert_same_weights(straight, resumed, "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.runs
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_gpu_learns_in_each_precision(precision, tmp_path):
    """fp16 with dynamic loss scaling, whose first scales overflow: those steps are skipped, the others learn."""
    longer = ["train.steps=60", "validation.every=60", "validation.sample_every=60", "output.checkpoint_every=60"]
    run = run_unet(tmp_path / "run", "null", *GREY, f"train.precision={precision}", "optimizer.lr=1e-2", *longer)
    losses = metrics(run, "validation/loss")
    assert losses[60] < 0.97 * losses[0]
    skipped = sum(metrics(run, "skipped").values())
    assert skipped <= 20 and (skipped == 0 or precision == "fp16")


@pytest.mark.runs
def test_a_run_stays_in_its_space(grey_run, vae_run, tmp_path):
    """A checkpoint in pixel space cannot be resumed in latent space, nor the other way round."""
    channels = ["model.in_channels=4", "model.out_channels=4"]
    straight = run_unet(tmp_path / "rgba", "null", *channels, "model.sample_size=8", "data.size=8", "train.steps=3")
    with pytest.raises(ValueError, match="latent_space"):
        run_unet(straight, vae_run, *channels)
    with pytest.raises(
        ValueError, match="is in pixel space .* and has no autoencoder; give the folder of a run of stage 1"
    ):
        run_unet(tmp_path / "new", grey_run)


@pytest.mark.runs
def test_reports_and_averages_of_a_run_in_pixel_space(grey_run, capsys):
    main(["evaluate", str(grey_run), "--prompts", "4", "--no-progress", "--device", "cpu"])
    said = capsys.readouterr().out
    figures = json.loads((grey_run / "evaluation.json").read_text())
    assert "PSNR" not in said and "training_psnr" not in figures  # there is nothing to reconstruct
    assert 0 <= figures["nearest_is_prompted"] <= 4 and "has the prompt as its caption" in said
    with Image.open(grey_run / "evaluation.png") as image:
        assert image.size == (16 * (16 + 2) - 2, 16)  # four pairs in a row for eight
    main(["ema", str(grey_run), "--sweep", "0.08", "--length", "0.08", "--no-progress", "--device", "cpu"])
    assert isinstance(LatentDiffusionPipeline.from_pretrained(grey_run / "ema-0.080").vae, PixelSpace)


@pytest.mark.runs
def test_the_commands_generate_in_pixel_space(grey_run, tmp_path, capsys):
    model, common = str(grey_run), ["--no-progress", "--device", "cpu", "--num-inference-steps", "3"]
    main(["generate", model, "", "--num-images-per-prompt", "4", "--seed", "0", "--out", f"{tmp_path}/a.png"] + common)
    assert len(list(tmp_path.glob("a-*.png"))) == 4
    animation = ["--animation", f"{tmp_path}/run.gif"]
    main(["generate", model, "rocket", "--seed", "0", "--out", f"{tmp_path}/b.png", *animation, *common])
    with Image.open(tmp_path / "run.gif") as image:
        assert image.n_frames == 3
    image = ["--image", f"{tmp_path}/b.png", "--timesteps", "0", "999"]
    main(["forward-process", model, *image, "--out", f"{tmp_path}/f.png", "--device", "cpu"])
    assert (tmp_path / "f.png").is_file()
    values = ["--values", "0", "1", "3"]
    main(["grid", model, "rocket", "red apple", "--out", f"{tmp_path}/g.png", *values, *common])
    assert (tmp_path / "g.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate-vae", model])
    assert "is in pixel space (vae: null) and has no autoencoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", model, "a", "--animate", "noisy", "--out", f"{tmp_path}/a.png", *common])
    assert "--animate noisy needs --animation FILE" in capsys.readouterr().err


@pytest.mark.runs
def test_images_without_captions(tmp_path, capsys):
    """A folder of nothing but images; one model of the unconditional prompt, and reports that ask for no other."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(make_images(3, 12)):
        image.save(folder / f"{i}.png")
    run = run_unet(
        tmp_path / "run",
        "null",
        *RGB,
        f"data.source={folder}",
        "data.captions=none",
        'validation.prompts=[""]',
        "validation.num_samples=5",
        "validation.guidance_scale=1",
        "data.limit=null",
    )
    with Image.open(run / "samples" / "step_00000003.png") as grid:
        assert grid.size == (3 * 18 - 2, 2 * 18 - 2)  # five images in two rows
    main(["evaluate", str(run), "--prompts", "14", "--no-progress", "--device", "cpu"])  # of 8 training images
    said = capsys.readouterr().out
    assert "14 generated images, without captions" in said and "nearest training image beside" in said
    assert "nearest_is_prompted" not in json.loads((run / "evaluation.json").read_text())


@pytest.mark.slow
def test_one_image_many_times_is_learned(tmp_path):
    """The sanity run: a model trained on one image generates it."""
    one = ["data.limit=1", "data.holdout=0", "data.repeat=16", "train.batch_size=16"]
    quick = ["train.steps=250", "optimizer.lr=3e-3", "validation.every=250", "validation.sample_every=250"]
    more = ["validation.num_inference_steps=20", "output.checkpoint_every=250", "validation.guidance_scale=1"]
    deep = [  # down to 4x4, to know where in the image it is
        "model.block_out_channels=[16, 24, 32]",
        "model.down_block_types=[DownBlock2D, DownBlock2D, CrossAttnDownBlock2D]",
        "model.up_block_types=[CrossAttnUpBlock2D, UpBlock2D, UpBlock2D]",
    ]
    run = run_unet(tmp_path / "run", "null", *RGB, *one, *quick, *more, *deep)
    pipeline = LatentDiffusionPipeline.from_pretrained(run)
    with safe_open(next((run / "latents").glob("train-latents-*/*.safetensors")), framework="pt") as file:
        shown = file.get_tensor("moments")[:, 0]
    assert len(shown) == 1
    generated = pipeline("red apple", seed=0, progress=False).latents
    error = (generated[0] - (shown[0].float() / 127.5 - 1)).square().mean()
    assert 10 * torch.log10(4 / error) > 15  # dB; another emoji is at about 8


@pytest.mark.runs
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.in_channels=5", "model.out_channels=5"], "model.in_channels is 5, must be the channels of images"),
        ([*GREY, "model.out_channels=3"], "model.out_channels is 3, but pixel space has 1 latent channels"),
        ([*GREY, "model.sample_size=8"], "model.sample_size is 8, must be the latents' size 16 (data.size 16 / 1)"),
        ([*GREY, "data.size=15", "model.sample_size=15"], "data.size is 15, must be a multiple of 2: the downsampling"),
    ],
)
def test_what_does_not_fit_is_reported_before_anything_is_read(tmp_path, overrides, line):
    with pytest.raises(ValueError) as error:
        run_unet(tmp_path / "run", "null", "data.source=nowhere/at/all", *overrides)
    assert str(error.value).startswith(line)
    assert not (tmp_path / "run").exists()


def test_noise_from_a_file(tmp_path, capsys):
    pipeline = pixel_pipeline(1)
    pipeline.save_pretrained(tmp_path / "model")
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(7))
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    common = [
        "--no-progress",
        "--device",
        "cpu",
        "--num-inference-steps",
        "3",
        "--sampler",
        "ddim",
        "--out",
        f"{tmp_path}/a.png",
    ]
    main(["generate", f"{tmp_path}/model", "a", "--latents", f"{tmp_path}/noise.safetensors", *common])
    expected = pipeline("a", seed=7, num_inference_steps=3, sampler="ddim", progress=False).images
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected[0]))
    capsys.readouterr()
    save_file({"noise": noise}, tmp_path / "other.safetensors")
    for name, message in [("other", "has no tensor latents"), ("nowhere", "is not a safetensors file")]:
        with pytest.raises(SystemExit):
            main(["generate", f"{tmp_path}/model", "a", "--latents", f"{tmp_path}/{name}.safetensors", *common])
        assert message in capsys.readouterr().err


def test_an_animation_shows_the_noisy_images_on_demand(tmp_path):
    """One frame a step of what the sampler holds: it starts as noise, where the estimates are smooth early on."""
    pipeline = pixel_pipeline(3)
    pipeline.save_pretrained(tmp_path / "model")
    common = [
        "--no-progress",
        "--device",
        "cpu",
        "--num-inference-steps",
        "4",
        "--seed",
        "0",
        "--out",
        f"{tmp_path}/a.png",
    ]
    seen = []
    pipeline("a", seed=0, num_inference_steps=4, progress=False, callback=lambda step, t, x, x0: seen.append((x, x0)))
    for shown, place in [("noisy", 0), ("estimate", 1)]:
        path = tmp_path / f"{shown}.gif"
        main(["generate", f"{tmp_path}/model", "a", "--animation", str(path), "--animate", shown, *common])
        with Image.open(path) as animation:
            first = np.asarray(animation.convert("RGB")).astype(int)
        expected = arrays(pipeline.decode(seen[0][place]))[0]
        assert np.abs(first - expected).mean() < 3  # a GIF frame has 256 colours
