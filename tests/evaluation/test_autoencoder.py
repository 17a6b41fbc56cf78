"""The report on an autoencoder against closed forms and sums by hand, its examples, and the verdict."""

import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_sets import blobs, image_set
from PIL import Image
from tiny import normal, tiny_vae
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import structural_similarity_index_measure

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.autoencoder import SIGMAS, Thresholds, choose_examples, example_table, measure, verdict
from latentdiff.evaluation.reconstruction import LatentStatistics, latent_statistics, reconstruct
from latentdiff.figures.grids import labelled_grid
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.perceptual import ms_ssim
from latentdiff.randomness import Stream
from latentdiff.randomness import normal as noise_of

NOTHING_ASKED = Thresholds(0.0, -1.0, 1.0, 100.0, 100.0)


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    """A tiny autoencoder that has learned to reconstruct blobs, with unit-scale latents."""
    vae = tiny_vae(scaling_factor=1.0)
    pixels = blobs(8).first(8)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for step in range(120):
        reconstruction, moments = vae(pixels, normal(8, 4, 8, 8, seed=step))
        loss = (reconstruction - pixels).square().mean() + 1e-4 * Posterior(moments).kl().mean() / pixels[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.set_latent_statistics(*latent_statistics(vae, blobs(8).batches(8), Accelerator(cpu=True)))
    return vae


def constant_vae(value: float) -> AutoencoderKL:
    """An autoencoder that reconstructs every image as pixels of one value."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(value)
    return vae


# --- latents ---


def statistics_of(mean: torch.Tensor, log_variance: torch.Tensor, batch_size: int) -> LatentStatistics:
    statistics = LatentStatistics(mean.shape[1])
    for part in zip(mean.double().split(batch_size), log_variance.double().split(batch_size), strict=True):
        statistics.add(*part)
    return statistics


def test_latent_statistics_are_the_closed_forms():
    scale = torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    mean = normal(5, 3, 6, 6).double() * scale + torch.tensor([1.0, 0.0, -2.0])[:, None, None]
    log_variance = normal(5, 3, 6, 6, seed=1).double() - 1
    found = statistics_of(mean, log_variance, batch_size=2)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected_mean = mean.mean((0, 2, 3))
    expected_std = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    marginal = Normal(expected_mean[:, None, None], expected_std[:, None, None])
    kl = kl_divergence(posterior, Normal(0.0, 1.0))
    assert found.mean.tolist() == pytest.approx(expected_mean.tolist(), rel=1e-10)
    assert found.variance.sqrt().tolist() == pytest.approx(expected_std.tolist(), rel=1e-10)
    assert found.kl.tolist() == pytest.approx(kl.mean((0, 2, 3)).tolist(), rel=1e-6)
    information = kl_divergence(posterior, marginal).mean((0, 2, 3))
    assert found.information.tolist() == pytest.approx(information.tolist(), rel=1e-6)


def test_latents_of_the_report_are_those_of_posterior_samples():
    """Over all channels: mean and standard deviation from samples, the KL from the posteriors of each image."""
    vae, images = tiny_vae(scaling_factor=0.3, shift_factor=0.2), blobs(5)
    report = measure(vae, images, 2, progress=False)
    with torch.no_grad():
        moments = vae.encode(images.first(5))
        samples = torch.cat([vae.sample(moments, normal(5, 4, 8, 8, seed=s)) for s in range(400)])
    assert report.latent_mean == pytest.approx(samples.mean().item(), abs=0.01)
    assert report.latent_std == pytest.approx(samples.std().item(), rel=0.01)
    assert report.channel_mean == pytest.approx(samples.mean((0, 2, 3)).tolist(), abs=0.01)
    assert report.channel_std == pytest.approx(samples.std((0, 2, 3)).tolist(), rel=0.01)
    mean, log_variance = moments.chunk(2, dim=1)
    unit = Posterior(torch.cat([0.3 * (mean - 0.2), log_variance + 2 * math.log(0.3)], dim=1))
    assert report.kl == pytest.approx(unit.kl().mean().item(), rel=1e-5)


@pytest.mark.parametrize("scaling_factor", [1.0, 0.7])
@pytest.mark.parametrize("bias", [0.0, 0.4])
def test_dead_channels(scaling_factor, bias):
    vae = tiny_vae(scaling_factor=scaling_factor)
    assert measure(vae, blobs(5), 3, progress=False).dead_channels == []
    with torch.no_grad():  # channel 1 is the same for every image
        vae.quant_conv.weight[[1, 5]] = 0
        vae.quant_conv.bias[[1, 5]] = bias
    report = measure(vae, blobs(5), 3, progress=False)
    assert report.dead_channels == [1]
    assert report.channel_information[1] == pytest.approx(0, abs=1e-6)
    mean, log_variance = bias * scaling_factor, bias + 2 * math.log(scaling_factor)
    assert report.channel_kl[1] == pytest.approx((mean**2 + math.exp(log_variance) - 1 - log_variance) / 2, abs=1e-6)
    assert report.channel_mean[1] == pytest.approx(mean, abs=1e-6)
    assert report.channel_std[1] == pytest.approx(math.exp(log_variance / 2), rel=1e-6)


# --- reconstruction ---


def test_measure_by_hand():
    vae, images = tiny_vae(), blobs(5)
    report = measure(vae, images, batch_size=2, progress=False)
    rows, noisy, kls = [], [], []
    for i in range(5):
        pixels = images.pixels(i)[None]
        with torch.no_grad():
            moments = vae.encode(pixels)
            z = 0.7 * moments[:, :4]  # the scaling factor
            back = vae.decode(z).clamp(-1, 1)
            noise = noise_of((4, 8, 8), 0, Stream.NOISE, 0, [i])
            noisy.append([psnr_by_hand(pixels, vae.decode(z + sigma * noise)) for sigma in SIGMAS])
        mse = (back - pixels).square().mean().item()
        score = structural_similarity_index_measure(back, pixels, data_range=(-1.0, 1.0)).item()
        rows.append([psnr_by_hand(pixels, back), score, (back - pixels).abs().mean().item(), mse])
        posterior = Normal(z, 0.7 * (0.5 * moments[:, 4:]).exp())
        kls.append(kl_divergence(posterior, Normal(0.0, 1.0)).sum().item())
    found = [report.psnr, report.ssim, report.l1, report.mse]
    assert found == pytest.approx(np.mean(rows, axis=0).tolist(), rel=1e-4)
    assert report.noisy_psnr == pytest.approx(np.mean(noisy, axis=0).tolist(), rel=1e-4)
    assert report.kl == pytest.approx(np.mean(kls), rel=1e-4)
    assert report.noise_loss == pytest.approx(np.mean(rows, axis=0)[0] - np.mean(noisy, axis=0)[1], abs=1e-3)
    assert (report.images, report.size, report.latent_shape) == (5, 16, [4, 8, 8])
    assert np.std(rows, axis=0).min() > 1e-4  # no empty comparison


def psnr_by_hand(pixels: torch.Tensor, other: torch.Tensor) -> float:
    return 20 * math.log10(2 / (pixels - other.clamp(-1, 1)).square().mean().sqrt().item())


def test_batch_size_makes_no_difference():
    vae, images = tiny_vae(), blobs(7)
    whole = measure(vae, images, 7, progress=False)
    for batch_size in (1, 3):
        parts = measure(vae, images, batch_size, progress=False)
        for key in ("psnr", "ssim", "ms_ssim", "l1", "mse", "kl", "latent_mean", "latent_std", "noisy_psnr"):
            np.testing.assert_allclose(getattr(parts, key), getattr(whole, key), rtol=1e-4, atol=1e-5)
        for key in ("mean", "std", "kl", "information"):
            expected = getattr(whole, f"channel_{key}")
            np.testing.assert_allclose(getattr(parts, f"channel_{key}"), expected, rtol=1e-4, atol=1e-5)
        assert [e["index"] for e in parts.examples] == [e["index"] for e in whole.examples]


@pytest.mark.runs
def test_noise_on_the_latents_costs_more_the_stronger_it_is(trained):
    report = measure(trained, blobs(8), 4, progress=False)
    curve = [report.psnr, *report.noisy_psnr]
    assert report.psnr > 20
    assert all(better > worse for better, worse in zip(curve, curve[1:], strict=False))
    assert curve[-1] < curve[0] - 1
    # A decoder that ignores its latents loses nothing.
    constant = measure(constant_vae(0.2), blobs(4), 4, progress=False)
    assert constant.noisy_psnr == pytest.approx([constant.psnr] * 4) and constant.noise_loss == pytest.approx(
        0, abs=1e-9
    )


def test_exact_reconstruction_has_a_finite_psnr():
    white = image_set([np.full((16, 16, 3), 255, dtype=np.uint8)] * 2)
    report = measure(constant_vae(1.0), white, 2, progress=False)
    assert report.psnr == 100 and report.l1 == 0
    assert report.ssim == pytest.approx(1) and report.ms_ssim == pytest.approx(1)


def test_ms_ssim():
    vae, images = tiny_vae(), blobs(3, size=32)  # two scales
    report = measure(vae, images, 2, progress=False)
    pixels = images.first(3)
    with torch.no_grad():
        reconstruction = reconstruct(vae, pixels).clamp(-1, 1)
    assert report.ms_ssim_scales == 2
    assert report.ms_ssim == pytest.approx(ms_ssim(reconstruction, pixels, shifted=False).mean().item(), rel=1e-4)
    assert "| MS-SSIM, 2 scale(s) |" in report.table()
    report = measure(tiny_vae(), blobs(2, size=8), 2, progress=False)
    assert report.ms_ssim is None and report.ms_ssim_scales == 0 and "MS-SSIM" not in report.table()


def test_measure_refuses():
    with pytest.raises(ValueError, match="^there are no images"):
        measure(tiny_vae(), replace_rows(blobs(2), []), 2, progress=False)
    broken = tiny_vae()
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"^the autoencoder's outputs are not finite for images 0 \.\. 1"):
        measure(broken, blobs(3), 2, progress=False)
    with pytest.raises(ValueError, match="^the autoencoder takes 3 channels and gives 1"):
        measure(tiny_vae(out_channels=1), blobs(3), 2, progress=False)


def replace_rows(images: CaptionedImages, rows: list[int]) -> CaptionedImages:
    return CaptionedImages(images.table.select(rows), images.config, images.channels, images.seed)


def test_metrics_that_cannot_be_measured_have_a_reason():
    grey = CaptionedImages(blobs(2).table, blobs(2).config, channels=1, seed=0)
    vae = tiny_vae(in_channels=1, out_channels=1)
    report = measure(vae, grey, 2, False, ["lpips", "fid", "kid"])
    reason = "it needs RGB images, these have 1 channel(s)"
    assert report.extra == {} and report.not_measured == dict.fromkeys(["lpips", "fid", "kid"], reason)
    assert f"| FID | not measured: {reason} |" in report.table()
    report = measure(tiny_vae(), blobs(1), 2, False, ["lpips", "fid", "kid"])
    assert report.not_measured == {
        "lpips": "it needs images of at least 32 px, these have 16",
        "fid": "it needs at least two images",
        "kid": "it needs at least two images",
    }
    assert measure(tiny_vae(), blobs(1), 2, False).not_measured == {}  # none asked for


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_missing_packages_are_named():
    report = measure(tiny_vae(), blobs(2), 2, False, ["fid", "kid"])
    reason = 'it needs torch-fidelity: pip install "latentdiff[metrics]"'
    assert report.extra == {} and report.not_measured == {"fid": reason, "kid": reason}


# --- examples ---


def test_examples():
    scores = [float(x) for x in np.random.default_rng(0).permutation(20)]
    chosen = choose_examples(scores)
    assert [e["psnr"] for e in chosen if e["kind"] == "best"] == [19, 18, 17]
    assert [e["psnr"] for e in chosen if e["kind"] == "median"] == [11, 10, 9]
    assert [e["psnr"] for e in chosen if e["kind"] == "worst"] == [2, 1, 0]
    assert all(scores[e["index"]] == e["psnr"] for e in chosen)
    for count in range(1, 12):  # none twice
        chosen = choose_examples(scores[:count])
        assert len({e["index"] for e in chosen}) == len(chosen) >= min(count, 3)
    kinds = [[e["kind"] for e in choose_examples(scores[:n])] for n in (1, 2, 3)]
    assert kinds[1:] == [["best", "worst"], ["best", "median", "worst"]] and len(kinds[0]) == 1


def test_example_table_shows_four_times_the_difference_around_grey():
    value = 32 / 255  # 64 of 255 above the middle of [-1, 1]
    images = image_set([np.full((16, 16, 3), level, dtype=np.uint8) for level in (128, 255)])
    vae = constant_vae(value)
    examples = measure(vae, images, 2, progress=False).examples
    table = example_table(vae, images, examples)
    back = round((value + 1) * 127.5)
    cells = []
    for example in examples:
        level = [128, 255][example["index"]]
        difference = np.clip(127.5 + 4 * ((value + 1) * 127.5 - level), 0, 255)
        cells.append([np.full((128, 128, 3), x, dtype=np.uint8) for x in (level, back, round(difference))])
    labels = [f"{e['kind']} {e['psnr']:.1f} dB, no. {e['index']}" for e in examples]
    expected = labelled_grid(
        [[Image.fromarray(cell) for cell in row] for row in cells],
        labels,
        ["original", "reconstruction", "difference x 4"],
    )
    assert cells[0][2][0, 0, 0] not in (0, 127, 128, 255) and cells[1][2][0, 0, 0] == 0
    assert table.size == expected.size
    assert np.abs(np.asarray(table).astype(int) - np.asarray(expected)).max() <= 1


# --- verdict ---


def test_verdict(trained):
    report = measure(trained, blobs(8), 8, progress=False)
    assert all(check.passed for check in verdict(report, Thresholds(min_psnr=20.0)))
    bad = {
        "PSNR": replace(report, psnr=9.0, noisy_psnr=[8.9, 8.8, 8.0, 7.0]),
        "SSIM": replace(report, ssim=0.1),
        "fraction of dead channels": replace(report, channel_information=[2.0, 0.0099, 0.0, 2.0]),
        "scale error": replace(report, latent_std=5.5),
        "noise loss": replace(report, noisy_psnr=[report.psnr - x for x in (1, 3.1, 6, 9)]),
    }
    for name, changed in bad.items():
        failed = [check for check in verdict(changed, Thresholds(min_psnr=20.0)) if not check.passed]
        assert [check.name for check in failed] == [name]
        assert failed[0].reason.startswith(f"{name} is ") and ", must be at " in failed[0].reason
    (check,) = (c for c in verdict(bad["scale error"], Thresholds()) if not c.passed and c.name == "scale error")
    assert check.value == 4.5 and check.threshold == 0.2 and "standard deviation 5.50" in check.reason
    assert replace(report, latent_mean=-0.15, latent_std=1.0).scale_error == pytest.approx(0.15)
    assert not replace(report, latent_mean=-0.15).is_unit_scale and report.is_unit_scale
    # At the threshold itself a check is passed.
    exact = Thresholds(report.psnr, report.ssim, 0.0, report.scale_error, report.noise_loss)
    assert all(check.passed for check in verdict(report, exact))
    assert all(check.passed for check in verdict(bad["PSNR"], NOTHING_ASKED))


def test_untrained_autoencoder_fails_the_default_thresholds():
    vae = AutoencoderKL.from_config(tiny_vae(scaling_factor=1.0).config, seed=0)
    checks = {c.name: c.passed for c in verdict(measure(vae, blobs(8), 8, progress=False), Thresholds())}
    assert not checks["PSNR"] and not checks["SSIM"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_psnr": math.nan}, "^min_psnr is nan, must be a finite number$"),
        ({"max_dead_channels": 25.0}, r"^max_dead_channels is 25, a fraction: must be in 0 \.\. 1$"),
    ],
)
def test_thresholds_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**values)
