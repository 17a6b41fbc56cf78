"""The learned scale of stage 1's reconstruction error: one number, with an optimiser of its own."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.config import OptimizerConfig
from latentdiff.training import loop, setup
from latentdiff.vae_losses import gaussian_nll


class LogVariance(nn.Module):
    """The logarithm of the decoder's output variance, the same for all pixels; it starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, error: Tensor) -> Tensor:
        """Reconstruction errors [B] -> their negative log-likelihoods [B], up to a constant."""
        return gaussian_nll(error, self.log_variance)


class OutputVariance:
    """Trains the output variance along: a small error makes the reconstruction weigh more against the other terms."""

    def __init__(self, optimizer: OptimizerConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.module = LogVariance().to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.module, setup.build_optimizer(self.module, optimizer))

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """An optimiser step, or none where `skip` is 1.0."""
        loop.set_learning_rate(self.optimizer, learning_rate)
        loop.apply_gradients(self.accelerator, self.optimizer, skip)
