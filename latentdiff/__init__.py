"""Train a text-to-image latent diffusion model from scratch, and use it anywhere."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
    from latentdiff.diffusion.objective import Objective, diffusion_loss
    from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
    from latentdiff.diffusion.schedule import NoiseSchedule
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.models.text_encoder import TextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer
    from latentdiff.models.unet import UNet
    from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline

_MODULES = {
    "AutoencoderKL": "latentdiff.models.autoencoder",
    "CLIPTokenizer": "latentdiff.models.tokenizer",
    "GenerationDefaults": "latentdiff.pipeline",
    "LatentDiffusionPipeline": "latentdiff.pipeline",
    "NoiseSchedule": "latentdiff.diffusion.schedule",
    "Objective": "latentdiff.diffusion.objective",
    "SAMPLERS": "latentdiff.diffusion.samplers",
    "TextEncoder": "latentdiff.models.text_encoder",
    "UNet": "latentdiff.models.unet",
    "UNetTrainingConfig": "latentdiff.config",
    "VAETrainingConfig": "latentdiff.config",
    "diffusion_loss": "latentdiff.diffusion.objective",
    "get_sampler": "latentdiff.diffusion.samplers",
    "load_config": "latentdiff.config",
}

__all__ = [
    "SAMPLERS",
    "AutoencoderKL",
    "CLIPTokenizer",
    "GenerationDefaults",
    "LatentDiffusionPipeline",
    "NoiseSchedule",
    "Objective",
    "TextEncoder",
    "UNet",
    "UNetTrainingConfig",
    "VAETrainingConfig",
    "__version__",
    "diffusion_loss",
    "get_sampler",
    "load_config",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import latentdiff` does not import torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
