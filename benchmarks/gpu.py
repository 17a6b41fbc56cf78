"""What a GPU makes of the project, in one run of under eight minutes: speed, memory, bitwise resume, its tests.

python benchmarks/gpu.py [--out gpu.json] [--parts steps image decode resume tests] [--seconds 420]
python benchmarks/gpu.py --device cpu --tiny      # every part with tiny networks: whether this script works

- steps: optimiser steps of stage 2 at Stable Diffusion 1 size, 64x64 latents, for train.weights x train.compile;
  images/s, the share of the device's published peak, seconds until the second step, peak memory. Beside them diffusers'
  training step (its UNet, bf16 autocast, channels_last, fused AdamW, its EMA), if diffusers is installed.
- image: 20 guided steps and the decoder in bf16, one image of 512 px: eager, compiled by blocks, and whole.
- decode: the decoder alone. resume: a tiny run that is cut off goes on bit for bit. tests: pytest -m gpu.

Weights are random, nothing is read from the network. Each measurement is a process of its own with a time limit; one
that fails or takes too long is reported and the others go on. Without time left, the rest is skipped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {"sample_size": 512, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TINY_UNET = {"sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "cross_attention_dim": 16}
TINY_UNET |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1}
TINY_UNET |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2}
TINY_VAE = {"sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
TINY_VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
HOWS = ("off", "blocks", "step")
# What is measured, the most important first: part, arguments, limit in seconds.
MEASUREMENTS = [
    *[("steps", ("bf16", how), limit) for how, limit in zip(HOWS, (40, 90, 150), strict=True)],
    *[("image", (how,), limit) for how, limit in zip(HOWS, (40, 90, 120), strict=True)],
    ("steps", ("diffusers", "off"), 60),
    ("resume", (), 90),
    ("tests", (), 90),
    ("decode", (), 40),
    *[("steps", ("float32", how), limit) for how, limit in zip(HOWS, (40, 90, 150), strict=True)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--parts", nargs="+", default=["steps", "image", "decode", "resume", "tests"])
    parser.add_argument("--seconds", type=float, default=450, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # in the processes that measure
    given = parser.parse_args()
    if given.one:
        print(json.dumps(PARTS[given.one[0]](given, *given.one[1:])))
        return
    start, results = time.monotonic(), []
    print("| part | setting | result |\n|---|---|---|", flush=True)
    for part, arguments, limit in MEASUREMENTS:
        if part not in given.parts:
            continue
        left = given.seconds - (time.monotonic() - start)
        found = measured(given, part, arguments, min(limit, left)) if left > 5 else {"failed": "no time left"}
        results.append({"part": part, "setting": " ".join(arguments), **found})
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
        print(f"| {part} | {' '.join(arguments)} | {text.replace('|', '/')} |", flush=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s in all; {given.out}")
    if any("failed" in result for result in results):
        sys.exit(1)


def measured(given: argparse.Namespace, part: str, arguments: tuple[str, ...], limit: float) -> dict[str, Any]:
    """What a process of its own finds, or how it failed."""
    command = [
        sys.executable,
        __file__,
        "--device",
        given.device,
        "--batch",
        str(given.batch),
        "--one",
        part,
        *arguments,
    ]
    command += ["--tiny"] if given.tiny else []
    limit = limit if given.device == "cuda" else 4 * limit  # compilers for the CPU are slow
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # and the compiler's own processes
        process.communicate()
        return {"failed": f"took more than {limit:.0f} s"}
    lines = output.strip().splitlines()
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"failed": (errors.strip().splitlines() or [f"status {process.returncode}"])[-1][:300]}


def timed(run: Callable[[], object], device: str, seconds: float, most: int) -> tuple[float, float]:
    """Seconds until the second call can start, and the median of the later ones."""
    from latentdiff.devices import synchronize

    times: list[float] = []
    while len(times) < 4 or (sum(times[2:]) < seconds and len(times) < most):
        start = time.perf_counter()
        run()
        synchronize(device_of(device))
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[2:])


def device_of(name: str) -> Any:
    import torch

    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def memory(device: str) -> dict[str, float]:
    from latentdiff.devices import peak_memory

    peak = peak_memory(device_of(device))
    return {} if peak is None else {"peak GB": peak / 1e9}


# ----------------------------------------------------------------------------------------------------------------------
# The parts, each in a process of its own


def steps(given: argparse.Namespace, weights: str, how: Any) -> dict[str, Any]:
    """Optimiser steps of stage 2; weights: float32, bf16, or diffusers for its own training step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from latentdiff.config import OptimizerConfig, TrainConfig, UNetConfig
    from latentdiff.devices import peak_flops
    from latentdiff.diffusion.objective import diffusion_loss
    from latentdiff.diffusion.schedule import NoiseSchedule
    from latentdiff.models.text_conditioned_unet import TextConditionedUNet
    from latentdiff.models.unet import UNet
    from latentdiff.training.computing import computing_with
    from latentdiff.training.ema import EMA
    from latentdiff.training.optimizer import build_optimizer, set_learning_rate

    device, batch = device_of(given.device), 2 if given.tiny else given.batch
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    values = UNET | (TINY_UNET if given.tiny else {})
    config = UNetConfig.from_diffusers(values, "the benchmark")
    schedule = NoiseSchedule()
    side, width = values["sample_size"], values["cross_attention_dim"]
    latents, noise = (torch.randn(batch, 4, side, side, device=device) for _ in range(2))
    context = torch.randn(batch, 77, width, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)
    if weights == "diffusers":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        network: Any = UNet2DConditionModel(**values).to(device, memory_format=torch.channels_last)
        optimizer: Any = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        average: Any = EMAModel(network.parameters(), foreach=True)

        def model(x: Any, t: Any, c: Any) -> Any:
            return network(x, t, c).sample

    else:
        unet = UNet.from_config(config, 0)
        network = TextConditionedUNet(unet, None).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(network, OptimizerConfig(lr=1e-4))
        set_learning_rate(optimizer, 1e-4)
        average = EMA(network)
        model = computing_with(network, TrainConfig(steps=1, batch_size=batch, weights=weights, compile=how))  # pyright: ignore

    def step() -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            loss = diffusion_loss(model, schedule, latents, context, noise, timesteps).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if weights == "diffusers":
            average.step(network.parameters())
        else:
            average.update(network, 0.999)
        return loss.detach()

    first, each = timed(step, given.device, 0.5 if given.tiny else 4, 30)
    found: dict[str, Any] = {"images/s": batch / each, "first step s": first, "ms": 1e3 * each, **memory(given.device)}
    if not bool(step().isfinite()):
        raise ValueError("the loss is not finite")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        plain = UNet(config)
        output = plain(torch.empty(1, 4, side, side), torch.zeros(1), torch.empty(1, 77, width))
        output.sum().backward()
    flops = counter.get_total_flops()
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16", tf32=True) if given.device == "cuda" else None
    found["TFLOP/s"] = flops * batch / each / 1e12
    return found | ({} if peak is None else {"share of peak": flops * batch / each / peak})


def _pipeline(given: argparse.Namespace) -> Any:
    import torch

    from latentdiff.config import AutoencoderKLConfig, UNetConfig
    from latentdiff.diffusion.schedule import NoiseSchedule
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.models.text_encoder import TextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer
    from latentdiff.models.unet import UNet
    from latentdiff.pipeline import LatentDiffusionPipeline

    unet = UNet.from_config(UNetConfig.from_diffusers(UNET | (TINY_UNET if given.tiny else {}), "the benchmark"), 0)
    vae = AutoencoderKL.from_config(AutoencoderKLConfig.from_diffusers(VAE | (TINY_VAE if given.tiny else {}), "it"), 0)
    width, heads = (16, 2) if given.tiny else (768, 12)
    layers = {"num_hidden_layers": 2 if given.tiny else 12, "intermediate_size": 4 * width}
    text = TextEncoder.from_config({"hidden_size": width, "num_attention_heads": heads, **layers}, 0)
    pipeline = LatentDiffusionPipeline(vae, unet, text, CLIPTokenizer.load(), NoiseSchedule())
    pipeline.to(device_of(given.device), torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    return pipeline


def image(given: argparse.Namespace, how: Any) -> dict[str, Any]:
    """One image, from the prompt to pixels."""
    pipeline = _pipeline(given).compile(how)

    def run() -> None:
        pipeline("a red apple", num_inference_steps=20, guidance_scale=7.5, seed=0, progress=False)

    first, each = timed(run, given.device, 0.5 if given.tiny else 3, 20)
    return {"image ms": 1e3 * each, "first s": first, **memory(given.device)}


def decode(given: argparse.Namespace) -> dict[str, Any]:
    """The decoder in bf16, eager and compiled by blocks."""
    import torch

    from latentdiff.models.compiling import compile_network

    vae, found = _pipeline(given).vae, {}
    side = 8 if given.tiny else 64
    latents = torch.randn(1, 4, side, side, device=device_of(given.device), dtype=torch.bfloat16)

    @torch.no_grad()
    def run() -> None:
        vae.decode(latents)

    for how in ("off", "blocks"):
        compile_network(vae.decoder, how)
        _, each = timed(run, given.device, 0.5 if given.tiny else 2, 40)
        found[f"{how} ms"] = 1e3 * each
    return found | memory(given.device)


def resume(given: argparse.Namespace) -> dict[str, Any]:
    """Six steps at once, and three and three: the same weights, bit for bit. In bf16 on a GPU."""
    import shutil

    from accelerate.state import AcceleratorState
    from scripts import assert_same_weights, run_unet, run_vae

    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    extra = ["train.deterministic=true", "train.precision=auto"]
    with tempfile.TemporaryDirectory() as folder:
        vae = run_vae(Path(folder, "vae"), *extra)
        for weights in ("float32", "bf16"):
            settings = [*extra, f"train.weights={weights}"]
            whole = run_unet(Path(folder, weights, "whole"), vae, *settings)
            cut = Path(shutil.copytree(whole, Path(folder, weights, "cut")))
            shutil.rmtree(cut / "checkpoints" / "step_00000006")
            for path in cut.glob("*.json"):
                path.unlink()
            AcceleratorState._reset_state(reset_partial_state=True)
            run_unet(cut, vae, *settings)
            for name in ("model", "ema", "optimizer"):
                assert_same_weights(whole, cut, f"checkpoints/step_00000006/{name}.safetensors")
    return {"resumed": "bitwise, float32 and bf16 weights"}


def tests(given: argparse.Namespace) -> dict[str, Any]:
    """The tests that need a GPU; without one they are only collected."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if given.device == "cpu" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise SystemExit(f"{last}: {'; '.join(failed)}"[:300])
    return {"pytest": last}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": steps,
    "image": image,
    "decode": decode,
    "resume": resume,
    "tests": tests,
}


if __name__ == "__main__":
    main()
