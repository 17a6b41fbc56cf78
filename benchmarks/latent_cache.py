"""Memory and speed of reading latent caches of 1,000 and 100,000 entries, each in its own process.

python benchmarks/latent_cache.py [--sizes 1000,100000] [--reads 20000] [--folder DIR]

The entries are random: moments [8, 16, 16] per image and context [77, 32] per caption, with 100 images per caption,
written by the cache's own writer. 100,000 entries take 0.8 GB of disk. They are read in random order, as in an epoch.

RssAnon is the memory that the process allocated. RssFile is program code and mapped pages of files. The system can
reclaim the latter at any time, and the cache unmaps its files before they reach MAPPED_BYTES.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.data.batches import Key
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.latent_cache import MAPPED_BYTES, Items, LatentCache, Shards
from latentdiff.distributed import chunks

MOMENTS = {"moments": ((1, 8, 16, 16), torch.float32)}
TEXT = {"context": ((77, 32), torch.float32)}
IMAGES_PER_CAPTION = 100
FINGERPRINT = "0" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,100000", help="entries of each cache, separated by commas")
    parser.add_argument("--reads", type=int, default=20_000, help="how many entries to read")
    parser.add_argument("--folder", type=Path, help="folder for the temporary caches")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # set in the process that measures
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read is not None:
        read(arguments.read, int(arguments.sizes), arguments.reads)
        return
    print(f"torch {torch.__version__}; at most {MAPPED_BYTES / 2**20:.0f} MiB of each part are mapped")
    print("| entries | files, MiB | state | RssAnon, MiB | RssFile, MiB | entries / s |\n|---|---|---|---|---|---|")
    for size in (int(word) for word in arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for part in parts(Path(folder), size):
                write(*part)
            options = [f"--read={folder}", f"--sizes={size}", f"--reads={arguments.reads}"]
            subprocess.run([sys.executable, __file__, *options], check=True)


def parts(folder: Path, size: int) -> list[tuple[Shards, np.ndarray]]:
    """The latents part and the text part of a cache of `size` images, and the digests of their items."""
    counts = size, 1 + size // IMAGES_PER_CAPTION
    images, captions = (np.random.default_rng(0).integers(2**62, size=count) for count in counts)
    return [
        (Shards(folder / "latents", FINGERPRINT, MOMENTS), images),
        (Shards(folder / "text", FINGERPRINT, TEXT), captions),
    ]


def write(part: Shards, digests: np.ndarray) -> None:
    """Fill a part with random entries."""
    rows = list(chunks(range(len(digests)), part.shard_items(len(digests))))
    for items in tqdm(rows, desc="write", leave=False):
        tensors = {name: torch.randn(len(items), *shape).to(dtype) for name, (shape, dtype) in part.layout.items()}
        part.write(digests[items], tensors)


def opened(part: Shards, digests: np.ndarray) -> Items:
    """All entries of a part."""
    listing = part.listing()
    files, places = listing.places(digests)
    return Items(part, [listing.names[file] for file in files], len(listing.digests), places)


def read(folder: Path, size: int, reads: int) -> None:
    """Open the cache in `folder` and read random entries; print one row of the table after each."""
    start = time.perf_counter()
    latents, text = (opened(*part) for part in parts(folder, size))
    seconds = time.perf_counter() - start
    captions = ["", *(f"caption {row}" for row in range(1, len(text)))]
    own = [captions[1 + row % (len(text) - 1)] for row in range(size)]
    table = datasets.Dataset.from_dict({"image": [None] * size, "text": own})
    images = CaptionedImages(table, DataConfig(source="noise", size=128), 3, seed=0)
    cache = LatentCache(images, [latents], text, {caption: row for row, caption in enumerate(captions)})
    mebibytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
    row = f"| {size} | {mebibytes:.0f} |"
    print(f"{row} opened in {seconds:.3f} s | {memory('RssAnon'):.0f} | {memory('RssFile'):.0f} | |")
    order = torch.randint(size, (reads,), generator=torch.Generator().manual_seed(0)).tolist()
    total, largest = torch.zeros(()), 0.0
    start, paused = time.perf_counter(), 0.0
    for position, index in enumerate(order):
        item = cache[Key(index=index, epoch=0, step=0, sample_index=0)]
        total += item["moments"].sum() + item["context"].sum()  # touches every page, as collating does
        if position % 500 == 0:
            pause = time.perf_counter()
            largest = max(largest, memory("RssFile"))
            paused += time.perf_counter() - pause
    seconds = time.perf_counter() - start - paused
    print(f"{row} {reads} read | {memory('RssAnon'):.0f} | {largest:.0f} at most | {reads / seconds:.0f} |", flush=True)


def memory(kind: str) -> float:
    """RssAnon or RssFile of this process in MiB; ValueError on systems other than Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 2**10
    raise ValueError(f"/proc/self/status has no {kind}; this benchmark needs Linux")


if __name__ == "__main__":
    main()
