"""The adversarial loss of stage 1: the discriminator, its optimiser, its weight against the reconstruction."""

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.func import functional_call

from latentdiff.config import AdversarialKind, OptimizerConfig, VAELossConfig
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    synchronising,
)
from latentdiff.training.vae_losses import (
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    last_layer_gradients,
)


class DiscriminatorState(nn.Module):
    """The discriminator and the numbers beside it that a checkpoint keeps.

    adaptive_weight: of the previous step. baseline: the reconstruction error before the adversarial term started.
    paused: 1 while the adversarial term is paused. grad_norm: of the discriminator's gradients, in its last step.
    """

    adaptive_weight: Tensor
    baseline: Tensor
    paused: Tensor
    grad_norm: Tensor

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self.register_buffer("baseline", torch.full((), torch.inf))
        self.register_buffer("paused", torch.zeros(()))
        self.register_buffer("grad_norm", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, C, H, W] -> logits [B, 1, h', w']."""
        return self.discriminator(pixels)


class AdversarialLoss:
    """Trains a patch discriminator against the autoencoder (Isola et al. 2017; Esser et al. 2021, eq. 6-7).

    The generator's term sees the discriminator's weights as constants, the discriminator's loss sees the
    reconstructions as constants, and each optimiser has only its own weights. The adaptive weight is that of the
    previous step's whole batch, over all processes and micro-batches, so that it does not depend on how the batch is
    split; in the first step it is zero, which gives the discriminator a head start of one step.
    """

    def __init__(
        self,
        config: VAELossConfig,
        optimizer: OptimizerConfig,
        state: DiscriminatorState,
        last_layer: Tensor,
        accelerator: Accelerator,
    ) -> None:
        """last_layer: the weight of the decoder's last layer, where gradients are compared."""
        assert config.adversarial is not None
        self.config = config
        self.kind: AdversarialKind = config.adversarial
        self.state = state
        self.last_layer = last_layer
        self.accelerator = accelerator
        self.max_grad_norm = optimizer.max_grad_norm
        self.model: nn.Module
        self.optimizer: AcceleratedOptimizer
        self.model, self.optimizer = accelerator.prepare(state, build_optimizer(state, optimizer))
        # Of the reconstruction and the adversarial term at the decoder's last layer, summed over the micro-batches.
        self._gradients: Tensor | None = None
        self._paused: bool | None = None  # the host's copy of state.paused, read when it is first needed

    @property
    def paused(self) -> bool:
        """Whether the adversarial term is paused."""
        if self._paused is None:
            self._paused = bool(self.state.paused.item())
        return self._paused

    def active(self, step: int) -> bool:
        """Whether the adversarial term takes part in this step."""
        return step >= self.config.adversarial_start and not self.paused

    def generator_term(
        self, reconstruction_loss: Tensor, reconstruction: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The weighted term for the autoencoder's loss, and the bare one.

        weight: fraction of the step's batch that this micro-batch makes up.
        """
        constants = {name: p.detach() for name, p in self.state.named_parameters()}
        bare = generator_loss(self.kind, functional_call(self.state, constants, (reconstruction,)))
        if not self.config.adversarial_adaptive:
            return self.config.adversarial_weight * bare, bare
        gradients = weight * torch.stack(last_layer_gradients([reconstruction_loss, bare], self.last_layer))
        self._gradients = gradients if self._gradients is None else self._gradients + gradients
        return self.config.adversarial_weight * self.state.adaptive_weight * bare, bare

    def learn(self, pixels: Tensor, reconstruction: Tensor, weight: float, *, last: bool) -> tuple[Tensor, Tensor]:
        """The discriminator's loss and accuracy on a micro-batch; its gradients are accumulated."""
        assert not reconstruction.requires_grad
        with synchronising(self.accelerator, self.model, last=last):
            logits = self.model(torch.cat([pixels, reconstruction.to(pixels.dtype)]))
            real, fake = logits.float().chunk(2)
            loss = discriminator_loss(self.kind, real, fake)
            backward(self.accelerator, loss, weight)
        return loss.detach(), discriminator_accuracy(real.detach(), fake.detach())

    def clip(self) -> Tensor:
        """Clip the discriminator's gradients; their norm before."""
        return self.state.grad_norm.copy_(clip_gradients(self.accelerator, self.model, self.max_grad_norm).detach())

    def step(self, lr: float, skip: Tensor) -> None:
        """An optimiser step of the discriminator, or none where `skip` is 1.0, and the next adaptive weight."""
        set_learning_rate(self.optimizer, lr)
        apply_gradients(self.accelerator, self.optimizer, skip)
        if self._gradients is not None:
            weight = adaptive_weight(*self.accelerator.reduce(self._gradients, reduction="mean"))
            previous = self.state.adaptive_weight
            previous.copy_(torch.where(weight.isfinite(), weight, previous))
            self._gradients = None

    def values(self) -> dict[str, float]:
        """Values for the log; the host waits for the device."""
        return {
            "discriminator_grad_norm": self.state.grad_norm.item(),
            "adaptive_weight": self.state.adaptive_weight.item(),
            "adversarial_paused": float(self.paused),
        }

    def update_pause(self, step: int, reconstruction_error: float) -> str | None:
        """Pause the adversarial term while the reconstruction is much worse than before it started.

        reconstruction_error: mean since the last log line, after `step` finished steps. It is paused while this is more
        than `adversarial_margin` above its last value before the start. Returns a message when that changes.
        """
        if step <= self.config.adversarial_start:
            self.state.baseline.fill_(reconstruction_error)
            return None
        bound = self.state.baseline.item() * (1 + self.config.adversarial_margin)
        paused = reconstruction_error > bound
        if paused == self.paused:
            return None
        self._paused = paused
        self.state.paused.fill_(float(paused))
        errors = f"step {step}: the reconstruction error is {reconstruction_error:.5f}, the bound {bound:.5f}"
        return f"{errors}; the adversarial term is {'paused' if paused else 'resumed'}"
