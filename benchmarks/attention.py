"""Attention, 1x1 convolutions and upsampling on a device: which implementation is faster at which size.

python benchmarks/attention.py [--step configs/demo] [--device cuda] [--rounds 5] [--threads 1]

Prints, for forward and backward and for forward alone, how many times faster softmax(q k^T) v in plain products is than
`F.scaled_dot_product_attention`, a 1x1 convolution as a product over tokens than the convolution, a linear layer as
the convolution of `latentdiff.models.layers.linear` than the product, and upsampling with its convolution as the one
operation of `upsample_convolution` than as two. Both run in turn in each round, so that other load on the machine
affects them equally. `latentdiff.models.layers` follows the result.
With --step it does the same for a whole training step (forward and backward) of the UNet of a recipe folder.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from precision_and_layout import LAYOUTS, micro_batch
from torch import Tensor

from latentdiff import UNet
from latentdiff.config import UNetTrainingConfig, load_config, shape_of
from latentdiff.models import layers
from latentdiff.models.layers import plain_attention

# batch, heads, tokens, context tokens, channels of a head
ATTENTION = [
    (64, 4, 24, 24, 32),
    (32, 2, 16, 16, 96),
    (32, 2, 16, 32, 96),
    (8, 8, 16, 77, 160),
    (32, 2, 64, 64, 64),
    (32, 2, 64, 32, 64),
    (32, 8, 64, 77, 40),
    (8, 8, 64, 64, 80),
    (32, 1, 256, 256, 64),
    (16, 8, 256, 256, 40),
    (16, 8, 256, 77, 40),
    (2, 8, 1024, 1024, 40),
    (2, 8, 1024, 77, 40),
    (2, 2, 1024, 32, 64),
    (2, 8, 16, 16, 96),
    (2, 8, 64, 77, 40),
]
# The alternatives in a whole step: names in `layers` and what stands in for them.
PLAIN = {"attention": plain_attention}
SDPA = {"attention": F.scaled_dot_product_attention}
PRODUCTS, CONVOLUTIONS = ({"multiplies_tokens": lambda device, answer=answer: answer} for answer in (True, False))
ALTERNATIVES = {
    "SDPA, convolutions": SDPA | CONVOLUTIONS,
    "plain attention": PLAIN | CONVOLUTIONS,
    "products over tokens": SDPA | PRODUCTS,
    "both": PLAIN | PRODUCTS,
    "as the package chooses": {},
    "the same, upsampling in two": {"transposes_upsampling": lambda x: False},
}
# batch, channels, side
PROJECTIONS = [(32, 192, 4), (32, 128, 8), (32, 192, 8), (32, 320, 8), (32, 128, 16), (16, 320, 32), (2, 320, 64)]
# rows, input and output features of linear layers
LINEAR = [
    (128, 128, 128),
    (256, 64, 64),
    (256, 128, 128),
    (256, 1280, 10240),
    (512, 192, 1536),
    (512, 1280, 1280),
    (2048, 640, 640),
    (2048, 640, 5120),
    (8192, 320, 320),
    (8192, 1280, 320),
]
# batch, channels, side before
UPSAMPLED = [
    (16, 64, 16),
    (16, 64, 32),
    (8, 192, 8),
    (64, 192, 4),
    (64, 192, 8),
    (64, 128, 8),
    (2, 640, 32),
    (2, 1280, 16),
    (4, 1280, 16),
    (1, 512, 64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", type=Path, help="a folder with unet.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.device}, {arguments.threads} thread(s), torch {torch.__version__}")
    if arguments.step is not None:
        compare_steps(arguments.step, arguments)
        return

    print("| attention: batch x heads x tokens x context x channels | precision | plain, training | forward |")
    print("|---|---|---|---|")
    for batch, heads, tokens, context, channels in ATTENTION:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = [(batch, heads, n, channels) for n in (tokens, context, context)]
            values = [torch.randn(s, device=arguments.device, dtype=dtype, requires_grad=True) for s in shapes]
            pair = (F.scaled_dot_product_attention, plain_attention)
            row = [f"{ratio(*pair, values, backward, arguments):.2f}" for backward in (True, False)]
            print(f"| {batch} x {heads} x {tokens} x {context} x {channels} | {dtype} | {' | '.join(row)} |")

    print("\n| 1x1 convolution: batch x channels x side | precision | as a product, training | forward |")
    print("|---|---|---|---|")
    for batch, channels, side in PROJECTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = [(batch, channels, side, side), (channels, channels, 1, 1), (channels,)]
            values = [torch.randn(s, device=arguments.device, dtype=dtype, requires_grad=True) for s in shapes]
            pair = (convolved, multiplied)
            row = [f"{ratio(*pair, values, backward, arguments):.2f}" for backward in (True, False)]
            print(f"| {batch} x {channels} x {side} | {dtype} | {' | '.join(row)} |")

    print("\n| linear layer: rows x features x features | precision | as a convolution, training | forward |")
    print("|---|---|---|---|")
    for rows, width, out in LINEAR:
        shapes = [(rows, width), (out, width), (out,)]
        values = [torch.randn(s, device=arguments.device, requires_grad=True) for s in shapes]
        row = [f"{ratio(F.linear, as_convolution, values, backward, arguments):.2f}" for backward in (True, False)]
        print(f"| {rows} x {width} x {out} | torch.float32 | {' | '.join(row)} |")

    print("\n| upsampling: batch x channels x side | precision | layout | transposed, training | forward |")
    print("|---|---|---|---|---|")
    for batch, channels, side in UPSAMPLED:
        for dtype in (torch.float32, torch.bfloat16):
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(batch, channels, side, side, device=arguments.device, dtype=dtype)
                weight = torch.randn(channels, channels, 3, 3, device=arguments.device, dtype=dtype) / channels
                values = [x.to(memory_format=memory_format), weight.to(memory_format=memory_format), weight[:, 0, 0, 0]]
                values = [value.detach().requires_grad_() for value in values]
                pair = (upsampled_in_two, layers.upsample_convolution)
                row = [f"{ratio(*pair, values, backward, arguments):.2f}" for backward in (True, False)]
                print(f"| {batch} x {channels} x {side} | {dtype} | {layout} | {' | '.join(row)} |", flush=True)


def upsampled_in_two(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def as_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`layers.linear` where it chooses a convolution."""
    with patch.object(layers, "convolves_products", lambda _: True):
        return layers.linear(x, weight, bias)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C]."""
    return F.conv2d(x, weight, bias).flatten(2).transpose(1, 2)


def multiplied(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C]."""
    return F.linear(x.flatten(2).transpose(1, 2), weight.flatten(1), bias)


def ratio(
    first: Callable[..., Tensor],
    second: Callable[..., Tensor],
    values: list[Tensor],
    backward: bool,
    settings: argparse.Namespace,
) -> float:
    """The time of the first over that of the second: the fastest of all rounds of each."""
    best = {first: float("inf"), second: float("inf")}
    repeats = 1
    for _ in range(settings.rounds + 1):  # the first round is the warm-up, and never the fastest
        for function in best:
            start = time.perf_counter()
            for _ in range(repeats):
                if backward:
                    torch.autograd.grad(function(*values).float().square().mean(), values)
                else:
                    with torch.no_grad():
                        function(*values)
            if settings.device.startswith("cuda"):
                torch.cuda.synchronize()
            best[function] = min(best[function], (time.perf_counter() - start) / repeats)
        repeats = min(10, max(1, int(0.2 / best[first])))
    return best[first] / best[second]


def compare_steps(recipe: Path, settings: argparse.Namespace) -> None:
    """Time a training step of the recipe's UNet with each of the ALTERNATIVES; print ratios to the first of them."""
    config = load_config(UNetTrainingConfig, recipe / "unet.yaml")
    unet = UNet.from_config(config.model, 0).to(settings.device)
    assert config.model.sample_size is not None
    batch, grid = micro_batch(config.train), shape_of(config.model.sample_size)
    words = (config.text.config or {}).get("max_position_embeddings", 77)
    latents = torch.randn(batch, config.model.in_channels, *grid, device=settings.device)
    timesteps = torch.arange(batch, device=settings.device) * 1000 // batch
    context = torch.randn(batch, words, config.model.cross_attention_dim, device=settings.device)

    def step(precision: str) -> None:
        with torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=precision == "bf16"):
            output = unet(latents, timesteps, context)
        output.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()

    print(f"| precision | layout | s / step: {' | '.join(ALTERNATIVES)} |\n|---|---|{'---|' * len(ALTERNATIVES)}")
    for precision in ("fp32", "bf16"):
        for layout, memory_format in LAYOUTS.items():
            unet.to(memory_format=memory_format)
            best = dict.fromkeys(ALTERNATIVES, float("inf"))
            for round_number in range(settings.rounds + 1):
                for name, replacements in ALTERNATIVES.items():
                    with patch.multiple(layers, **replacements) if replacements else nullcontext():
                        start = time.perf_counter()
                        step(precision)
                        if round_number > 0:  # round 0 is the warm-up
                            best[name] = min(best[name], time.perf_counter() - start)
            first, *others = best.values()
            cells = [f"{first:.3f}", *(f"{first / value:.2f}x" for value in others)]
            print(f"| {precision} | {layout} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
