"""Decoding in each layout and type: time, and what is lost against float32.

python benchmarks/decoding.py [saved/emoji-128/vae ...] [--images 4] [--rounds 3] [--threads 1]

The autoencoders decode their own latents of embedded images, by default one of Stable Diffusion 1's shape with random
weights; of those the time alone says something. SSIM, the largest difference and the share of changed values are of the
8-bit images, against the first row. Time is the processor's, the fastest of all rounds: with the memory of freed
tensors kept, as the pipeline does it on CPUs, and without.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from latentdiff import AutoencoderKL
from latentdiff.config import EMBEDDED, AutoencoderKLConfig, DataConfig, shape_of
from latentdiff.data.captioned_images import open_images
from latentdiff.freed_memory import freed_memory_kept
from latentdiff.images import to_bytes

FIRST, LAST = torch.contiguous_format, torch.channels_last
VARIANTS = {
    "float32, channels first": (FIRST, torch.float32, False),
    "float32, channels last": (LAST, torch.float32, False),
    "bf16 products, channels last": (LAST, torch.float32, True),
    "bfloat16, channels first": (FIRST, torch.bfloat16, False),
    "bfloat16, channels last": (LAST, torch.bfloat16, False),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="of autoencoders")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for folder in arguments.folders or [None]:
        if folder is None:
            vae = AutoencoderKL.from_config(
                AutoencoderKLConfig(sample_size=256, block_out_channels=(128, 256, 512, 512), layers_per_block=2), 0
            )
        else:
            vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
        print(f"\n{folder or 'random weights'}, widths {vae.config.block_out_channels}, {arguments.images} images\n")
        compare(vae, latents_of(vae, arguments.images), arguments.rounds)


def latents_of(vae: AutoencoderKL, count: int) -> Tensor:
    """The posterior means of embedded images."""
    size = min(shape_of(vae.config.sample_size))
    images, _ = open_images(DataConfig(source=EMBEDDED, size=size, holdout=0), 3, seed=0, progress=False)
    return torch.cat([vae.sample(vae.encode(pixels)) for _, pixels in images.some(count).batches(1)])


def compare(vae: AutoencoderKL, latents: Tensor, rounds: int) -> None:
    """Print a table, one row a variant; all run in turn in each round."""
    seconds = {name: {True: float("inf"), False: float("inf")} for name in VARIANTS}  # by whether memory is kept
    images: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, (layout, dtype, bf16_products) in VARIANTS.items():
            decoder = AutoencoderKL(vae.config)
            decoder.load_state_dict(vae.state_dict())
            decoder.to(dtype).to(memory_format=layout)
            for keep in (True, False):
                with freed_memory_kept(vae.device) if keep else nullcontext():
                    start = time.process_time()
                    pixels = decoder.decode(latents.to(dtype), bf16_products=bf16_products)
                    seconds[name][keep] = min(seconds[name][keep], time.process_time() - start)
            images[name] = to_bytes(pixels.float()).double()
    exact = images[next(iter(VARIANTS))]
    print("| variant | s | memory not kept | SSIM | largest difference of 255 | changed values |")
    print("|---|---|---|---|---|---|")
    for name, decoded in images.items():
        ssim = structural_similarity_index_measure(decoded, exact, data_range=255.0)
        difference = (decoded - exact).abs()
        changed = (difference > 0).double().mean()
        kept, returned = seconds[name][True], seconds[name][False]
        values = f"{ssim:.5f} | {difference.max():.0f} | {100 * changed:.1f} %"
        print(f"| {name} | {kept:.2f} | {returned:.2f} | {values} |")


if __name__ == "__main__":
    main()
