"""Previews of latents."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from samples import PROMPT, options

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.images import to_pixels
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.preview import LatentPreview, fit_preview, latent_preview


@pytest.fixture(scope="module")
def images() -> CaptionedImages:
    source = DataConfig(holdout=0, source="embedded", size=16, limit=48)
    return open_images(source, 3, seed=0, progress=False)[0]


def test_preview_finds_a_linear_map():
    weights, bias = 0.2 * torch.randn(3, 4), 0.1 * torch.randn(3)
    latents = torch.randn(3, 4, 6, 8)
    colours = torch.einsum("oc,bchw->bohw", weights, latents) + bias[:, None, None]
    # Detail within a latent pixel that the average takes out again.
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(6, 8)
    preview = LatentPreview.fit(latents, F.interpolate(colours, scale_factor=2) + 0.3 * detail)
    torch.testing.assert_close(preview.weights, weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(preview.bias, bias, rtol=0, atol=1e-6)
    assert preview.factor == 2 and preview.r_squared == pytest.approx(1, abs=1e-9)


def test_r_squared_is_the_explained_variance():
    """A colour that is half the latent's doing and half (orthogonal) noise: of equal variances, 0.5 is explained."""
    latent, noise = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    pixels = (0.4 * latent + 0.4 * noise).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    preview = LatentPreview.fit(latent.view(1, 1, 2, 2), pixels)
    assert preview.r_squared == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(preview.weights, torch.full((3, 1), 0.4))


def test_preview_images():
    weights, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0])
    preview = LatentPreview(weights, bias, factor=4, r_squared=1.0)
    latents = torch.tensor([[-1.0, 1.0], [0.2, 5.0]])[:, :, None, None].expand(2, 2, 3, 5)
    first, second = preview(latents)
    assert first.size == second.size == (20, 12)
    assert first.getcolors() == [(240, (0, 255, 255))]
    assert second.getcolors() == [(240, (153, 255, 255))]  # (0.2 + 1) * 127.5; 5 is clamped
    with pytest.raises(ValueError, match="latents have 3 channels, the preview takes 2"):
        preview(torch.zeros(1, 3, 4, 4))


def test_preview_file(tmp_path):
    preview = LatentPreview(torch.randn(3, 4), torch.randn(3), factor=8, r_squared=0.75)
    preview.save(tmp_path)
    again = LatentPreview.load(tmp_path)
    assert torch.equal(again.weights, preview.weights) and torch.equal(again.bias, preview.bias)
    assert (again.factor, again.r_squared) == (8, 0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a latent preview .KeyError: 'weights'"),
        ('{"weights": [[1], [2, 3], [4]], "bias": [0, 0, 0], "factor": 2, "r_squared": 1}', "is not a latent preview"),
        ('{"weights": [[1], [2]], "bias": [0, 0, 0], "factor": 2, "r_squared": 1}', r"weights \[3, C\]"),
        ('{"weights": [[1], [2], [3]], "bias": [0, 0, NaN], "factor": 2, "r_squared": 1}', "must hold finite"),
        ('{"weights": [[1], [2], [3]], "bias": [0, 0, 0], "factor": 0, "r_squared": 1}', "factor of at least 1"),
    ],
)
def test_broken_preview_files(tmp_path, text, message):
    (tmp_path / "latent_preview.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LatentPreview.load(tmp_path)


def test_latents_and_pixels_that_do_not_fit():
    latents = torch.zeros(2, 4, 4, 4)
    for shape in [(2, 3, 10, 10), (2, 1, 8, 8), (1, 3, 8, 8), (2, 3, 2, 2), (2, 3, 8, 12)]:
        with pytest.raises(ValueError, match=r"do not fit latents \[2, 4, 4, 4\]"):
            LatentPreview.fit(latents, torch.zeros(shape))
    with pytest.raises(ValueError, match="one colour"):
        LatentPreview.fit(latents, torch.zeros(2, 3, 8, 8))


@pytest.mark.runs
def test_preview_of_a_trained_autoencoder(vae_run: Path, images):
    vae = AutoencoderKL.from_pretrained(vae_run).train()
    preview = fit_preview(vae, (pixels for _, pixels in images.batches(16)))
    assert preview.factor == 2 and preview.weights.shape == (3, 4) and vae.training
    assert preview.r_squared > 0.3  # measured: 0.44 after six training steps, 0.81 for the demo's autoencoder

    pixels = images.first(48)
    with torch.no_grad():
        shown = torch.stack([to_pixels(image) for image in preview(vae.sample(vae.encode(pixels)))])
    assert shown.shape == pixels.shape
    wanted, found = (F.avg_pool2d(x, 2).movedim(1, 0).flatten(1) for x in (pixels, shown))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(wanted, found, strict=True)]
    assert min(correlations) > 0.4  # measured: 0.58, 0.76, 0.69
    with pytest.raises(ValueError, match="at least one batch"):
        fit_preview(vae, [])


def test_a_preview_of_the_estimate(pipeline: LatentDiffusionPipeline) -> None:
    preview = latent_preview(pipeline)
    sizes = []
    pipeline(PROMPT, **options(callback=lambda step, t, x, x0: sizes.append(preview(x0)[0].size)))
    assert sizes == [(16, 16)] * 4
    assert latent_preview(pipeline) is preview  # fitted once


def test_a_preview_of_the_folder_is_used(pipeline: LatentDiffusionPipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    known = LatentPreview(torch.eye(3, 4), torch.zeros(3), 2, 0.5)
    known.save(tmp_path / "vae")
    opened = latent_preview(LatentDiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(opened.weights, known.weights) and opened.factor == 2
