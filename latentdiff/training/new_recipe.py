"""A recipe for a user's own images: the configs of both stages, sized to the images and to a number of minutes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from latentdiff.config import AutoencoderKLConfig, UNetTrainingConfig, VAETrainingConfig, validated
from latentdiff.evaluation.inspection import Inspection
from latentdiff.formats.files import write_text
from latentdiff.training.plan import Config, Plan, Speed, completed, measure, planned, seconds_of

STAGE_1_SHARE = 0.3  # of the minutes
# Of the minutes for training; the rest is for reading images, saving and what the machine does besides.
USED = 0.9
MIN_STEPS, MAX_STEPS = 100, 50_000
MAX_EPOCHS = 2000
SAMPLE_PROMPTS = 8
GROUPS = 16  # of the group norms, which the widths are multiples of


class _OneLineLists(yaml.SafeDumper):
    """YAML with a key on each line, as in the recipes that come with the package."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        return super().represent_sequence(tag, sequence, flow_style=True)


@dataclass(frozen=True)
class Recipe:
    """Config values of both stages, as the files will have them, and what these will take here."""

    name: str
    vae: Mapping[str, Any]
    unet: Mapping[str, Any]
    plans: Sequence[Plan]

    @property
    def seconds(self) -> float:
        """That both stages will take."""
        return sum(plan.total_seconds for plan in self.plans)

    def write(self, folder: Path) -> list[Path]:
        """Write vae.yaml and unet.yaml, which must not be there yet."""
        files = [folder / "vae.yaml", folder / "unet.yaml"]
        if there := [file for file in files if file.exists()]:
            raise ValueError(f"{there[0]} is there already and is not replaced; choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        for file, values, command in zip(files, (self.vae, self.unet), ("train-vae", "train-unet"), strict=True):
            stage, prompts = ("Stage 1", "") if command == "train-vae" else ("Stage 2", ", validation.prompts")
            head = (
                f"# {stage} of {self.name}, written by `latentdiff new`.\n"
                f"# latentdiff {command} {file}\n"
                f"# What matters most: data.size, model.block_out_channels, train.steps, optimizer.lr{prompts}.\n"
                "# latentdiff configs reference: every other key and its default\n\n"
            )
            text = yaml.dump(dict(values), Dumper=_OneLineLists, sort_keys=False, allow_unicode=True, width=110)
            write_text(head + text, file)
        return files


def default_size(found: Inspection, device: torch.device) -> int:
    """A training size: 256 px on a GPU and 64 px elsewhere, less if most images are smaller."""
    most = 256 if device.type == "cuda" else 64
    sides = sorted(min(row.file.height, row.file.width) for row in found.training)
    middle = sides[len(sides) // 2] if sides else most
    return next((size for size in (256, 192, 128, 96, 64, 48, 32) if size <= min(most, middle)), 32)


def new_recipe(name: str, source: str, size: int, minutes: float, found: Inspection, device: torch.device) -> Recipe:
    """The configs for an inspected source; each stage's steps are chosen so that both take about `minutes` here.

    Raises ValueError for a size that the networks cannot have, fewer than two images, or no captions.
    """
    assert found.images is not None and found.held_out is not None
    images = len(found.training)
    if images < 2:
        raise ValueError(f"{source!r} has {images} training image(s), must have at least 2")
    downsampling = 4 if size < 128 else 8
    if size % (4 * downsampling):
        raise ValueError(f"--size is {size}, must be a multiple of {4 * downsampling}")
    data = {"source": source, "size": size}
    vae_values = _stage_1(name, data, downsampling, min(16, images), device)
    unet_values = _stage_2(name, data, min(64, images), found, device)
    vae_config = AutoencoderKLConfig.model_validate(vae_values["model"])
    plans: list[Plan] = []
    for kind, values, share in (
        (VAETrainingConfig, vae_values, STAGE_1_SHARE),
        (UNetTrainingConfig, unet_values, 1 - STAGE_1_SHARE),
    ):
        config = completed(validated(kind, values, name), vae_config)
        speed = measure(config, vae_config, device, found.held_out if len(found.held_out) else found.images)
        _set_steps(values, _steps(config, speed, share * minutes * 60, found))
        final = completed(validated(kind, values, name), vae_config)
        plans.append(planned(final, vae_config, device, found.images, found.held_out, speed))
    return Recipe(name, vae_values, unet_values, plans)


def _stage_1(
    name: str, data: Mapping[str, Any], downsampling: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """The demo's autoencoder, on a GPU twice as wide: on random crops, which cost a quarter, then on whole images."""
    widths = [32, 64, 64] if downsampling == 4 else [32, 64, 96, 128]
    wider = 2 if device.type == "cuda" else 1
    model: dict[str, Any] = {"block_out_channels": [wider * width for width in widths], "norm_num_groups": GROUPS}
    if downsampling == 8:
        model["latent_channels"] = 8
    return {
        "data": dict(data),
        "model": model,
        "loss": {"kl_weight": 5.0e-3},
        "optimizer": _optimizer(2.0e-3, 2.0e-5),
        "train": {
            "steps": 1,
            "batch_size": batch_size,
            "crop_size": min(data["size"], max(32, data["size"] // 2 // downsampling * downsampling)),
            "whole_image_steps": 0,
        },
        "ema": {"decay": 0.0},
        "validation": {"every": 1},
        "output": {"folder": f"saved/{name}-vae", "checkpoint_every": 1},
    }


def _stage_2(
    name: str, data: Mapping[str, Any], batch_size: int, found: Inspection, device: torch.device
) -> dict[str, Any]:
    """The demo's UNet and text encoder, on a GPU twice as wide."""
    wider = 2 if device.type == "cuda" else 1
    longest = max(found.tokens.values(), default=2)
    values: dict[str, Any] = {
        "vae": f"saved/{name}-vae",
        # A short training may leave a blurred autoencoder: the run says so, and goes on.
        "allow_unfit_vae": True,
        "data": dict(data),
        "model": {
            "block_out_channels": [64 * wider, 128 * wider, 192 * wider],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 2 * wider,
        },
        "text": {
            "config": {
                "hidden_size": 128 * wider,
                "intermediate_size": 512 * wider,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": min(77, max(16, 8 * math.ceil(longest / 8))),
            },
            "token_std": 0.2,
        },
        "diffusion": {"prediction_type": "v_prediction"},
        "optimizer": _optimizer(3.0e-3, 1.0e-5),
        "train": {"steps": 1, "batch_size": batch_size},
        "ema": {"decay": 0.0},
        "validation": {
            "every": 1,
            "sample_every": 1,
            "prompts": _prompts(found),
            "sampler": "dpm++2m",
            "num_inference_steps": 20,
            "guidance_scale": 2.0 if found.captioned else 1.0,
        },
        "output": {"folder": f"saved/{name}", "checkpoint_every": 1},
    }
    if not found.captioned:
        values["data"]["captions"] = "none"
    return values


def _optimizer(lr: float, least: float) -> dict[str, Any]:
    return {
        **{"kind": "muon", "lr": lr, "lr_schedule": "cosine", "warmup_steps": 0, "min_lr": least},
        **{"betas": [0.9, 0.99], "weight_decay": 0.0},
    }


def _prompts(found: Inspection) -> list[str]:
    """Captions of held-out images, then of trained ones, each once."""
    halves: Sequence[list[str]] = [
        list(dict.fromkeys(row.captions[0] for row in found.rows if row.captions and row.held_out is held_out))
        for held_out in (True, False)
    ]
    chosen = halves[0][: SAMPLE_PROMPTS // 2]
    chosen += [caption for caption in halves[1] if caption not in chosen][: SAMPLE_PROMPTS - len(chosen)]
    return chosen or [""]


def _steps(config: Config, speed: Speed, seconds: float, found: Inspection) -> int:
    """As many optimiser steps as fit into so many seconds on this machine, within limits."""
    assert found.images is not None and found.held_out is not None
    train = config.train
    spent = seconds_of(_with_steps(config, 1000), speed, found.images, found.held_out)
    # Validations and samples are so many in any training.
    left = USED * seconds - (sum(spent.values()) - spent["steps"])
    steps = int(left / (spent["steps"] / 1000))
    by_epochs = MAX_EPOCHS * len(found.images) // train.batch_size
    return min(max(steps, MIN_STEPS), MAX_STEPS, max(by_epochs, MIN_STEPS))


def _with_steps(config: Config, steps: int) -> Config:
    values = config.model_dump(mode="json")
    _set_steps(values, steps)
    return validated(type(config), values, "recipe")


def _set_steps(values: Any, steps: int) -> None:
    """Set the number of steps and what depends on it."""
    values["train"]["steps"] = steps
    if values["train"].get("crop_size") is not None:
        values["train"]["whole_image_steps"] = steps // 8
    values["optimizer"]["warmup_steps"] = min(100, steps // 10)
    # An average over the last few percent of the training, as in the recipes that come with the package.
    values["ema"]["decay"] = round(1 - min(0.01, max(0.0005, 5 / steps)), 4)
    values["validation"]["every"] = max(1, steps // 10)
    values["output"]["checkpoint_every"] = max(1, steps // 5)
    if "sample_every" in values["validation"]:
        values["validation"]["sample_every"] = max(1, steps // 5)
