"""A batch for the tests of the diffusion process, and the values of a schedule's fields."""

import torch
from torch import Tensor

BETA_SCHEDULES = ["linear", "scaled_linear", "cosine"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]


def batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise [size, 4, 8, 8] and timesteps that cover both ends."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=generator)
    return latents, noise, torch.linspace(0, 999, size).long()
