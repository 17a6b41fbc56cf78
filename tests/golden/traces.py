"""Records the loss traces: the first ten losses of a tiny run of each stage, on a CPU in float32.

python tests/golden/traces.py

Run it only for a change that is meant to change the numbers, on every platform that has a recording, and say so in the
commit; or on a new platform, which adds a recording.
"""

import json
import sys
import tempfile
from pathlib import Path
from platform import machine
from typing import Any

import torch

FOLDER = Path(__file__).parent
STEPS = ["train.steps=10", "validation.every=10", "output.checkpoint_every=10"]


def platform() -> dict[str, str]:
    """What the last bits depend on: the libraries below torch choose their kernels by instructions and by vendor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    vendors = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    version, instructions = torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()
    return {"torch": version, "cpu": instructions, "vendor": vendors[0] if vendors else machine()}


def recorded(stage: str) -> list[dict[str, Any]]:
    """The recordings of a stage, of one platform each."""
    return json.loads((FOLDER / f"{stage}_cpu_fp32.json").read_text(encoding="utf-8"))


def trace(stage: str, folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of ten steps of a stage ("vae" or "unet") in float32 with one thread."""
    from scripts import metrics, run_unet, run_vae

    torch.set_num_threads(1)
    run = run_vae(folder / "vae", *STEPS)
    if stage == "unet":
        run = run_unet(folder / "unet", run, *STEPS, "validation.sample_every=10")
    return {name: list(metrics(run, name).values()) for name in ("loss", "grad_norm")}


def main() -> None:
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]
    for stage in ("vae", "unet"):
        with tempfile.TemporaryDirectory() as folder:
            new = {"platform": platform(), **trace(stage, Path(folder))}
        others = [old for old in recorded(stage) if old["platform"] != new["platform"]]
        (FOLDER / f"{stage}_cpu_fp32.json").write_text(json.dumps([*others, new], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
