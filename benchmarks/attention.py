"""Attention and 1x1 convolutions on a device: which implementation is faster at which size.

python benchmarks/attention.py [--device cuda] [--rounds 5] [--threads 1]

Prints, for forward and backward and for forward alone, how many times faster softmax(q k^T) v in plain products is than
`F.scaled_dot_product_attention`, and a 1x1 convolution as a product over tokens than the convolution. Both run in turn
in each round, so that other load on the machine affects them equally. `latentdiff.models.layers` follows the result.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.models.layers import plain_attention

# batch, heads, tokens, context tokens, channels of a head
ATTENTION = [
    (32, 2, 16, 16, 96),
    (32, 2, 16, 32, 96),
    (32, 2, 64, 64, 64),
    (32, 2, 64, 32, 64),
    (32, 8, 64, 77, 40),
    (32, 1, 256, 256, 64),
    (16, 8, 256, 256, 40),
    (16, 8, 256, 77, 40),
    (2, 8, 1024, 1024, 40),
    (2, 8, 1024, 77, 40),
    (2, 8, 16, 16, 96),
    (2, 8, 64, 77, 40),
]
# batch, channels, side
PROJECTIONS = [(32, 192, 4), (32, 128, 8), (32, 192, 8), (32, 320, 8), (32, 128, 16), (16, 320, 32), (2, 320, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.device}, {arguments.threads} thread(s), torch {torch.__version__}")

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
    repeats = 10
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
            best[function] = min(best[function], time.perf_counter() - start)
    return best[first] / best[second]


if __name__ == "__main__":
    main()
