"""The figures of `latentdiff evaluate` against formulas written out by hand, and the command line's manners."""

import io
import math
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import tiny_pipeline, tiny_vae

import latentdiff
from latentdiff.commands.cli import main
from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.metrics import nearest_images, psnr, ssim
from latentdiff.evaluation.prompts import PromptFidelity, prompt_fidelity
from latentdiff.evaluation.reconstruction import latent_statistics, reconstruction_quality
from latentdiff.images import to_images, to_pixels


@pytest.fixture
def accelerator():
    """Accelerate keeps its state in class attributes: they are cleared before and after."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def captioned(count: int, size: int = 16) -> CaptionedImages:
    """Images of noise in memory with the captions `image 0`, `image 1`, ..."""
    rows = []
    for i in range(count):
        file = io.BytesIO()
        values = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(values).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    columns = {"image": rows, "text": [f"image {i}" for i in range(count)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    return CaptionedImages(table, DataConfig(source="memory", size=size), channels=3, seed=0)


def noisy(scale: float, shape: tuple[int, ...] = (3, 3, 16, 16), seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- PSNR and SSIM ---


def test_psnr_by_hand():
    pixels = torch.zeros(3, 3, 4, 4)
    other = pixels.clone()
    other[0] += 0.2  # MSE 0.04 of a range of 2: 20 log10(2 / 0.2)
    other[1, 0, 0, 0] = 1.0  # MSE 1 / 48
    other[2, :, :2] = 5.0  # clamped to 1: MSE 1 / 2
    expected = [20.0, 10 * math.log10(4 * 48), 10 * math.log10(8)]
    assert psnr(pixels, other).tolist() == pytest.approx(expected, abs=1e-4)
    assert psnr(other, pixels).tolist() == pytest.approx(expected, abs=1e-4)
    # As 0..255 images, where the usual definition has the peak 255.
    a, b = (torch.from_numpy(np.random.default_rng(i).integers(0, 256, (1, 3, 8, 8))).double() for i in range(2))
    usual = 10 * torch.log10(255**2 / (a - b).square().mean())
    assert psnr(a / 127.5 - 1, b / 127.5 - 1).item() == pytest.approx(usual.item(), abs=1e-6)
    assert psnr(a, a).item() == math.inf


def test_ssim():
    pixels = noisy(0.3).clamp(-1, 1)
    assert ssim(pixels, pixels).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    scores = [ssim(pixels, pixels + noisy(scale, seed=1)) for scale in (0.0, 0.05, 0.2, 0.8)]
    for better, worse in zip(scores, scores[1:], strict=False):
        assert (better > worse + 0.01).all()
    other = (pixels + noisy(0.2, seed=1)).clamp(-1, 1)
    torch.testing.assert_close(ssim(pixels, other), ssim(other, pixels), atol=1e-5, rtol=0)
    # An image's score is its own, whatever else is in the batch.
    torch.testing.assert_close(ssim(pixels, other)[1:2], ssim(pixels[1:2], other[1:2]), atol=1e-5, rtol=0)
    # Values beyond the range count as those at its end.
    bright = torch.ones(1, 3, 16, 16)
    assert ssim(bright, 3 * bright).item() == pytest.approx(1.0, abs=1e-5)
    # Two flat images: only the luminance term (2ab + c) / (a^2 + b^2 + c) is left, with c = (0.01 * range)^2.
    flat = ssim(torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)).item()
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 0.02**2) / (0.2**2 + 0.6**2 + 0.02**2), abs=1e-4)


def test_reconstruction_quality():
    vae, images = tiny_vae(), captioned(5)
    quality = reconstruction_quality(vae, images, batch_size=2)  # batches of 2, 2 and 1
    errors, scores, similarities = [], [], []
    for i in range(5):
        pixels = images.pixels(i)
        with torch.no_grad():
            back = vae.decode(vae.sample(vae.encode(pixels[None])))[0].clamp(-1, 1)
        means = [(back[c].mean() - pixels[c].mean()).abs() * 255 / 2 for c in range(3)]
        errors.append(sum(means).item() / 3)
        scores.append(10 * math.log10(4 / (back - pixels).square().mean().item()))
        similarities.append(ssim(pixels[None], back[None]).item())
    assert quality.colour_error == pytest.approx(np.mean(errors), rel=1e-4)
    assert quality.psnr == pytest.approx(np.mean(scores), rel=1e-4)
    assert quality.ssim == pytest.approx(np.mean(similarities), abs=1e-4)
    assert quality.colour_error > 1 and np.std(scores) > 1e-3  # no empty comparison


# --- the latents' statistics ---


def test_latent_statistics_are_those_of_posterior_draws(accelerator):
    vae, images = tiny_vae(scaling_factor=1.0), captioned(7)
    mean, std = latent_statistics(vae, images.batches(3), accelerator)  # batches of 3, 3 and 1
    assert mean.shape == std.shape == (4,) and mean.dtype == std.dtype == torch.float64
    # However the images are cut into batches.
    for batch_size in (1, 7):
        again = latent_statistics(vae, images.batches(batch_size), accelerator)
        torch.testing.assert_close(torch.stack(again), torch.stack([mean, std]), atol=1e-5, rtol=1e-5)
    # By hand from the moments: the law of total variance.
    with torch.no_grad():
        moments = torch.cat([vae.encode(pixels) for _, pixels in images.batches(7)]).double()
    means, variances = moments[:, :4], moments[:, 4:].exp()
    torch.testing.assert_close(mean, means.mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    total = means.var((0, 2, 3), correction=0) + variances.mean((0, 2, 3))
    torch.testing.assert_close(std, total.sqrt(), atol=1e-6, rtol=1e-6)
    # And from draws themselves: 7 * 64 * 400 a channel.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.cat(
            [vae.sample(moments.float(), torch.randn(means.shape, generator=generator)) for _ in range(400)]
        ).double()
    torch.testing.assert_close(mean, draws.mean((0, 2, 3)), atol=0.01, rtol=0)
    torch.testing.assert_close(std, draws.std((0, 2, 3)), atol=0, rtol=0.01)


def test_latents_are_of_unit_scale_once_the_statistics_are_set(accelerator):
    vae, images = tiny_vae(scaling_factor=1.0), captioned(7)
    before = latent_statistics(vae, images.batches(4), accelerator)
    assert (before[1] - 1).abs().max() > 0.05 and before[0].abs().max() > 0.05
    vae.set_latent_statistics(*before)
    mean, std = latent_statistics(vae, images.batches(4), accelerator)
    torch.testing.assert_close(mean, torch.zeros(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(4).double(), atol=1e-5, rtol=0)


# --- text to image ---


def test_nearest_images_by_brute_force():
    reference = noisy(1.0, (40, 3, 8, 8))
    generated = noisy(1.0, (30, 3, 8, 8), seed=1)
    generated[3] = reference[17] + noisy(0.5, (3, 8, 8), seed=2)
    expected = [min(range(40), key=lambda i: (g - reference[i]).square().mean().item()) for g in generated]
    assert nearest_images(generated, reference).tolist() == expected
    assert expected[3] == 17 and len(set(expected)) > 3
    assert nearest_images(reference, reference).tolist() == list(range(40))


def test_prompt_fidelity():
    pipeline, images = tiny_pipeline(), captioned(7)
    result = prompt_fidelity(pipeline, images, num_prompts=3, seed=5, batch_size=2, progress=False)
    assert result.prompts == ["image 0", "image 2", "image 4"]  # spread over the set
    for place, index in enumerate([0, 2, 4]):
        assert np.array_equal(np.asarray(result.originals[place]), np.asarray(images.image(index)))
        # Each is what the pipeline draws for that caption and seed alone.
        alone = pipeline(f"image {index}", seed=5 + place, height=16, width=16, progress=False).images[0]
        difference = np.asarray(alone).astype(int) - np.asarray(result.generated[place])
        assert np.abs(difference).max() <= 1
        distances = [(to_pixels(result.generated[place]) - images.pixels(i)).square().sum() for i in range(7)]
        assert result.nearest[place] == f"image {int(torch.stack(distances).argmin())}"
    assert len({image.tobytes() for image in result.generated}) == 3
    for prompts in (0, 8):
        with pytest.raises(ValueError, match=rf"^{prompts} prompts asked for, must be in 1 \.\. 7"):
            prompt_fidelity(pipeline, images, prompts, 0, 2, progress=False)


def test_hits():
    (image,) = to_images(torch.zeros(1, 3, 2, 2))
    assert PromptFidelity(["a", "b", "c"], ["a", "a", "c"], [image] * 3, [image] * 3).hits == 2


# --- the command line ---


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"latentdiff {latentdiff.__version__}\n"


def test_missing_pipeline_is_one_line_and_no_traceback(tmp_path):
    """In a process of its own: the installed command does the same as `main`."""
    code = "import sys; from latentdiff.cli import main; main(sys.argv[1:])"
    arguments = ["generate", str(tmp_path / "nowhere"), "a red apple", "--out", str(tmp_path / "a.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_generate_writes_images(tmp_path, folder, capsys):
    out = tmp_path / "out" / "a.png"
    common = ["--steps", "2", "--seed", "3", "--no-progress", "--device", "cpu"]
    main(["generate", folder, "a red apple", "--out", str(out), *common])
    assert capsys.readouterr().out == f"{out} (seed 3)\n"
    expected = tiny_pipeline()("a red apple", seed=3, num_inference_steps=2, progress=False).images[0]
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    main(["generate", folder, "a", "b", "--num-images", "2", "--out", str(out), *common])
    assert capsys.readouterr().out == "".join(f"{out.with_name(f'a-{i}.png')} (seed {3 + i})\n" for i in range(4))
    assert sorted(path.name for path in out.parent.iterdir()) == ["a-0.png", "a-1.png", "a-2.png", "a-3.png", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.jpg"], "--out a.jpg must end in .png\n"),
        (["--sampler", "eule"], "unknown sampler 'eule', must be one of ddpm, ddim, euler"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0, must be "),
        (["--steps", "0"], "steps is 0, must be in 1 .. 1000"),
        (["--height", "17"], "height is 17, must be a multiple of 4\n"),
        (["--num-images", "0"], "num_images_per_prompt is 0, must be at least 1\n"),
        (["--seed", "-1"], "seed -1 is not an integer in 0 .. 2**63 - 1\n"),
        (["--device", "nothing"], "--device nothing: "),
    ],
)
def test_generate_refuses(folder, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "generate", folder, "a red apple", "--no-progress", *arguments)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_evaluate_refuses_a_folder_that_is_no_run(folder, capsys, tmp_path):
    error = refusal(capsys, "evaluate", str(tmp_path / "nowhere"))
    assert error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1
    error = refusal(capsys, "evaluate", folder)  # a pipeline, but without the config that it was trained with
    assert error == f"error: config {folder}/config.yaml does not exist\n"


def test_unknown_command_and_option(capsys):
    assert "invalid choice: 'paint'" in refusal(capsys, "paint")
    assert "--sampler" in refusal(capsys, "generate", "folder", "a", "--sampler")


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("LATENTDIFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must end in .png"):
        main(["generate", "folder", "a", "--out", "a.jpg"])
