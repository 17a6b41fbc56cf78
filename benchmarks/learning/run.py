"""Train a named variant of the demo on the compositional set for a fixed budget, with several seeds; see README.md.

python benchmarks/learning/run.py VARIANT --budget-seconds 300 --seeds 0 1 2 --vae saved/demo-vae [key=value ...]
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for train_unet.py, and for this folder as benchmarks.learning

import torch
from accelerate.state import AcceleratorState

import train_unet
from benchmarks.learning.measure import StepClock, flops_per_step, scores
from benchmarks.learning.twin import build_twin, build_twin_optimizer, train_twin
from benchmarks.learning.variants import VARIANTS, Variant
from latentdiff.config import AutoencoderKLConfig, UNetTrainingConfig, load_config
from latentdiff.evaluation.autoencoder import weights_digest
from latentdiff.formats.diffusers_folder import autoencoder_folder, read_config
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.arguments import run_as_command
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.unet_model import build_text_encoder

PROBE_STEPS = 12  # steps whose time is measured before a budget of seconds becomes steps


def main() -> None:
    arguments = parse()
    variant = VARIANTS[arguments.variant]
    identity = {
        "variant": arguments.variant,
        "budget": budget_of(arguments),
        "base": str(arguments.base),
        "overrides": list(arguments.overrides),
        "vae": str(arguments.vae),
        # Tells an autoencoder from one trained later in the same folder.
        "vae_sha256": weights_digest(autoencoder_folder(arguments.vae))[:12],
        "prompts": arguments.prompts,
    }
    rows = read_rows(arguments.out)
    missing = [s for s in arguments.seeds if not any(row.items() >= {**identity, "seed": s}.items() for row in rows)]
    if not missing:
        print(f"{arguments.variant}: all rows are in {arguments.out}")
        return
    work = arguments.out.parent
    shared = shared_overrides(arguments, variant, work)
    with variant.change():
        cost = flops_of(load_config(UNetTrainingConfig, arguments.base, with_steps(shared, 1)), variant)
        steps = planned_steps(arguments, variant, shared, identity, cost["flops_per_step"], work)
        print(f"{arguments.variant}: {steps} steps of {cost['flops_per_step'] / 1e9:.1f} GFLOPs")
        for seed in missing:
            folder = work / "runs" / f"{arguments.variant}-{digest(identity)}-{seed}"
            overrides = [*with_steps(shared, steps), f"train.seed={seed}", f"output.folder={folder}"]
            clock = train(variant, arguments.base, overrides)
            if not (folder / "model_index.json").is_file():
                raise ValueError("interrupted: the same command goes on")
            config = load_config(UNetTrainingConfig, arguments.base, overrides)
            result = scores(LatentDiffusionPipeline.from_pretrained(folder), config, arguments.prompts)
            seconds = statistics.fmean(clock.seconds) if clock.seconds else None
            row = {**identity, "seed": seed, "steps": steps, **cost, "cpu_seconds_per_step": seconds, **result}
            row |= {"threads": torch.get_num_threads()}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({key: row[key] for key in ("variant", "seed", "steps", "cpu_seconds_per_step", *result)}))
            if not arguments.keep:
                shutil.rmtree(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the base config, for all variants"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-seconds", type=float, help="CPU seconds of the optimiser steps, over all threads")
    budget.add_argument("--budget-tflops", type=float, help="10^12 floating-point operations of the optimiser steps")
    budget.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vae", type=Path, required=True, help="run of train_vae.py")
    parser.add_argument("--base", type=Path, default=Path("configs/demo/unet.yaml"), help="config of the baseline")
    parser.add_argument("--out", type=Path, default=Path("saved/learning/results.jsonl"), help="where rows are added")
    parser.add_argument("--prompts", type=int, default=128, help="images to score")
    parser.add_argument("--keep", action="store_true", help="keep the trained pipelines")
    return parser.parse_intermixed_args()


def budget_of(arguments: argparse.Namespace) -> dict[str, float]:
    """The one budget that was given: {"seconds": 300}."""
    given = {"seconds": arguments.budget_seconds, "tflops": arguments.budget_tflops, "steps": arguments.steps}
    budget = {name: value for name, value in given.items() if value is not None}
    if min(budget.values()) <= 0:
        raise ValueError(f"the budget is {budget}, must be above 0")
    return budget


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def shared_overrides(arguments: argparse.Namespace, variant: Variant, work: Path) -> list[str]:
    """Those of all seeds: the command line's, the variant's, and what makes runs cheap and comparable."""
    place = autoencoder_folder(arguments.vae) / "config.json"
    vae = AutoencoderKLConfig.from_diffusers(read_config(place, "AutoencoderKL"), str(place))
    size = load_config(UNetTrainingConfig, arguments.base, arguments.overrides).data.shape[0]  # drawn as squares
    return [
        *(f"vae={arguments.vae}", f"model.in_channels={vae.latent_channels}"),
        *(f"model.out_channels={vae.latent_channels}", f"model.sample_size={size // vae.downsampling}"),
        *arguments.overrides,
        *variant.overrides,
        *(f"train.cache_folder={work / 'latents'}", "output.publish=last", "logging.progress=false"),
        # The scores are measured afterwards: while training as little as possible.
        *("validation.max_images=4", "validation.num_samples=1"),
    ]


def with_steps(overrides: list[str], steps: int) -> list[str]:
    every = ("train.steps", "validation.every", "validation.sample_every", "output.checkpoint_every")
    return [*overrides, *(f"{key}={steps}" for key in every)]


def flops_of(config: UNetTrainingConfig, variant: Variant) -> dict[str, int]:
    """FLOPs of an optimiser step, and the number of parameters."""
    if variant.twin:
        network = build_twin(config)
        optimizer, tokens = build_twin_optimizer(network, config), network.text_encoder.max_length
    else:
        text_encoder = build_text_encoder(config.text, seed_for(config.train.seed, Stream.TEXT_INIT))
        network = TextConditionedUNet(UNet.from_config(config.model, 0), text_encoder)
        optimizer, tokens = build_optimizer(network, config.optimizer), text_encoder.max_length
    parameters = sum(p.numel() for p in network.parameters())
    return {"flops_per_step": flops_per_step(network, optimizer, config, tokens), "parameters": parameters}


def planned_steps(
    arguments: argparse.Namespace,
    variant: Variant,
    shared: list[str],
    identity: dict[str, Any],
    flops: int,
    work: Path,
) -> int:
    """The optimiser steps that fit the budget. A measured number is kept: all seeds take it, also after a break."""
    if arguments.steps is not None:
        return arguments.steps
    if arguments.budget_tflops is not None:
        return max(1, int(arguments.budget_tflops * 1e12 / flops))
    plan = work / "plans" / f"{arguments.variant}-{digest(identity)}.json"
    if not plan.is_file():
        probe = work / "runs" / f"probe-{digest(identity)}"
        clock = train(variant, arguments.base, [*with_steps(shared, PROBE_STEPS), f"output.folder={probe}"])
        shutil.rmtree(probe)
        plan.parent.mkdir(exist_ok=True)
        steps = max(1, int(arguments.budget_seconds / statistics.median(clock.seconds)))
        plan.write_text(json.dumps({**identity, "steps": steps}) + "\n", encoding="utf-8")
    return json.loads(plan.read_text(encoding="utf-8"))["steps"]


def train(variant: Variant, base: Path, overrides: list[str]) -> StepClock:
    """Train the variant into its output.folder."""
    AcceleratorState._reset_state(reset_partial_state=True)  # each run makes its own
    clock = StepClock()
    if variant.twin:
        train_twin(load_config(UNetTrainingConfig, base, overrides), clock.tick)
    else:
        with clock.watching():
            train_unet.main([str(base), *overrides])
    return clock


if __name__ == "__main__":
    run_as_command(lambda given: main())
