"""The named variants: each one change of the demo's config, or of how the training starts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import train_unet
from latentdiff.models.layers import initialize
from latentdiff.models.unet import UNet


@dataclass(frozen=True)
class Variant:
    """overrides: of the config. change: what no config key says, in effect within its context.

    twin: trained by diffusers' loop instead of ours.
    """

    overrides: tuple[str, ...] = ()
    change: Callable[[], AbstractContextManager[object]] = nullcontext
    twin: bool = False


def initial_unet(init_weights: Callable[[UNet, torch.Generator], None]) -> AbstractContextManager[object]:
    """New UNets get their weights from this function."""
    return patch.object(UNet, "init_weights", init_weights)


def default_weights(unet: UNet, generator: torch.Generator) -> None:
    """Those that torch gives a new layer: nothing is zero."""
    initialize(unet, (), generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        for module in unet.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


def only_output_zero(unet: UNet, generator: torch.Generator) -> None:
    """As always, but of the layers that start at zero only the last one does."""
    initialize(unet, ("conv_out",), generator)


def constant_ema_decay() -> AbstractContextManager[object]:
    """The EMA's decay is that of the config from the first step on."""
    return patch.object(train_unet, "ema_decay_at", lambda step, decay: decay)


DISPERSION_WEIGHT, DISPERSION_TEMPERATURE = 0.5, 0.5


def dispersion(features: Tensor) -> Tensor:
    """How close together the features [B, ...] of a batch are: the dispersive loss (Wang & He 2025, arXiv 2506.09027,
    eq. 4, squared distances per dimension).
    """
    flat = features.float().flatten(1)
    distances = torch.nn.functional.pdist(flat).square() / flat.shape[1]
    both_ways = torch.cat([distances, distances, distances.new_zeros(len(flat))])  # each with each, and with itself
    return (-both_ways / DISPERSION_TEMPERATURE).exp().mean().log()


@contextmanager
def dispersive() -> Iterator[None]:
    """The loss of a step gets the dispersion of the middle block's output added."""
    original = train_unet.diffusion_loss

    def loss(model: nn.Module, *values: Any) -> Tensor:
        middle: list[Tensor] = []
        block = next(module for name, module in model.named_modules() if name.endswith("unet.mid_block"))
        hook = block.register_forward_hook(lambda module, inputs, output: middle.append(output))
        try:
            errors = original(model, *values)
        finally:
            hook.remove()
        return errors + DISPERSION_WEIGHT * dispersion(middle[0])

    with patch.object(train_unet, "diffusion_loss", loss):
        yield


# What the twin's script trains with.
ADAMW = ("optimizer.kind=adamw", "optimizer.lr=1.0e-3")
VARIANTS: dict[str, Variant] = {
    "baseline": Variant(),
    "twin": Variant((*ADAMW, "text.token_std=null"), twin=True),
    "twin-token-scale-0.2": Variant(ADAMW, twin=True),
    "default-init": Variant(change=partial(initial_unet, default_weights)),
    "zero-conv-out-only": Variant(change=partial(initial_unet, only_output_zero)),
    "token-scale-0.02": Variant(("text.token_std=0.02",)),
    "no-text-layers": Variant(("text.config.num_hidden_layers=0",)),
    "one-text-layer": Variant(("text.config.num_hidden_layers=1",)),
    "pooled-text": Variant(("model.addition_embed_type=text", "model.addition_embed_type_num_heads=4")),
    "epsilon": Variant(("diffusion.prediction_type=epsilon",)),
    "x0": Variant(("diffusion.prediction_type=sample",)),
    "min-snr": Variant(("loss.weighting=min_snr",)),
    "dispersive": Variant(change=dispersive),
    "logit-normal": Variant(("train.timestep_density=logit_normal",)),
    "adamw": Variant(ADAMW),
    "ema-0.999": Variant(("ema.decay=0.999",)),
    "ema-0.995": Variant(("ema.decay=0.995",)),
    "no-ema-warmup": Variant(change=constant_ema_decay),
    "lr-6e-3": Variant(("optimizer.lr=6.0e-3",)),
    "lr-1.5e-3": Variant(("optimizer.lr=1.5e-3",)),
    "batch-32": Variant(("train.batch_size=32",)),
    "batch-128": Variant(("train.batch_size=128",)),
}
