"""PSNR and SSIM against formulas by hand, nearest images by brute force."""

import math

import numpy as np
import pytest
import torch

from latentdiff.evaluation.metrics import nearest_images, nearest_in_batches, psnr, ssim


def noisy(scale: float, shape: tuple[int, ...] = (3, 3, 16, 16), seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    assert psnr(a, a).item() == 100  # the cap: it would be infinite


def test_ssim():
    pixels = noisy(0.3).clamp(-1, 1)
    assert ssim(pixels, pixels).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    scores = [ssim(pixels, pixels + noisy(scale, seed=1)) for scale in (0.0, 0.05, 0.2, 0.8)]
    for better, worse in zip(scores, scores[1:], strict=False):
        assert (better > worse + 0.01).all()
    other = (pixels + noisy(0.2, seed=1)).clamp(-1, 1)
    torch.testing.assert_close(ssim(pixels, other), ssim(other, pixels), atol=1e-5, rtol=0)
    # An image's score does not depend on the rest of the batch.
    torch.testing.assert_close(ssim(pixels, other)[1:2], ssim(pixels[1:2], other[1:2]), atol=1e-5, rtol=0)
    # Values beyond the range count as those at its end.
    bright = torch.ones(1, 3, 16, 16)
    assert ssim(bright, 3 * bright).item() == pytest.approx(1.0, abs=1e-5)
    # Two flat images: only the luminance term (2ab + c) / (a^2 + b^2 + c) is left, with c = (0.01 * range)^2.
    flat = ssim(torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)).item()
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 0.02**2) / (0.2**2 + 0.6**2 + 0.02**2), abs=1e-4)


def test_nearest_images_by_brute_force():
    reference = noisy(1.0, (40, 3, 8, 8))
    generated = noisy(1.0, (30, 3, 8, 8), seed=1)
    generated[3] = reference[17] + noisy(0.5, (3, 8, 8), seed=2)
    expected = [min(range(40), key=lambda i: (g - reference[i]).square().mean().item()) for g in generated]
    assert nearest_images(generated, reference).tolist() == expected
    assert expected[3] == 17 and len(set(expected)) > 3
    assert nearest_images(reference, reference).tolist() == list(range(40))
    assert nearest_in_batches(generated, reference.split(7)).tolist() == expected
