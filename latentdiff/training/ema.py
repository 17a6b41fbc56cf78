"""The exponential moving average of a model's trainable weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay * average + (1 - decay) * weights, for every trainable parameter, in float32."""

    def __init__(self, model: nn.Module) -> None:
        self.average = {name: p.detach().clone().float() for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Take in the weights after an optimiser step."""
        weights = _trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        torch._foreach_lerp_(list(self.average.values()), [p.float() for p in weights.values()], 1.0 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit."""
        weights = _trainable(model)
        own = {name: p.detach().clone() for name, p in weights.items()}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(own, weights)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the average."""
        _copy(self.average, _trainable(model))

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Take over a saved average of the same model."""
        _copy(average, self.average)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    assert source.keys() == target.keys(), "the EMA is of another model"
    for name, tensor in target.items():
        tensor.copy_(source[name])
