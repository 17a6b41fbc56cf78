"""Stage 1's validation against hand-computed numbers; neither batches nor processes change what is measured.

Run as a script, this file is one process of a launch: it writes what it measured into the given folder.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_sets import noise_images
from tiny import tiny_vae
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import structural_similarity_index_measure
from two_processes import run_on_two_processes

from latentdiff.training.arguments import run_as_command
from latentdiff.training.vae_evaluation import reconstruction_grid, validate_vae


def test_validation_by_hand() -> None:
    """The MSE is of the unclamped reconstruction, PSNR and SSIM of the clamped one, the KL of unit-scale latents."""
    vae, images, rows = tiny_vae(), noise_images(5), []
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 10  # beyond [-1, 1]
        for i in range(5):
            pixels = images.pixels(i)[None]
            mean, log_variance = vae.encode(pixels).chunk(2, dim=1)
            reconstruction = vae.decode(0.7 * mean)  # the scaling factor
            clamped = reconstruction.clamp(-1, 1)
            mse = (reconstruction - pixels).square().mean().item()
            assert mse > 1.01 * (clamped - pixels).square().mean().item()
            psnr = 10 * math.log10(4 / (clamped - pixels).square().mean().item())
            ssim = structural_similarity_index_measure(clamped, pixels, data_range=(-1.0, 1.0)).item()
            posterior = Normal(0.7 * mean, 0.7 * (0.5 * log_variance).exp())
            rows.append([mse, psnr, ssim, kl_divergence(posterior, Normal(0.0, 1.0)).sum().item()])
    scores = validate_vae(vae, images, batch_size=2)
    assert list(scores) == ["mse", "psnr", "ssim", "kl"]
    assert list(scores.values()) == pytest.approx(np.mean(rows, axis=0).tolist(), rel=1e-4)


def test_reconstruction_grid_has_originals_above_reconstructions() -> None:
    images = noise_images(3)
    grid = np.asarray(reconstruction_grid(tiny_vae(), images.first(3)))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    for i in range(3):
        left = i * 18
        assert np.array_equal(grid[:16, left : left + 16], np.asarray(images.image(i)))
        assert not np.array_equal(grid[18:, left : left + 16], np.asarray(images.image(i)))


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.runs
def test_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    """Two gloo processes: the same numbers on both as without any; two processes do not divide five images evenly."""
    run_on_two_processes(__file__, tmp_path)
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    assert first == second and len(first) == 4
    assert first == pytest.approx(validate_vae(tiny_vae(), noise_images(5), 2), rel=1e-5)


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    scores = validate_vae(tiny_vae(), noise_images(5), 2, accelerator)
    (Path(folder) / f"{accelerator.process_index}.json").write_text(json.dumps(scores))
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(lambda arguments: main(*arguments))
