"""Memory and time of opening large sets: tar shards of small images with captions, and batches from them.

python benchmarks/large_sets.py --sizes 1000,100000

Each size is opened twice, in processes of their own; the second time what the first found is known. What counts is the
difference between the sizes. Mapped files are libraries and the index: the system can reclaim that memory.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.data.batches import BatchPlan, StepBatches, loader
from latentdiff.data.captioned_images import open_images
from latentdiff.data.index import SETTLED

SHARD = 1000  # images
STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", default="1000,100000", help="numbers of images, separated by commas")
    parser.add_argument("--folder", type=Path, help="folder for the temporary shards")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # set in the processes that measure
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read is not None:
        read(arguments.read)
        return
    print(f"| images | start | opened in, s | RSS before, MiB | opened | after {STEPS} batches of 32 | of it mapped |")
    print("|---|---|---|---|---|---|---|")
    for size in (int(word) for word in arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write(Path(folder, "shards"), size)
            time.sleep(SETTLED / 1e9)
            for start in ("first", "second"):
                print(f"| {size} | {start} ", end="", flush=True)
                command = [sys.executable, __file__, f"--read={folder}/shards"]
                subprocess.run(command, check=True, env={**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"})


def write(folder: Path, size: int) -> None:
    """Shards of noise, 8 x 8 px, each image with a caption of eight words."""
    folder.mkdir()
    for first in tqdm(range(0, size, SHARD), desc="write", leave=False):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as shard:
            for i in range(first, min(first + SHARD, size)):
                file = io.BytesIO()
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
                caption = f"an image of noise that has number {i}".encode()
                for suffix, content in (("png", file.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))


def read(folder: Path) -> None:
    """Open the shards, load batches, and print the end of a row."""
    before, start = memory("VmRSS"), time.perf_counter()
    images, _ = open_images(DataConfig(source=str(folder), size=8), 3, seed=0, progress=False)
    seconds, opened = time.perf_counter() - start, memory("VmRSS")
    for _ in loader(images, StepBatches(len(images), BatchPlan(32, 32, 1), 0, 0, 0, STEPS), 0, pin_memory=False):
        pass
    mapped = memory("RssFile")
    print(f"| {seconds:.1f} | {before:.0f} | {opened:.0f} | {memory('VmRSS'):.0f} | {mapped:.0f} |", flush=True)


def memory(kind: str) -> float:
    """The resident memory of this process in MiB, all of it or that of mapped files; on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{kind}:"))


if __name__ == "__main__":
    main()
