"""Memory and time of opening a pipeline's folder, in this library and in diffusers.

python benchmarks/opening.py [--rounds 3] [--folder DIR]

The folder has about 600 MB of random float32 weights. Each opening is a process of its own; the libraries alternate.
What is measured starts after the imports: seconds, and the peak of the resident memory (VmHWM of Linux, which is set
back first) less the resident memory before. "opened" is after from_pretrained, "used" after every weight has been read
once, which a mapped file postpones. A resident page of a mapped file counts, though the system can reclaim it. The file
system's cache is warm. ratio: of the peak to the size of the weights' files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

# What is opened, and in which type.
KINDS = {"as it is": None, "in bfloat16": torch.bfloat16}
LIBRARIES = ("latentdiff", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for the temporary model")
    parser.add_argument("--open", nargs=3, help=argparse.SUPPRESS)  # set in the process that measures
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.open is not None:
        measure(*arguments.open)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print(f"torch {torch.__version__}; {size / 1e6:.0f} MB of weights; medians of {arguments.rounds} rounds")
        print("| opened | by | opened, MB | ratio | opened, s | used, MB | ratio | used, s |\n" + "|---" * 8 + "|")
        for kind in KINDS:
            found: dict[str, list[list[float]]] = {library: [] for library in LIBRARIES}
            for _ in range(arguments.rounds):
                for library in LIBRARIES:
                    command = [sys.executable, __file__, "--open", library, kind, str(folder)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    found[library].append([float(word) for word in done.stdout.splitlines()[-1].split()])
            for library in LIBRARIES:
                opened, seconds, used, until = (median(column) for column in zip(*found[library], strict=True))
                print(
                    f"| {kind} | {library} | {opened / 1e6:.0f} | {opened / size:.2f} | {seconds:.2f} "
                    f"| {used / 1e6:.0f} | {used / size:.2f} | {until:.2f} |",
                    flush=True,
                )


def write(folder: Path) -> None:
    """Save a pipeline of random weights."""
    from latentdiff import AutoencoderKL, LatentDiffusionPipeline, UNet
    from latentdiff.config import AutoencoderKLConfig, UNetConfig
    from latentdiff.diffusion.schedule import NoiseSchedule
    from latentdiff.models.text_encoder import TextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer

    vae = {"block_out_channels": [64, 128, 256], "layers_per_block": 2}
    unet = {
        "block_out_channels": [128, 256, 384, 384],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 512,
        "sample_size": 32,
    }
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    LatentDiffusionPipeline(
        AutoencoderKL.from_config(AutoencoderKLConfig.from_diffusers(vae, "vae"), 0),
        UNet.from_config(UNetConfig.from_diffusers(unet, "unet"), 0),
        TextEncoder.from_config(text, 0),
        CLIPTokenizer.load(),
        NoiseSchedule(),
    ).save_pretrained(folder)


def measure(library: str, kind: str, folder: str) -> None:
    """Open the folder and print, since then: peak in bytes and seconds; the same after all weights were read."""
    if library == "latentdiff":
        from latentdiff import LatentDiffusionPipeline

        def opened() -> list[torch.nn.Module]:
            pipeline = LatentDiffusionPipeline.from_pretrained(folder, dtype=KINDS[kind])
            return [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    else:
        import transformers
        from diffusers import StableDiffusionPipeline

        transformers.logging.set_verbosity_error()
        _ = (transformers.CLIPTextModel, transformers.CLIPTokenizer)  # imported on first use

        def opened() -> list[torch.nn.Module]:
            pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=KINDS[kind], safety_checker=None)
            return [pipeline.unet, pipeline.vae, pipeline.text_encoder]

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before, start = memory("VmRSS"), time.perf_counter()
    modules = opened()
    peak, seconds = memory("VmHWM") - before, time.perf_counter() - start
    for module in modules:
        for tensor in module.state_dict().values():
            tensor.sum()
    print(peak, seconds, memory("VmHWM") - before, time.perf_counter() - start)


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes; ValueError on systems other than Linux."""
    for line in Path("/proc/self/status").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {kind}; this benchmark needs Linux")


if __name__ == "__main__":
    main()
