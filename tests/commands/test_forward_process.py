"""`latentdiff forward-process`, and the strip of noisy latents that it shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from PIL import Image, ImageOps
from tiny import tiny_pipeline

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import open_images
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.pipeline.preview import forward_strip


def test_strip_has_one_noise() -> None:
    schedule, clean = NoiseSchedule(), torch.randn(4, 8, 8)
    strip = forward_strip(schedule, clean, [0, 250, 999], torch.Generator().manual_seed(1))
    assert strip.shape == (3, 4, 8, 8)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Rombach et al. 2022
    for timestep, noisy in zip([0, 250, 999], strip, strict=True):
        abar = np.prod(1 - betas[: timestep + 1])
        torch.testing.assert_close(noisy, abar**0.5 * clean + (1 - abar) ** 0.5 * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("timesteps", "message"), [([], "empty"), ([3, 1000], "1000 is not one"), ([-1], "-1 is not")])
def test_wrong_timesteps_are_refused(timesteps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_strip(NoiseSchedule(), torch.zeros(4, 8, 8), timesteps, torch.Generator())


def test_command_shows_noisy_reconstructions(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
    out = tmp_path / "strip.png"
    command = ["forward-process", str(tmp_path / "model"), "--image", str(image), "--timesteps", "0", "500"]
    main([*command, "--out", str(out), "--device", "cpu"])
    assert Image.open(out).width >= 2 * 64  # small images are enlarged
    reconstruction = ImageOps.scale(pipeline.decode(pipeline.encode([Image.open(image)]))[0], 4)
    values = np.asarray(Image.open(out).convert("RGB")).astype(int)
    cleanest = min(
        np.abs(values[y : y + 64, x : x + 64] - np.asarray(reconstruction)).mean()
        for y in range(values.shape[0] - 63)
        for x in range(values.shape[1] - 63)
    )
    assert cleanest < 20  # the noise at t = 0 has sigma 0.03


@pytest.mark.runs
def test_the_default_is_a_training_image(unet_run: Path, tmp_path: Path) -> None:
    config = load_config(UNetTrainingConfig, unet_run / "config.yaml")
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    images.image(0).save(tmp_path / "first.png")
    for name, options in {"default": [], "given": ["--image", str(tmp_path / "first.png")]}.items():
        out = ["--out", str(tmp_path / f"{name}.png"), "--device", "cpu", "--timesteps", "0", "500"]
        main(["forward-process", str(unet_run), *options, *out])
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "given.png").read_bytes()


def test_the_default_needs_a_run(capsys, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    error = refusal(capsys, "forward-process", str(tmp_path / "model"), "--device", "cpu")
    assert error == f"error: --image is needed: {tmp_path}/model has no config.yaml that names its training images\n"
