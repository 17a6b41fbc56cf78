"""Records the loss traces: the first ten losses of a tiny run of each stage, on a CPU in float32.

python tests/golden/traces.py

Run it only for a change that is meant to change the numbers, and say so in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
STEPS = ["train.steps=10", "validation.every=10", "output.checkpoint_every=10"]


def platform() -> dict[str, str]:
    """What the last bits depend on."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


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
            recorded = {"platform": platform(), **trace(stage, Path(folder))}
        (FOLDER / f"{stage}_cpu_fp32.json").write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
