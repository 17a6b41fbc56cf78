"""The exponential moving average of a model's trainable weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.training.sharding import fill, whole


class EMA:
    """average <- decay * average + (1 - decay) * weights, for every trainable parameter, in float32.

    `spare` is a second, whole copy of the model in main memory, for a model whose weights are spread over processes:
    then it, not the model, takes the averaged weights wherever they are used. Its own weights do not matter.
    """

    def __init__(self, model: nn.Module, spare: nn.Module | None = None) -> None:
        self.average = {name: p.detach().clone().float() for name, p in trainable(model).items()}
        self.spare = spare

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Take in the weights after an optimiser step."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        torch._foreach_lerp_(list(self.average.values()), [p.float() for p in weights.values()], 1.0 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block, a whole model with the averaged weights; every process calls this.

        It is the model itself, which afterwards has its own weights again, bit for bit, or the spare one.
        """
        if self.spare is not None:
            device = next(model.parameters()).device
            try:
                yield self.copy_to(self.spare.to(device))
            finally:
                self.spare.to("cpu")
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

    def publish(self, model: nn.Module) -> nn.Module:
        """A whole model with the averaged weights, for good: the model itself, or the spare one."""
        return self.copy_to(model if self.spare is None else self.spare.to(next(model.parameters()).device))

    def copy_to(self, model: nn.Module) -> nn.Module:
        """Overwrite the weights of a whole model by the average; returns it."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the EMA is of another model"
        for name, parameter in weights.items():
            fill(parameter, whole(self.average[name]))
        return model

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Take over a saved average of the same model."""
        assert average.keys() == self.average.keys(), "the EMA is of another model"
        for name, tensor in self.average.items():
            fill(tensor, average[name])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
