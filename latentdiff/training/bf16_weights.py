"""Computing with bfloat16 weights that are rounded from float32 ones (Micikevicius et al. 2018, section 3.1)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class BF16Weights(nn.Module):
    """Computes as a network does, in bfloat16, with weights that are rounded from the network's float32 ones.

    The network's own weights, the masters, are the only parameters of this module: they receive the gradients, in
    float32, and are what is updated, averaged and saved. The forward and backward pass run through a twin of the
    network. Its weights are rounded from the masters in the first micro-batch of an optimiser step, and not in each as
    under autocast, which is off inside. Norms and softmax still sum in float32, as PyTorch's kernels do for bfloat16.

    The first micro-batch is known by the gradients that are not there yet: between steps they are cleared to None.
    """

    def __init__(self, network: nn.Module, *, compiled: bool) -> None:
        """network: in float32 and where it is to compute. compiled: by torch.compile."""
        super().__init__()
        assert not any(buffer.is_floating_point() for buffer in network.buffers()), "it would stay float32"
        self.network = network
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        twin = copy.deepcopy(network, shared)
        self._twin = (twin,)  # in a tuple, as its weights are not parameters of this module
        self._masters: list[Tensor] = list(network.parameters())
        self._rounded = [torch.empty_like(master, dtype=torch.bfloat16) for master in self._masters]
        weights = {
            id(master): _RoundedWeight.apply(master, rounded)
            for master, rounded in zip(self._masters, self._rounded, strict=True)
        }
        for module in twin.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # nn.Module takes only leaves of the graph as parameters, and these pass their gradient on.
                    module._parameters[name] = weights[id(parameter)]
        if compiled:
            twin.compile()

    def forward(self, *inputs: Tensor | None) -> Any:
        """The network's output, as float32: a tensor or a tuple of them. Inputs of floating point are rounded too."""
        if all(master.grad is None for master in self._masters):
            with torch.no_grad():
                torch._foreach_copy_(self._rounded, self._masters)  # pyright: ignore[reportPrivateImportUsage]
        with torch.autocast(self._masters[0].device.type, enabled=False):
            output = self._twin[0](*map(_in_bf16, inputs))
        return output.float() if isinstance(output, Tensor) else tuple(tensor.float() for tensor in output)


class _RoundedWeight(torch.autograd.Function):
    """The rounded weight, whose gradient goes to its master. It saves nothing, so one node serves every step."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded.detach()  # shares its memory, and so later changes, but is no view in the graph

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.float(), None


def _in_bf16(value: Tensor | None) -> Tensor | None:
    return value.bfloat16() if value is not None and value.is_floating_point() else value
