"""Time and memory that `latentdiff plan` predicts, beside those of the training itself.

python benchmarks/plan.py

Each recipe is planned and then trained for some steps, in processes of their own. Time is from the images' opening to
the end, memory the most that was resident; on Linux. Nothing else should run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for train_vae.py and train_unet.py

import torch

# Recipe, stage, steps, overrides.
RECIPES = (
    ("demo", "vae", 300, ["train.whole_image_steps=40"]),
    ("demo", "unet", 120, ["vae={vae}"]),
    ("sanity", "unet", 200, ["train.batch_size=32"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vae", default="saved/demo-vae", help="run of configs/demo/vae.yaml, for stage 2")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # in the processes that measure
    arguments = parser.parse_args()
    if arguments.run:
        run(*arguments.run)
        return
    heads = [f"{what}, planned | measured | ratio" for what in ("s a step", "s in all", "MB")]
    print(f"| recipe | {' | '.join(heads)} |\n{'|---' * 10}|")
    for name, stage, steps, given in RECIPES:
        every = [f"train.steps={steps}", f"output.checkpoint_every={steps}", "logging.every=5"]
        every += [f"validation.every={steps // 2}", "logging.progress=false"]
        every += [f"validation.sample_every={steps}"] if stage == "unet" else []
        overrides = [*every, *(one.format(vae=arguments.vae) for one in given)]
        planned, measured = (_process(how, name, stage, overrides) for how in ("plan", "train"))
        cells = [f"{name}, stage {1 if stage == 'vae' else 2}"]
        for key in ("step", "seconds", "bytes"):
            scale, digits = (1e6, 0) if key == "bytes" else (1, 2)
            one, other = planned[key], measured[key]
            cells += [f"{one / scale:.{digits}f}", f"{other / scale:.{digits}f}", f"{one / other:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _process(how: str, name: str, stage: str, overrides: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", how, name, stage, *overrides]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(how: str, name: str, stage: str, *overrides: str) -> None:
    """Plan or train, and print what was found as JSON."""
    from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
    from latentdiff.devices import peak_memory

    path = Path("configs", name, f"{stage}.yaml")
    if how == "plan":
        from latentdiff.training.plan import plan

        config = load_config(VAETrainingConfig if stage == "vae" else UNetTrainingConfig, path, overrides)
        found = plan(path, config, torch.device("cpu"), measured=True, progress=False)
        assert found.speed is not None and found.seconds is not None
        numbers = {"step": found.speed.step, "seconds": sum(found.seconds.values()), "bytes": found.measured_bytes}
        print(json.dumps(numbers))
        return
    if stage == "vae":
        import train_vae as script
    else:
        import train_unet as script
    started: list[float] = []
    describe = script.describe_images

    def described(*images: object) -> str:
        started.append(time.perf_counter())
        return describe(*images)

    with tempfile.TemporaryDirectory() as folder, patch.object(script, "describe_images", described):
        script.main([str(path), *overrides, f"output.folder={folder}/run"])
        seconds = time.perf_counter() - started[0]
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        speeds = sorted(line["images_per_second"] for line in lines if "images_per_second" in line)
        batch = load_config(
            VAETrainingConfig if stage == "vae" else UNetTrainingConfig, path, overrides
        ).train.batch_size
        step = batch / speeds[len(speeds) // 2]
    print(json.dumps({"step": step, "seconds": seconds, "bytes": peak_memory(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
