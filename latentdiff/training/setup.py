"""What both training scripts build before their loop: device and precision, optimiser, the parts of stage 2."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.optim import AdamW

from latentdiff.config import (
    OptimizerConfig,
    Section,
    TextConfig,
    TrainConfig,
    UNetTrainingConfig,
    save_config,
)
from latentdiff.data import BatchPlan
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text import TextEncoder


@dataclass(frozen=True)
class Precision:
    """The compute type (accelerate's name for it) and why it was chosen."""

    mixed_precision: str
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The config's precision; for `auto`, bf16 where the device computes in it natively, else fp32.

    Raises ValueError for fp16 on a CPU.
    """
    if wanted != "auto":
        if wanted == "fp16" and device.type == "cpu":
            raise ValueError("train.precision fp16 needs a GPU; on this CPU use auto, bf16 or fp32")
        return Precision("no" if wanted == "fp32" else wanted, "as the config says")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        mkldnn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        native = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if native:
        return Precision("bf16", f"this {device.type} computes in bf16")
    return Precision("no", f"this {device.type} has no native bf16")


def start(config: TrainConfig) -> tuple[Accelerator, BatchPlan]:
    """The accelerator, and how its processes share a batch."""
    device = PartialState().device
    precision = choose_precision(config.precision, device)
    accelerator = Accelerator(mixed_precision=precision.mixed_precision)
    processes = accelerator.num_processes
    micro = config.micro_batch_size or max(1, config.batch_size // processes)
    plan = BatchPlan(config.batch_size, micro, processes)
    accelerator.print(
        f"{device}, {processes} process(es), precision {accelerator.mixed_precision.replace('no', 'fp32')} "
        f"({precision.reason}); batch {plan.batch_size} = {plan.micro} x {processes} processes x "
        f"{plan.accumulation} accumulated"
    )
    return accelerator, plan


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where there is such a kernel; no weight decay on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    assert len(decayed) + len(others) == len(parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def record(config: Section, run: Path, accelerator: Accelerator) -> None:
    """Write the resolved config into the run's folder: the file alone repeats the run."""
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")
    accelerator.wait_for_everyone()


def describe(model: nn.Module) -> str:
    """One line on the model's size."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{type(model).__name__}: {count:,} parameters, {trained:,} trained"


def settings(**sections: Section | str | None) -> dict[str, Any]:
    """The parts of a config that a resumed run must share with its checkpoint, as `section.key: value`."""
    flat = {}
    for name, section in sections.items():
        if isinstance(section, Section):
            flat |= {f"{name}.{key}": value for key, value in section.model_dump(mode="json").items()}
        else:
            flat[name] = section
    return flat


def open_vae(config: UNetTrainingConfig) -> AutoencoderKL:
    """The autoencoder of stage 1, frozen. ValueError if it is missing or does not fit the UNet or the picture size."""
    folder = Path(config.vae).expanduser()
    if not folder.is_dir():
        raise ValueError(f"vae {config.vae!r} does not exist; train it first with train_vae.py")
    vae = AutoencoderKL.from_pretrained(folder / "vae" if (folder / "vae").is_dir() else folder)
    for key in ("in_channels", "out_channels"):
        if getattr(config.model, key) != vae.config.latent_channels:
            raise ValueError(
                f"model.{key} is {getattr(config.model, key)}, but the autoencoder in {config.vae} has "
                f"{vae.config.latent_channels} latent channels"
            )
    multiple = vae.config.downsampling * config.model.downsampling
    if config.data.size % multiple:
        raise ValueError(
            f"data.size is {config.data.size}, must be a multiple of {multiple}: the autoencoder's downsampling "
            f"{vae.config.downsampling} times the UNet's {config.model.downsampling}"
        )
    grid = config.data.size // vae.config.downsampling
    if config.model.sample_size != grid:
        raise ValueError(
            f"model.sample_size is {config.model.sample_size}, must be the latents' size {grid} "
            f"(data.size {config.data.size} / {vae.config.downsampling})"
        )
    return vae.requires_grad_(False)


def build_text_encoder(config: TextConfig, seed: int) -> TextEncoder:
    """The frozen pretrained text encoder, or a new one to train."""
    if config.pretrained is not None:
        return TextEncoder.from_pretrained(config.pretrained, frozen=True)
    return TextEncoder.from_config(config.config, seed)
