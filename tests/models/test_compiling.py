"""Compilation by blocks and as a whole: equal results, code that blocks of one kind share, names that stay."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import normal, relative_error, tiny_text_encoder, tiny_unet, tiny_vae
from torch import Tensor, fx, nn

from latentdiff.config import Compile
from latentdiff.models.compiling import BLOCKS, compile_network

# torch.compile's tracing takes seconds.
pytestmark = pytest.mark.runs


class Counting:
    """A backend that counts the graphs it is given and runs them with PyTorch's own kernels."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 4, 8, 8), torch.tensor([3, 700]), normal(2, 5, 16, seed=1)


def gradients(network: nn.Module, *given: Any) -> list[Tensor]:
    output = network(*given)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["blocks", "step"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_network(how: Compile, checkpointing: bool) -> None:
    """Output, gradients (some of them summed in another order) and names in the state dict."""
    plain = tiny_unet()
    compiled = copy.deepcopy(plain)
    compiled.enable_gradient_checkpointing(checkpointing)
    compile_network(compiled, how, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs()), plain(*inputs()))
    ours, theirs = gradients(compiled, *inputs()), gradients(plain, *inputs())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True)) and len(ours) > 50
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_blocks_of_one_kind_share_their_code() -> None:
    """In training and in sampling, where each transformer has keys and values of its own."""
    unet, count = tiny_unet(layers_per_block=3), Counting()
    compile_network(unet, "blocks", backend=count)
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    unet(*inputs())
    in_training = count.graphs
    assert in_training < len(blocks)
    unet(*inputs())
    assert count.graphs == in_training
    noisy, timesteps, context = inputs()
    with torch.no_grad():
        projected = unet.project(context)
        unet(noisy, timesteps, projected)
        transformers = count.graphs
        unet(noisy, timesteps, projected)
    assert count.graphs == transformers <= 2 * in_training


def test_every_network_has_blocks() -> None:
    """Those of the autoencoder and of the text encoder too."""
    for network, given in (
        (tiny_vae(), (normal(1, 3, 16, 16), None)),
        (tiny_text_encoder(), (torch.tensor([[49406, 320, 49407]]),)),
    ):
        count, expected = Counting(), network(*given)
        compile_network(network, "blocks", backend=count)
        output = network(*given)
        assert count.graphs >= 1
        for ours, theirs in zip(output, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_more_kinds_than_torchs_own_limit_are_compiled() -> None:
    """Eight, after which it would go on without compiling, are fewer than Stable Diffusion has."""
    unet, count = tiny_unet(), Counting()
    compile_network(unet, "step", backend=count)
    for side in range(8, 8 + 2 * 12, 2):
        unet(normal(1, 4, side, 8), torch.tensor([3]), normal(1, 5, 16))
    assert count.graphs == 12


def test_off_compiles_nothing() -> None:
    unet = tiny_unet()
    compile_network(unet, "off")
    assert all(module._compiled_call_impl is None for module in unet.modules())
