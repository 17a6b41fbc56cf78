"""Train a text-to-image latent diffusion model from nothing, and use it anywhere."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.models.unet import UNet
    from latentdiff.pipeline import LatentDiffusionPipeline

__all__ = ["AutoencoderKL", "LatentDiffusionPipeline", "UNet", "__version__"]

_HOME = {
    "AutoencoderKL": "latentdiff.models.autoencoder",
    "LatentDiffusionPipeline": "latentdiff.pipeline",
    "UNet": "latentdiff.models.unet",
}


def __getattr__(name: str) -> object:
    """Import the three public classes on first use, so that asking for the version does not import torch (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
