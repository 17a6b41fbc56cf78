"""Time that a sampling step spends outside the UNet, in this pipeline and in diffusers'.

python benchmarks/sampling_overhead.py [--steps 50] [--rounds 7] [--threads 1]

Both pipelines open the same folder, a small model with random weights, and alternate: each generates one image with
guidance per round. Measured is processor time, twice. Outside the UNet's layers: from the end of its last convolution
to the start of its first one in the next step: the sampler, guidance, bookkeeping and the time embedding. Outside the
UNet: from the end of a call to the start of the next, without the time embedding that diffusers makes inside. What is
done once per image is not in it. The table has the median and the minimum.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import diffusers
import torch
from torch import nn

from latentdiff import AutoencoderKL, LatentDiffusionPipeline, UNet
from latentdiff.config import AutoencoderKLConfig, UNetConfig
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.pipeline.options import GenerationDefaults

SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


class Stopwatch:
    """Measures the processor time from the end of a module's call to the next start of another's, or of its own."""

    def __init__(self, last: nn.Module, first: nn.Module) -> None:
        self.gaps: list[float] = []
        self._ended: float | None = None
        # Not hooks: handling them takes torch a tenth of what is measured.
        first.forward = self._starting(first.forward)
        last.forward = self._stopping(last.forward)

    def new_image(self) -> None:
        """Do not measure the time before the next call."""
        self._ended = None

    def _starting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any, **options: Any) -> Any:
            if self._ended is not None:
                self.gaps.append(time.thread_time() - self._ended)
            return forward(*inputs, **options)

        return timed

    def _stopping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any, **options: Any) -> Any:
            outputs = forward(*inputs, **options)
            self._ended = time.thread_time()
            return outputs

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"CPU, {arguments.threads} thread(s), torch {torch.__version__}, diffusers {diffusers.__version__}")
    print("| sampler | outside | ours, ms per step: median (minimum) | diffusers | ratio of the medians |")
    print("|---|---|---|---|---|")
    for name in SAMPLERS:
        for outside, (ours, theirs) in compare(name, arguments.steps, arguments.rounds).items():
            cells = [f"{1e3 * median(gaps):.3f} ({1e3 * min(gaps):.3f})" for gaps in (ours, theirs)]
            print(f"| {name} | {outside} | {cells[0]} | {cells[1]} | {median(ours) / median(theirs):.2f} |", flush=True)


def compare(name: str, steps: int, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """The seconds outside the UNet's layers and outside the UNet: (this pipeline, diffusers)."""
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(name).save_pretrained(folder)
        ours = LatentDiffusionPipeline.from_pretrained(folder)
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert type(theirs.scheduler) is SAMPLERS[name]
    theirs.set_progress_bar_config(disable=True)
    pair = ours.unet, theirs.unet
    watches = {
        "the layers": tuple(Stopwatch(last=unet.conv_out, first=unet.conv_in) for unet in pair),
        "the UNet": tuple(Stopwatch(last=unet, first=unet) for unet in pair),
    }
    options = {"num_inference_steps": steps, "guidance_scale": 3.0}
    for _ in range(rounds):
        for both in watches.values():
            for watch in both:
                watch.new_image()
        ours("a red apple", seed=0, progress=False, **options)
        theirs("a red apple", generator=torch.Generator().manual_seed(0), output_type="latent", **options)
    return {outside: (mine.gaps, others.gaps) for outside, (mine, others) in watches.items()}


def make_pipeline(sampler: str) -> LatentDiffusionPipeline:
    """A small pipeline with random weights and the structure of Stable Diffusion 1: 64 x 64 latents, 512 px."""
    vae = AutoencoderKLConfig(
        sample_size=512,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    unet = UNetConfig(
        sample_size=64,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LatentDiffusionPipeline(
        AutoencoderKL.from_config(vae, 0),
        UNet.from_config(unet, 0),
        TextEncoder.from_config(text, 0),
        CLIPTokenizer.load(),
        NoiseSchedule(timestep_spacing="leading", steps_offset=1),
        GenerationDefaults(sampler=sampler),
    )


if __name__ == "__main__":
    main()
