"""The figures of `latentdiff evaluate-vae` against closed forms and sums by hand, its verdict, and its files."""

import argparse
import io
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import refusal
from tiny import normal, tiny_pipeline, tiny_vae
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from latentdiff.commands.cli import main
from latentdiff.commands.evaluate_vae import add_evaluate_vae
from latentdiff.config import DataConfig, UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.autoencoder import (
    EXTRA_METRICS,
    LAGS,
    SIGMAS,
    LatentTally,
    Thresholds,
    VAEReport,
    choose_examples,
    evaluate_run,
    example_table,
    measure,
    refuse_unfit,
    verdict,
)
from latentdiff.evaluation.metrics import MS_SSIM_WEIGHTS, ms_ssim, ms_ssim_scales
from latentdiff.evaluation.reconstruction import latent_statistics
from latentdiff.figures.grids import labelled_grid
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.randomness import Stream
from latentdiff.randomness import normal as noise_of

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
NOTHING_ASKED = Thresholds(0.0, -1.0, 1.0, 100.0, 100.0)


def images_of(arrays: list[np.ndarray]) -> CaptionedImages:
    """Images in memory, without captions, from uint8 [H, W, 3]."""
    rows = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    table = datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    size = arrays[0].shape[0]
    return CaptionedImages(table, DataConfig(source="memory", size=size, caption_column=None), channels=3, seed=0)


def blobs(count: int, size: int = 16) -> CaptionedImages:
    """Smooth images: a few random colours, enlarged."""
    small = [np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8) for i in range(count)]
    return images_of([np.asarray(Image.fromarray(s).resize((size, size), Image.Resampling.BICUBIC)) for s in small])


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    """A tiny autoencoder that has learned to give blobs back, with unit-scale latents."""
    from accelerate import Accelerator

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
    """An autoencoder that answers every image with pixels of one value."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(value)
    return vae


# --- latents ---


def tallied(mean: torch.Tensor, log_variance: torch.Tensor, batch: int) -> dict:
    loss_meter = LatentTally(mean.shape[1])
    for part in zip(mean.double().split(batch), log_variance.double().split(batch), strict=True):
        loss_meter.add(*part)
    return loss_meter.figures()


def test_mean_deviation_kl_and_information_are_the_closed_forms():
    scale = torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    mean = normal(5, 3, 6, 6).double() * scale + torch.tensor([1.0, 0.0, -2.0])[:, None, None]
    log_variance = normal(5, 3, 6, 6, seed=1).double() - 1
    found = tallied(mean, log_variance, batch=2)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected_mean = mean.mean((0, 2, 3))
    expected_std = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    marginal = Normal(expected_mean[:, None, None], expected_std[:, None, None])
    kl = kl_divergence(posterior, Normal(0.0, 1.0))
    assert found["channel_mean"] == pytest.approx(expected_mean.tolist(), rel=1e-10)
    assert found["channel_std"] == pytest.approx(expected_std.tolist(), rel=1e-10)
    assert found["channel_kl"] == pytest.approx(kl.mean((0, 2, 3)).tolist(), rel=1e-6)
    information = kl_divergence(posterior, marginal).mean((0, 2, 3))
    assert found["channel_information"] == pytest.approx(information.tolist(), rel=1e-6)
    assert found["kl"] == pytest.approx(kl.sum((1, 2, 3)).mean().item(), rel=1e-6)
    both = Posterior(torch.cat([mean, log_variance], dim=1))
    assert found["kl"] == pytest.approx(both.kl().mean().item(), rel=1e-5)
    # Over all channels, from draws.
    draws = torch.cat([both.sample(normal(*mean.shape, seed=s)) for s in range(400)])
    assert found["latent_mean"] == pytest.approx(draws.mean().item(), abs=0.01)
    assert found["latent_std"] == pytest.approx(draws.std().item(), rel=0.01)
    correlation = np.corrcoef(draws.movedim(1, 0).flatten(1).numpy())
    np.testing.assert_allclose(found["correlation"], correlation, atol=0.01)


def test_correlation_of_channels():
    one, other = normal(6, 1, 8, 8).double(), normal(6, 1, 8, 8, seed=1).double()
    mean = torch.cat([one, -3 * one + 2, 0.6 * one + 0.8 * other], dim=1)
    found = tallied(mean, torch.full_like(mean, -30), batch=6)
    np.testing.assert_allclose(found["correlation"], np.corrcoef(mean.movedim(1, 0).flatten(1).numpy()), atol=1e-8)
    assert found["correlation"][0][1] == pytest.approx(-1, abs=1e-8)
    assert 0.5 < found["correlation"][0][2] < 0.7
    # Noise of the posterior's own belongs to one channel alone: variances double, covariances stay.
    noisy = tallied(mean / mean.std((0, 2, 3), correction=0)[:, None, None], torch.zeros_like(mean), batch=6)
    assert noisy["correlation"][0][1] == pytest.approx(-0.5, abs=1e-8)
    assert noisy["correlation"][1][1] == pytest.approx(1)


def test_autocorrelation_of_constructed_fields():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    checkerboard = (1.0 - 2 * ((rows + columns) % 2)).expand(3, 1, 8, 8)
    silent, unit = torch.full((3, 1, 8, 8), -30.0), torch.zeros(3, 1, 8, 8)
    assert tallied(checkerboard + 5, silent, 2)["autocorrelation"] == pytest.approx([-1, 1, 1])
    # Half of the variance is white noise of the posterior.
    assert tallied(checkerboard + 5, unit, 2)["autocorrelation"] == pytest.approx([-0.5, 0.5, 0.5])
    stripes = (1.0 - 2 * (columns % 2)).expand(3, 1, 8, 8)  # -1 along rows, 1 along columns
    assert tallied(stripes, silent, 1)["autocorrelation"] == pytest.approx([0, 1, 1])
    flat = torch.tensor([1.0, -1.0, 4.0])[:, None, None, None].expand(3, 1, 8, 8)  # images of one value each
    assert tallied(flat, silent, 2)["autocorrelation"] == pytest.approx([1, 1, 1])
    both = torch.cat([checkerboard, flat], dim=1)  # the mean over channels
    assert tallied(both, torch.full_like(both, -30), 2)["autocorrelation"] == pytest.approx([0, 1, 1])
    small = tallied(checkerboard[..., :4, :4], silent[..., :4, :4], 3)
    assert small["autocorrelation"] == [pytest.approx(-1), pytest.approx(1), None]


def test_autocorrelation_by_brute_force():
    mean = normal(2, 2, 5, 5).double().cumsum(dim=2) + 3
    found = tallied(mean, torch.full_like(mean, -30), batch=1)["autocorrelation"]
    for lag, value in zip(LAGS, found, strict=True):
        channels = []
        for c in range(2):
            m, v = mean[:, c].mean().item(), mean[:, c].var(correction=0).item()
            pairs = [
                (mean[b, c, y, x].item() - m) * (mean[b, c, y + dy, x + dx].item() - m)
                for b in range(2)
                for y in range(5)
                for x in range(5)
                for dy, dx in ((lag, 0), (0, lag))
                if y + dy < 5 and x + dx < 5
            ]
            channels.append(np.mean(pairs) / v)
        assert value == pytest.approx(np.mean(channels), rel=1e-6)


@pytest.mark.parametrize("scaling_factor", [1.0, 0.7])
@pytest.mark.parametrize("bias", [0.0, 0.4])
def test_dead_channels(scaling_factor, bias):
    vae = tiny_vae(scaling_factor=scaling_factor)
    assert measure(vae, blobs(5), 3, progress=False).dead_channels == []
    with torch.no_grad():  # channel 1 says the same about every image
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


def test_batches_make_no_difference():
    vae, images = tiny_vae(), blobs(7)
    whole = measure(vae, images, 7, progress=False)
    for batch_size in (1, 3):
        parts = measure(vae, images, batch_size, progress=False)
        for key in ("psnr", "ssim", "ms_ssim", "l1", "mse", "kl", "latent_mean", "latent_std", "noisy_psnr"):
            np.testing.assert_allclose(getattr(parts, key), getattr(whole, key), rtol=1e-4, atol=1e-5)
        for key in ("mean", "std", "kl", "information"):
            expected = getattr(whole, f"channel_{key}")
            np.testing.assert_allclose(getattr(parts, f"channel_{key}"), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(parts.correlation, whole.correlation, atol=1e-5)
        np.testing.assert_allclose(parts.autocorrelation, whole.autocorrelation, atol=1e-5)
        assert [e["index"] for e in parts.examples] == [e["index"] for e in whole.examples]


def test_noise_on_the_latents_costs_more_the_stronger_it_is(trained):
    report = measure(trained, blobs(8), 4, progress=False)
    curve = [report.psnr, *report.noisy_psnr]
    assert report.psnr > 20
    assert all(better > worse for better, worse in zip(curve, curve[1:], strict=False))
    assert curve[-1] < curve[0] - 1
    # A decoder that does not look at its latents loses nothing.
    deaf = measure(constant_vae(0.2), blobs(4), 4, progress=False)
    assert deaf.noisy_psnr == pytest.approx([deaf.psnr] * 4) and deaf.noise_loss == pytest.approx(0, abs=1e-9)


def test_a_image_given_back_exactly_has_a_finite_psnr():
    white = images_of([np.full((16, 16, 3), 255, dtype=np.uint8)] * 2)
    report = measure(constant_vae(1.0), white, 2, progress=False)
    assert report.psnr == 100 and report.l1 == 0
    assert report.ssim == pytest.approx(1) and report.ms_ssim == pytest.approx(1)


def test_ms_ssim():
    for size in (8, 10, 11, 12, 16, 43, 44, 64, 98, 99, 128, 175, 176, 512):
        scales = ms_ssim_scales(size)
        image = torch.rand(1, 1, size, size)
        for count in range(1, 6):  # torchmetrics takes no more
            taken = True
            try:
                multiscale_structural_similarity_index_measure(image, image, betas=MS_SSIM_WEIGHTS[:count])
            except (ValueError, RuntimeError):  # too small for the window, or for its padding
                taken = False
            assert taken == (count <= scales), (size, count)
    assert [ms_ssim_scales(size) for size in (8, 16, 64, 256)] == [0, 2, 3, 5]
    # Two scales: contrast and structure of the fine one, SSIM of the coarse one.
    one, other = blobs(3).first(3), (blobs(3).first(3) + 0.2 * normal(3, 3, 16, 16)).clamp(-1, 1)
    options = {"data_range": (-1.0, 1.0), "reduction": "none"}
    _, fine = structural_similarity_index_measure(other, one, return_contrast_sensitivity=True, **options)
    halves = (torch.nn.functional.avg_pool2d(x, 2) for x in (other, one))
    coarse = structural_similarity_index_measure(*halves, **options)
    weights = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    expected = fine ** weights[0] * coarse ** weights[1]
    torch.testing.assert_close(ms_ssim(one, other, 2), expected.float(), atol=1e-3, rtol=0)
    assert expected.max() < 0.99
    report = measure(tiny_vae(), blobs(2, size=8), 2, progress=False)
    assert report.ms_ssim is None and "MS-SSIM" not in report.table()


def test_measure_refuses():
    with pytest.raises(ValueError, match="^there are no images"):
        measure(tiny_vae(), replace_rows(blobs(2), []), 2, progress=False)
    broken = tiny_vae()
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"^the autoencoder gives values that are not finite for images 0 \.\. 1"):
        measure(broken, blobs(3), 2, progress=False)
    with pytest.raises(ValueError, match="^the autoencoder takes 3 channels and gives 1"):
        measure(tiny_vae(out_channels=1), blobs(3), 2, progress=False)


def replace_rows(images: CaptionedImages, rows: list[int]) -> CaptionedImages:
    return CaptionedImages(images.table.select(rows), images.config, images.channels, images.seed)


def test_metrics_that_cannot_be_had_are_named_with_the_reason():
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
    images = images_of([np.full((16, 16, 3), level, dtype=np.uint8) for level in (128, 255)])
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
        "share of dead channels": replace(report, channel_information=[2.0, 0.0099, 0.0, 2.0]),
        "scale error": replace(report, latent_std=5.5),
        "noise loss": replace(report, noisy_psnr=[report.psnr - x for x in (1, 3.1, 6, 9)]),
    }
    for name, changed in bad.items():
        failed = [check for check in verdict(changed, Thresholds(min_psnr=20.0)) if not check.passed]
        assert [check.name for check in failed] == [name]
        assert failed[0].reason.startswith(f"{name} is ") and "wanted is" in failed[0].reason
    (check,) = (c for c in verdict(bad["scale error"], Thresholds()) if not c.passed and c.name == "scale error")
    assert check.value == 4.5 and check.threshold == 0.2 and "standard deviation 5.50" in check.reason
    assert replace(report, latent_mean=-0.15, latent_std=1.0).scale_error == pytest.approx(0.15)
    assert not replace(report, latent_mean=-0.15).unit_scale and report.unit_scale
    # At the threshold itself a check is passed.
    exact = Thresholds(report.psnr, report.ssim, 0.0, report.scale_error, report.noise_loss)
    assert all(check.passed for check in verdict(report, exact))
    assert all(check.passed for check in verdict(bad["PSNR"], NOTHING_ASKED))


def test_untrained_fails_the_default_thresholds():
    vae = AutoencoderKL.from_config(tiny_vae(scaling_factor=1.0).config, seed=0)
    checks = {c.name: c.passed for c in verdict(measure(vae, blobs(8), 8, progress=False), Thresholds())}
    assert not checks["PSNR"] and not checks["SSIM"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_psnr": math.nan}, "^min_psnr is nan, must be a finite number$"),
        ({"max_dead_channels": 25.0}, r"^max_dead_channels is 25, a share: must be in 0 \.\. 1$"),
    ],
)
def test_thresholds_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**values)


def test_the_command_line_has_the_same_defaults():
    parser = argparse.ArgumentParser()
    add_evaluate_vae(parser)
    parsed = parser.parse_args(["run"])
    assert Thresholds(**{key.name: getattr(parsed, key.name) for key in fields(Thresholds)}) == Thresholds()
    assert set(parser.parse_args(["run", "--metrics", "lpips", "fid", "kid"]).metrics) == set(EXTRA_METRICS)


# --- the command ---


def write_run(folder: Path, vae: AutoencoderKL, *overrides: str) -> Path:
    """What stage 1 leaves: the autoencoder and its config."""
    data = ["data.size=16", "data.limit=24", "data.holdout=4", "model.sample_size=16", *overrides]
    vae.save_pretrained(folder)
    (folder / "config.yaml").write_text(to_yaml(load_config(VAETrainingConfig, CONFIGS / "vae.yaml", data)))
    return folder


LENIENT = ["--min-psnr", "0", "--min-ssim", "-1", "--max-scale-error", "99", "--max-noise-loss", "99"]


def test_the_command_writes_a_report_that_stage_2_heeds(tmp_path, capsys):
    run, log = write_run(tmp_path / "run", tiny_vae()), tmp_path / "LOG.md"
    refuse_unfit(run, accept=False)  # no report: nothing to say
    main(["evaluate-vae", str(run), "--no-progress", "--device", "cpu", "--batch-size", "3", "--log", str(log)])
    printed = capsys.readouterr().out
    assert "Measured on the 4 held-out images of 'embedded', 16 px." in printed
    assert "Verdict: UNFIT for stage 2, " in printed and "FAILED: PSNR is " in printed
    assert log.read_text().startswith("\n## 20") and "Verdict: UNFIT" in log.read_text()
    names = {"vae_report.json", "vae_report.png", "latent_preview.json"}
    assert all(str(run / name) in printed for name in names)
    assert {path.name for path in run.iterdir()} == names | {
        "config.json",
        "config.yaml",
        "diffusion_pytorch_model.safetensors",
    }
    with Image.open(run / "vae_report.png") as table:
        assert table.height > 3 * 128 and table.width > 3 * 128
    assert LatentPreview.load(run).weights.shape == (3, 4)

    # The file holds the same report, exactly.
    values = json.loads((run / "vae_report.json").read_text())
    result = evaluate_run(run, Thresholds(), batch_size=3, device="cpu", progress=False)
    assert VAEReport(**values["report"]) == result.report
    assert Thresholds(**values["thresholds"]) == Thresholds()
    assert [check["passed"] for check in values["checks"]] == [check.passed for check in result.checks]
    assert values["fit"] is result.fit is False

    with pytest.raises(ValueError, match=r"vae_report\.json: the autoencoder is unfit for stage 2: PSNR is ") as error:
        refuse_unfit(run, accept=False)
    assert "allow_unfit_vae=true" in str(error.value) and "\n" not in str(error.value)
    refuse_unfit(run, accept=True)
    tiny_vae(seed=1).save_pretrained(run)  # other weights: the report is not theirs
    refuse_unfit(run, accept=False)
    tiny_vae().save_pretrained(run)  # the same ones again
    with pytest.raises(ValueError, match="unfit"):
        refuse_unfit(run, accept=False)

    main(["evaluate-vae", str(run), "--no-progress", "--split", "training", "--max-dead-channels", "1", *LENIENT])
    printed = capsys.readouterr().out
    assert "Measured on the 20 training images of 'embedded', 16 px." in printed
    assert "Verdict: fit for stage 2." in printed and "FAILED" not in printed
    refuse_unfit(run, accept=False)
    (run / "vae_report.json").write_text(json.dumps({"weights_sha256": values["weights_sha256"], "checks": [1]}))
    with pytest.raises(ValueError, match="is not a report of latentdiff evaluate-vae"):
        refuse_unfit(run, accept=False)


def test_without_held_out_images_it_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_vae(in_channels=1, out_channels=1), "data.holdout=0")
    main(["evaluate-vae", str(run), "--no-progress"])
    assert "the 24 training images of 'embedded' (none are held out), 16 px" in capsys.readouterr().out
    assert not (run / "latent_preview.json").exists()  # grey images have no such map
    assert (run / "vae_report.png").is_file()
    error = refusal(capsys, "evaluate-vae", str(run), "--no-progress", "--split", "held-out")
    assert "holds no images out" in error and error.count("\n") == 1


def test_of_a_pipeline_it_takes_the_autoencoder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    data = ["data.size=16", "data.limit=24", "data.holdout=4", "model.sample_size=8", f"vae={tmp_path}"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(UNetTrainingConfig, CONFIGS / "unet.yaml", data)))
    result = evaluate_run(tmp_path, Thresholds(), device="cpu", progress=False)
    assert result.files[0] == tmp_path / "vae" / "vae_report.json" and all(path.is_file() for path in result.files)
    assert "4 held-out" in result.data and not (tmp_path / "vae_report.json").exists()
    for folder in (tmp_path, tmp_path / "vae"):
        with pytest.raises(ValueError, match="unfit for stage 2"):
            refuse_unfit(folder, accept=False)


def test_the_command_refuses(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_vae())
    bare = tmp_path / "bare"
    tiny_vae().save_pretrained(bare)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "nowhere does not exist; give the folder of a run"),
        ([str(bare)], "bare has no config.yaml, which says what the images are; give --config"),
        ([str(tmp_path)], "config.json does not exist"),
        ([str(run), "--config", str(tmp_path / "other.yaml")], "other.yaml does not exist; give --config"),
        ([str(run), "--device", "nothing"], "--device nothing: "),
        ([str(run), "--max-dead-channels", "2"], "max_dead_channels is 2, a share"),
        ([str(run), "--min-psnr", "nan"], "min_psnr is nan"),
    ]:
        error = refusal(capsys, "evaluate-vae", *arguments, "--no-progress")
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before
    assert "--batch-size" in refusal(capsys, "evaluate-vae", str(run), "--batch-size", "0")
