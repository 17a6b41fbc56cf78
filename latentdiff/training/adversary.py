"""The discriminator of stage 1 with its optimiser, its weight against the reconstruction, and a watch over both."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from latentdiff.config import OptimizerConfig, VAELossConfig
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    synchronising,
)
from latentdiff.training.vae_objective import (
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    last_layer_gradients,
)


class Critic(nn.Module):
    """What a checkpoint keeps of the adversary: the discriminator, and the numbers that it was balanced with.

    balance: the adaptive weight, of the step before. baseline: the reconstruction error before it set in. held: 1 while
    it is kept out.
    """

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("balance", torch.zeros(()))
        self.register_buffer("baseline", torch.full((), torch.inf))
        self.register_buffer("held", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.discriminator(pixels)


class Adversary:
    """Trains a patch discriminator against the autoencoder (Isola et al. 2017; Esser et al. 2021, eq. 6-7).

    The generator's term sees the discriminator's weights as constants, the discriminator's loss sees the
    reconstructions as constants, and each optimiser has its own weights alone. The adaptive weight is that of the whole
    batch of the step before, over all processes and micro-batches, so that it does not depend on how the batch is
    shared out; in the first step it is zero, which gives the discriminator a step's start.
    """

    def __init__(
        self,
        config: VAELossConfig,
        optimizer: OptimizerConfig,
        critic: Critic,
        last_layer: Tensor,
        accelerator: Accelerator,
    ) -> None:
        self.config = config
        self.critic = critic
        self.last_layer = last_layer
        self.accelerator = accelerator
        self.max_grad_norm = optimizer.max_grad_norm
        self.model, self.optimizer = accelerator.prepare(critic, build_optimizer(critic, optimizer))
        self.grad_norm = torch.zeros((), device=accelerator.device)
        # Of the reconstruction and the adversary at the decoder's last layer, summed over the step's micro-batches
        self._gradients: Tensor | None = None
        self._held = False

    def loaded(self) -> None:
        """After a checkpoint was read: what the host knows of it."""
        self._held = bool(self.critic.held.item())

    def active(self, step: int) -> bool:
        """Whether it takes part in this step."""
        return step >= self.config.adversarial_start and not self._held

    def generator_term(
        self, reconstruction_loss: Tensor, reconstruction: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """The weighted term for the autoencoder's loss, and the bare one; `share` of the step's batch."""
        constants = {name: p.detach() for name, p in self.critic.named_parameters()}
        bare = generator_loss(self.config.adversarial, functional_call(self.critic, constants, (reconstruction,)))
        weight = self.config.adversarial_weight
        if not self.config.adversarial_adaptive:
            return weight * bare, bare
        gradients = share * torch.stack(last_layer_gradients([reconstruction_loss, bare], self.last_layer))
        self._gradients = gradients if self._gradients is None else self._gradients + gradients
        return weight * self.critic.balance * bare, bare

    def learn(self, pixels: Tensor, reconstruction: Tensor, share: float, *, last: bool) -> tuple[Tensor, Tensor]:
        """The discriminator's loss and accuracy on a micro-batch; its gradients are accumulated."""
        assert not reconstruction.requires_grad
        with synchronising(self.accelerator, self.model, last=last):
            logits = self.model(torch.cat([pixels, reconstruction.to(pixels.dtype)]))
            real, fake = logits.float().chunk(2)
            loss = discriminator_loss(self.config.adversarial, real, fake)
            backward(self.accelerator, loss, share)
        return loss.detach(), discriminator_accuracy(real.detach(), fake.detach())

    def clip(self) -> Tensor:
        """Clip the discriminator's gradients; their norm before."""
        self.grad_norm = clip_gradients(self.accelerator, self.model, self.max_grad_norm).detach().float()
        return self.grad_norm

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """An optimiser step of the discriminator, or none where `skip` is 1.0, and the balance for the next one."""
        set_learning_rate(self.optimizer, learning_rate)
        apply_gradients(self.accelerator, self.optimizer, skip)
        if self._gradients is not None:
            balance = adaptive_weight(*self.accelerator.reduce(self._gradients, reduction="mean"))
            self.critic.balance.copy_(torch.where(balance.isfinite(), balance, self.critic.balance))
            self._gradients = None

    def figures(self) -> dict[str, float]:
        """For the log; the host waits for the device."""
        return {
            "discriminator_grad_norm": self.grad_norm.item(),
            "adversarial_balance": self.critic.balance.item(),
            "discriminator_held": float(self._held),
        }

    def watch(self, step: int, reconstruction_error: float) -> str | None:
        """Look at the mean error since the last reading; a line if the discriminator is held from now on, or let go.

        It is held while the error is worse than before its start by more than `adversarial_margin`.
        """
        if step <= self.config.adversarial_start:
            self.critic.baseline.fill_(reconstruction_error)
            return None
        bound = self.critic.baseline.item() * (1 + self.config.adversarial_margin)
        held = reconstruction_error > bound
        if held == self._held:
            return None
        self._held = held
        self.critic.held.fill_(float(held))
        figures = f"step {step}: the reconstruction error is {reconstruction_error:.5f}, the bound {bound:.5f}"
        return f"{figures}; the discriminator is {'held' if held else 'let go again'}"
