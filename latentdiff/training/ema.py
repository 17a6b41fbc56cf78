"""EMA: the exponential moving average of a model's trainable weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.distributed import fill, whole
from latentdiff.formats.files import check_fit

ModelT = TypeVar("ModelT", bound=nn.Module)


class EMA(Generic[ModelT]):
    """average <- decay * average + (1 - decay) * weights, for every trainable parameter, in float32.

    full_copy: for a sharded model, an unsharded copy in main memory that receives the averaged weights wherever they
        are used; its own weights do not matter.
    """

    def __init__(self, model: ModelT, full_copy: ModelT | None = None) -> None:
        self.average = {name: p.detach().clone().float() for name, p in trainable(model).items()}
        self.full_copy = full_copy

    def update(self, model: nn.Module, decay: float) -> None:
        """Update the average after an optimiser step."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        lerp(self.average, weights, 1.0 - decay)

    @contextmanager
    def applied(self, model: ModelT) -> Iterator[ModelT]:
        """Within the block, an unsharded model with the averaged weights; every process calls this.

        It is the model itself, which has its own weights again afterwards, bit for bit, or the full copy.
        """
        if self.full_copy is not None:
            device = next(model.parameters()).device
            try:
                yield self.copy_to(self.full_copy.to(device))
            finally:
                self.full_copy.to("cpu")
            return
        self._exchange(model)
        try:
            yield model
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        """Swap weights and average, one tensor at a time, so that no second copy of the model is needed."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        for name, parameter in weights.items():
            average = self.average[name]
            assert parameter.dtype == average.dtype, "an exchange must lose no digits"
            own = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(own)

    def averaged_model(self, model: ModelT) -> ModelT:
        """An unsharded model with the averaged weights, permanently: the model itself, or the full copy."""
        return self.copy_to(model if self.full_copy is None else self.full_copy.to(next(model.parameters()).device))

    def copy_to(self, model: ModelT) -> ModelT:
        """Overwrite the weights of an unsharded model by the average; returns it."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        for name, parameter in weights.items():
            fill(parameter, whole(self.average[name]))
        return model

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore a saved average of the same model."""
        assert average.keys() == self.average.keys(), "the EMA is of another model"
        for name, tensor in self.average.items():
            fill(tensor, average[name])


@torch.no_grad()
def lerp(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], amount: float) -> None:
    """Move each average by `amount` of the way to the weight of the same name, in float32 and in place."""
    step = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
    step(list(averages.values()), [weights[name].float() for name in averages], amount)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Overwrite exactly the trained parameters; place: where the weights are from. ValueError if they do not fit."""
    check_fit(trainable(model), weights, place)
    model.load_state_dict(weights, strict=False)


def make_full_copy(model: ModelT, accelerator: Accelerator) -> ModelT | None:
    """Before a model is sharded (FSDP2), an unsharded copy in main memory for the averaged weights; else None."""
    return copy.deepcopy(model).to("cpu") if accelerator.is_fsdp2 else None


def ema_decay_at(step: int, decay: float) -> float:
    """The EMA's decay after optimiser step `step` (0-based): (1 + n) / (10 + n) for n = step + 1, up to `decay`.

    The warm-up keeps the average from being the random starting weights in a run shorter than 1 / (1 - decay) steps.
    """
    n = step + 1
    return min(decay, (1 + n) / (10 + n))
