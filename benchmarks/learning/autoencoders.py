"""Train a named variant of the demo's autoencoder for `run.py baseline --vae`; see README.md.

python benchmarks/learning/autoencoders.py kl-0.05 --out saved/learning/vae-kl-0.05 [key=value ...]
"""

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for train_vae.py, and for this folder as benchmarks.learning

import torch
import torch.nn.functional as F
from torch import Tensor

import train_vae
from benchmarks.learning.variants import Variant
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.training.arguments import run_as_command


def equivariant() -> AbstractContextManager[object]:
    """EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509, eq. 5): half of the batches decode transformed latents.

    They are turned by a multiple of 90 degrees and, half of those, scaled to one half, and must decode to the image
    transformed alike.
    """
    choice = torch.Generator().manual_seed(0)
    forward = AutoencoderKL.forward

    def transformed(self: AutoencoderKL, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() or torch.rand((), generator=choice) < 0.5:
            return forward(self, pixels, noise)
        turns = int(torch.randint(4, (), generator=choice))
        halve = bool(torch.rand((), generator=choice) < 0.5)
        moments = self.encode(pixels)
        latents, target = (x.rot90(turns, (2, 3)) for x in (self.sample(moments, noise), pixels))
        if halve:
            latents, target = (F.interpolate(x, scale_factor=0.5, mode="area") for x in (latents, target))
        error = self.decode(latents) - target
        if halve:  # the same mean square at the size that the loss expects
            error = F.interpolate(error, scale_factor=2, mode="nearest")
        return pixels + error, moments

    return patch.object(AutoencoderKL, "forward", transformed)


VARIANTS = {
    "baseline": Variant(),
    # As many pixels as the baseline's crops.
    "whole-images": Variant(("train.crop_size=null", "train.whole_image_steps=0", "train.steps=160")),
    "eq-vae": Variant(change=equivariant),
    "kl-5e-4": Variant(("loss.kl_weight=5.0e-4",)),
    "kl-5e-2": Variant(("loss.kl_weight=5.0e-2",)),
    "channels-8": Variant(("model.latent_channels=8",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all variants")
    parser.add_argument("--base", default="configs/demo/vae.yaml", help="config of the baseline")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    arguments = parser.parse_intermixed_args()
    variant = VARIANTS[arguments.variant]
    with variant.change():
        train_vae.main([arguments.base, *arguments.overrides, *variant.overrides, f"output.folder={arguments.out}"])


if __name__ == "__main__":
    run_as_command(lambda given: main())
