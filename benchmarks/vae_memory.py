"""Peak memory and time of a training step of the full-size autoencoder with batch size 1, in several modes.

python benchmarks/vae_memory.py [--size 512] [--steps 2] [--threads 1] [--device cpu]

Each mode runs in its own process: forward, loss, backward and a step of the optimiser that stage 1 uses. On a CPU the
peak is the maximum resident set size, which includes Python and its libraries (the first row shows these alone). On a
GPU it is the memory that torch allocated.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from latentdiff import AutoencoderKL
from latentdiff.config import VAETrainingConfig, load_config
from latentdiff.training.optimizer import build_optimizer

CONFIG = Path(__file__).parent.parent / "configs" / "systems" / "pokemon-512" / "vae.yaml"
MODES = {
    "libraries alone": (),
    "float32": ("step",),
    "float32, checkpointing": ("step", "checkpointing"),
    "bf16": ("step", "bf16"),
    "bf16, checkpointing": ("step", "bf16", "checkpointing"),
    "bf16, checkpointing, crops of half the size": ("step", "bf16", "checkpointing", "crop"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=MODES, help="measure one mode in this process")
    arguments = parser.parse_args()
    if arguments.mode is not None:
        measure(arguments)
        return
    print(f"{arguments.device}, {arguments.threads} thread(s), torch {torch.__version__}, {arguments.size} px, batch 1")
    print("| mode | peak memory, GB | seconds per step |\n|---|---|---|")
    options = [f"--{name}={getattr(arguments, name)}" for name in ("size", "steps", "threads", "device")]
    for mode in MODES:
        done = subprocess.run(
            [sys.executable, __file__, *options, "--mode", mode], capture_output=True, text=True, check=True
        )
        print(f"| {mode} | {done.stdout.strip()} |", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Print the peak memory in GB and the seconds of the fastest step."""
    torch.set_num_threads(arguments.threads)
    device, parts = torch.device(arguments.device), MODES[arguments.mode]
    seconds = float("nan")
    if "step" in parts:
        config = load_config(VAETrainingConfig, CONFIG)
        vae = AutoencoderKL.from_config(config.model, 0).to(device)
        vae.enable_gradient_checkpointing("checkpointing" in parts)
        optimizer = build_optimizer(vae, config.optimizer)
        size = arguments.size // 2 if "crop" in parts else arguments.size
        pixels = torch.randn(1, 3, size, size, device=device).clamp(-1, 1)
        noise = torch.randn(1, 4, size // 8, size // 8, device=device)
        times = []
        for _ in range(arguments.steps):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in parts):
                reconstruction, moments = vae(pixels, noise)
            loss = (reconstruction.float() - pixels).square().mean() + 1e-6 * moments.float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds = min(times)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(f"{peak / 1e9:.2f} | {seconds:.1f}")


if __name__ == "__main__":
    main()
