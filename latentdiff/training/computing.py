"""What the forward and backward pass of a training run through, by train.weights and train.compile."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from latentdiff.config import Compile, TrainConfig
from latentdiff.models.compiling import compile_network
from latentdiff.models.layers import without_autocast

CAST_TOGETHER = 64  # gradients; PyTorch's multi-tensor kernels take about as many tensors in one launch


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """What a run computes with and its optimiser, on the accelerator's processes.

    FSDP2 gives the network other parameters, so a compiled twin would keep the old ones: there the blocks of the
    network itself are compiled, once they are sharded.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(computing_with(network, train), optimizer)
    prepared = accelerator.prepare(network, optimizer)
    compile_network(network, train.compile)
    return prepared


def computing_with(network: nn.Module, train: TrainConfig, **options: Any) -> nn.Module:
    """The module that a run computes with; its parameters, which are trained, are the network's own.

    The network itself is not compiled: validation and samples, which have other shapes, run without.
    options: of torch.compile.
    """
    if train.weights == "bf16":
        return BF16Weights(network, compiled=train.compile, **options)
    return network if train.compile == "off" else Compiled(network, train.compile, **options)


def memory_format(train: TrainConfig, device: torch.device) -> torch.memory_format:
    """The layout of train.channels_last; on CPUs norms take long with it (docs/LOG.md)."""
    last = device.type == "cuda" if train.channels_last is None else train.channels_last
    return torch.channels_last if last else torch.contiguous_format


class Compiled(nn.Module):
    """Computes as a network does, compiled, through a twin that shares its parameters."""

    def __init__(self, network: nn.Module, how: Compile, **options: Any) -> None:
        super().__init__()
        self.network = network
        self._twin = (_twin_of(network),)  # in a tuple, as its parameters are already there
        # No CUDA graphs: the gradients would lie in their memory, and the next micro-batch would write over them.
        compile_network(self._twin[0], how, **options)

    def forward(self, *inputs: Tensor | None) -> Any:
        return self._twin[0](*inputs)


class BF16Weights(nn.Module):
    """Computes as a network does, in bfloat16, with weights that are rounded from the network's float32 ones.

    The network's own weights, the masters (Micikevicius et al. 2018, section 3.1), are the only parameters of this
    module: they receive the gradients, in float32, and are what is updated, averaged and saved. The forward and
    backward pass run through a twin of the network. Its weights are rounded from the masters in the first micro-batch
    of an optimiser step, and not in each as under autocast, which is off inside. Norms and softmax still sum in
    float32, as PyTorch's kernels do for bfloat16.
    Embeddings are looked up in the masters and then rounded: that is the same, needs no second table, and sums the
    gradients of a token in float32. On CPUs the norms keep their float32 weights too: with bfloat16 ones the kernels
    would round the statistics that the backward pass needs, which doubles the error of the gradients.

    The first micro-batch is known by the gradients that are not there yet: between steps they are cleared to None.
    """

    def __init__(self, network: nn.Module, *, compiled: Compile = "off", **options: Any) -> None:
        """network: in float32 and where it is to compute."""
        super().__init__()
        assert not any(buffer.is_floating_point() for buffer in network.buffers()), "it would stay float32"
        self.network = network
        twin = _twin_of(network)
        self._twin = (twin,)  # in a tuple, as its weights are not parameters of this module
        exact = _kept_in_float32(twin)
        self._masters: list[Tensor] = [p for p in network.parameters() if id(p) not in exact]
        self._rounded = [torch.empty_like(master, dtype=torch.bfloat16) for master in self._masters]
        weights = {id(master): tensor for master, tensor in zip(self._masters, self._rounded, strict=True)}
        trained = [master for master in self._masters if master.requires_grad]
        for first in range(0, len(trained), CAST_TOGETHER):
            some = trained[first : first + CAST_TOGETHER]
            passing_on = _RoundedWeights.apply(*some, *(weights[id(master)] for master in some))
            weights |= {id(master): tensor for master, tensor in zip(some, passing_on, strict=True)}
        on_gpu = self._masters[0].device.type == "cuda"
        if compiled == "step" and on_gpu:
            import torch._dynamo as dynamo

            for tensor in weights.values():
                dynamo.mark_static_address(tensor, guard=False)  # else a CUDA graph would copy it each time
        for module in twin.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, inputs, output: output.bfloat16())
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in weights:
                    # nn.Module takes only leaves of the graph as parameters, and these pass their gradient on.
                    module._parameters[name] = weights[id(parameter)]  # pyright: ignore[reportArgumentType]
        # A gradient leaves the memory of the CUDA graph when it is cast.
        compile_network(twin, compiled, cuda_graphs=on_gpu, **options)

    def forward(self, *inputs: Tensor | None) -> Any:
        """The network's output, as float32: a tensor or a tuple of them. Inputs of floating point are rounded too."""
        if all(master.grad is None for master in self._masters):
            with torch.no_grad():
                torch._foreach_copy_(self._rounded, self._masters)  # pyright: ignore[reportPrivateImportUsage]
        with without_autocast(self._masters[0].device):
            output = self._twin[0](*map(_in_bf16, inputs))
        return output.float() if isinstance(output, Tensor) else tuple(tensor.float() for tensor in output)


def _kept_in_float32(network: nn.Module) -> set[int]:
    """The ids of the weights of embeddings, and on CPUs of norms."""
    on_cpu = next(network.parameters()).device.type == "cpu"
    kinds = (nn.Embedding, nn.GroupNorm, nn.LayerNorm) if on_cpu else (nn.Embedding,)
    return {
        id(parameter)
        for module in network.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters(recurse=False)
    }


class _RoundedWeights(torch.autograd.Function):
    """Some rounded weights, whose gradients go to their masters. It saves no tensor, so one node serves every step.

    apply(*masters, *rounded): the gradients are cast together, when the last of them is there. One node for all
    weights would need more memory, and several processes could not average gradients while they compute others.
    """

    @staticmethod
    def forward(ctx: Any, *masters_and_rounded: Tensor) -> tuple[Tensor, ...]:
        count = len(masters_and_rounded) // 2
        ctx.set_materialize_grads(False)
        ctx.strides = [master.stride() for master in masters_and_rounded[:count]]
        # They share the memory of `rounded`, and so later changes, but are no views in the graph.
        return tuple(tensor.detach() for tensor in masters_and_rounded[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # In the layout of the master, so that it takes the tensor as it is.
        cast = [
            None if gradient is None else gradient.new_empty_strided(gradient.shape, strides, dtype=torch.float32)
            for gradient, strides in zip(gradients, ctx.strides, strict=True)
        ]
        given = [(ours, theirs) for ours, theirs in zip(cast, gradients, strict=True) if ours is not None]
        if given:
            ours, theirs = zip(*given, strict=True)
            torch._foreach_copy_(ours, theirs)  # pyright: ignore[reportPrivateImportUsage]
        return *cast, *(None for _ in gradients)


def _twin_of(network: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers with the network."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def _in_bf16(value: Tensor | None) -> Tensor | None:
    return value.bfloat16() if value is not None and value.is_floating_point() else value
