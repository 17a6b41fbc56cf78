"""Time of a training step of each stage in fp32 and bf16, with channels-first and channels-last memory layout.

python benchmarks/precision_and_layout.py configs/demo [--device cuda] [--rounds 5] [--threads 1]

Prints the seconds per step (forward and backward, the fastest of all rounds) and the speed-up over fp32 with channels
first. Every round runs all four variants, so that other load on the machine affects them equally.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff import AutoencoderKL, UNet
from latentdiff.config import TrainConfig, UNetTrainingConfig, VAETrainingConfig, load_config

VARIANTS = [(precision, layout) for precision in ("fp32", "bf16") for layout in ("channels first", "channels last")]
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="folder with vae.yaml and unet.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.device}, {arguments.threads} thread(s), torch {torch.__version__}")
    print("| model | batch | precision | layout | s / step | speed-up |\n|---|---|---|---|---|---|")

    stage_1 = load_config(VAETrainingConfig, arguments.recipe / "vae.yaml")
    shape, batch = stage_1.data.shape, micro_batch(stage_1.train)
    grid = [side // stage_1.model.downsampling for side in shape]
    pixels = torch.randn(batch, stage_1.model.in_channels, *shape)
    noise = torch.randn(batch, stage_1.model.latent_channels, *grid)
    compare("VAE", lambda: AutoencoderKL.from_config(stage_1.model, 0), (pixels, noise), arguments)

    stage_2 = load_config(UNetTrainingConfig, arguments.recipe / "unet.yaml")
    batch = micro_batch(stage_2.train)
    tokens = (stage_2.text.config or {}).get("max_position_embeddings", 77)
    latents = torch.randn(batch, stage_2.model.in_channels, *grid)
    timesteps = torch.arange(batch) * 1000 // batch
    context = torch.randn(batch, tokens, stage_2.model.cross_attention_dim)
    compare("UNet", lambda: UNet.from_config(stage_2.model, 0), (latents, timesteps, context), arguments)


def micro_batch(train: TrainConfig) -> int:
    """The images of a micro-batch; with "auto" or null, of the whole batch."""
    return train.micro_batch_size if isinstance(train.micro_batch_size, int) else train.batch_size


def compare(
    name: str, build: Callable[[], nn.Module], inputs: tuple[Tensor, ...], settings: argparse.Namespace
) -> None:
    """Time the four variants of one model and print a row for each."""
    steps = {variant: make_step(build(), inputs, *variant, settings.device) for variant in VARIANTS}
    seconds = {variant: float("inf") for variant in VARIANTS}
    for round_number in range(settings.rounds + 1):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            if settings.device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_number > 0:  # round 0 is the warm-up
                seconds[variant] = min(seconds[variant], time.perf_counter() - start)
    for variant in VARIANTS:
        ratio = seconds[VARIANTS[0]] / seconds[variant]
        print(f"| {name} | {len(inputs[0])} | {variant[0]} | {variant[1]} | {seconds[variant]:.3f} | {ratio:.2f} |")


def make_step(
    model: nn.Module, inputs: tuple[Tensor, ...], precision: str, layout: str, device: str
) -> Callable[[], None]:
    """A function that runs one forward and backward pass of `model`."""
    model.to(device, memory_format=LAYOUTS[layout])
    moved = [value.to(device) for value in inputs]

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(*moved)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
