"""Memory and speed of reading a latent cache of 1,000 and of 100,000 entries, each in a fresh process.

python benchmarks/latent_cache.py [--sizes 1000,100000] [--reads 20000] [--folder DIR]

The entries are noise: moments [8, 16, 16] and, for every hundredth image another caption, context [77, 32], written
by the cache's own writer; 100,000 take 0.8 GB of disk. Random entries are read, as an epoch does. RssAnon is what the
process holds for itself. RssFile is program code and the mapped pages of files; the system can take those back at any
time, and the cache unmaps its own before they come to MAPPED_BYTES.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.data.batches import Key
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.latent_cache import MAPPED_BYTES, LatentCache, Shards

MOMENTS = {"moments": ((1, 8, 16, 16), torch.float32)}
TEXT = {"input_ids": ((77,), torch.int64), "context": ((77, 32), torch.float32)}
IMAGES_PER_CAPTION = 100
FINGERPRINT = "0" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,100000", help="entries of each cache")
    parser.add_argument("--reads", type=int, default=20_000, help="random entries to read")
    parser.add_argument("--folder", type=Path, help="where the temporary caches go")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read is not None:
        read(arguments.read, int(arguments.sizes), arguments.reads)
        return
    print(f"torch {torch.__version__}; at most {MAPPED_BYTES / 2**20:.0f} MiB of each part are mapped")
    print("| entries | files, MiB | | RssAnon, MiB | RssFile, MiB | entries / s |\n|---|---|---|---|---|---|")
    for size in (int(word) for word in arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for part in parts(Path(folder), size):
                write(part)
            command = [
                sys.executable,
                __file__,
                "--read",
                folder,
                "--sizes",
                str(size),
                "--reads",
                str(arguments.reads),
            ]
            subprocess.run(command, check=True)


def parts(folder: Path, size: int) -> tuple[Shards, Shards]:
    """The latents and the text of a cache of `size` images."""
    captions = 1 + size // IMAGES_PER_CAPTION
    return Shards(folder / "latents", FINGERPRINT, size, MOMENTS), Shards(folder / "text", FINGERPRINT, captions, TEXT)


def write(part: Shards) -> None:
    """Fill a part with noise."""
    for shard, items in enumerate(tqdm(part.ranges, desc="write", leave=False)):
        tensors = {
            name: torch.randn(len(items), *shape).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(len(items), *shape, dtype=dtype)
            for name, (shape, dtype) in part.layout.items()
        }
        part.write(shard, tensors)
    part.finish()


def read(folder: Path, size: int, reads: int) -> None:
    """Open the cache of `folder`, read random entries in order of an epoch, print rows of the table."""
    latents, text = parts(folder, size)
    assert latents.is_complete() and text.is_complete()
    table = datasets.Dataset.from_dict({"image": [None] * size})
    images = CaptionedImages(table, DataConfig(source="noise", size=128), 3, seed=0)
    caption_rows = 1 + torch.arange(size) % (text.count - 1)
    cache = LatentCache(images, latents, text, caption_rows)
    mebibytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
    row = f"| {size} | {mebibytes:.0f} |"
    print(f"{row} opened | {memory('RssAnon'):.0f} | {memory('RssFile'):.0f} | |")
    order = torch.randint(size, (reads,), generator=torch.Generator().manual_seed(0)).tolist()
    total, most = torch.zeros(()), 0.0
    start, told = time.perf_counter(), 0.0
    for position, index in enumerate(order):
        item = cache[Key(index=index, epoch=0, step=0, sample_index=0)]
        total += item["moments"].sum() + item["context"].sum()  # touches every page, as stacking does
        if position % 500 == 0:
            pause = time.perf_counter()
            most = max(most, memory("RssFile"))
            told += time.perf_counter() - pause
    seconds = time.perf_counter() - start - told
    print(f"{row} {reads} read | {memory('RssAnon'):.0f} | {most:.0f} at most | {reads / seconds:.0f} |", flush=True)


def memory(kind: str) -> float:
    """MiB of this process's RssAnon or RssFile, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 2**10
    raise ValueError(f"/proc/self/status has no {kind}; this benchmark needs Linux")


if __name__ == "__main__":
    main()
