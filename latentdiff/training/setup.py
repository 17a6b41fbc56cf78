"""What both training scripts build before their loop: device and precision, optimiser, the parts of stage 2."""

import copy
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    find_executable_batch_size,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.optim import AdamW

from latentdiff.config import (
    OptimizerConfig,
    Section,
    TextConfig,
    TrainConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
    to_yaml,
)
from latentdiff.data import PICTURE_MODES, BatchPlan
from latentdiff.evaluate import latent_statistics
from latentdiff.evaluate_vae import autoencoder_folder, refuse_unfit
from latentdiff.formats.diffusers_folder import write_text
from latentdiff.machine import processor_name
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentdiff.models.perceptual import PerceptualLoss
from latentdiff.models.pixel_space import Autoencoder, PixelSpace
from latentdiff.models.text import TextEncoder
from latentdiff.training.randomness import Purpose, generator, seed_for

TRACKERS = "trackers"


@dataclass(frozen=True)
class Precision:
    """The compute type (accelerate's name for it) and why it was chosen."""

    mixed_precision: str
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The config's precision; for `auto`, bf16 where the device gains by it, else fp32.

    A CPU gains by it if it has units for bf16. Intel's without AMX have the instructions, but are slower (docs/LOG.md).

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
        slow = "Intel" in processor_name() and not torch.cpu._is_amx_tile_supported()
        native = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not slow
    if native:
        return Precision("bf16", f"this {device.type} computes in bf16")
    return Precision("no", f"this {device.type} has no fast bf16")


def start(config: VAETrainingConfig | UNetTrainingConfig) -> tuple[Accelerator, BatchPlan]:
    """The accelerator, and how its processes share a batch.

    Raises ValueError for a batch that cannot be shared out, a tracker that is not installed, and a way of distributing
    that is not supported: there are plain data parallelism and FSDP2.
    """
    train = config.train
    # Asked for here already: Accelerate joins the processes when the first of its states is made.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"started as one of {launched} processes, but they are not joined; without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    precision = choose_precision(train.precision, state.device)
    run = Path(config.output.folder).expanduser()
    accelerator = Accelerator(
        mixed_precision=precision.mixed_precision,
        log_with=_installed(config.logging.log_with),
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / TRACKERS)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    _shard_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in accelerate's config")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{accelerator.distributed_type.value} is not supported; use data parallelism or FSDP2")
    _set_arithmetic(train, accelerator.device)
    processes = accelerator.num_processes
    share = max(1, train.batch_size // processes)
    search = train.micro_batch_size == "auto"
    if search and accelerator.is_fsdp2:
        raise ValueError(
            "train.micro_batch_size auto is not possible under FSDP2, whose processes wait for one another"
        )
    plan = BatchPlan(
        train.batch_size, share if search or train.micro_batch_size is None else train.micro_batch_size, processes
    )
    accelerator.print(
        f"{accelerator.device}, {processes} process(es){' (FSDP2)' if accelerator.is_fsdp2 else ''}, precision "
        f"{accelerator.mixed_precision.replace('no', 'fp32')} ({precision.reason}); {plan}"
    )
    return accelerator, plan


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Accelerate reads its FSDP settings on accelerators only; with gloo they work on CPUs as well."""
    wanted = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if wanted and accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def _set_arithmetic(train: TrainConfig, device: torch.device) -> None:
    """On NVIDIA GPUs: TF32 or not, and kernels that repeat bit for bit or the fastest ones for the shapes met."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    torch.backends.cudnn.benchmark = not train.deterministic
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, before its first call
        torch.use_deterministic_algorithms(True)


def _installed(trackers: Sequence[str]) -> list[str] | None:
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"logging.log_with has {name}, which is not installed: pip install {name}")
    return list(trackers) or None


def open_trackers(config: VAETrainingConfig | UNetTrainingConfig, accelerator: Accelerator, start_step: int) -> None:
    """Start the trackers of logging.log_with; a resumed run writes over what came after its checkpoint."""
    if config.logging.log_with:
        values = {
            f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
            for section, part in config.model_dump(mode="json").items()
            for key, value in (part.items() if isinstance(part, dict) else [("", part)])
        }
        accelerator.init_trackers(
            Path(config.output.folder).name,
            config=values if start_step == 0 else None,
            init_kwargs={"tensorboard": {"purge_step": start_step + 1 if start_step else 0}},
        )


def fit_micro_batch(
    accelerator: Accelerator, plan: BatchPlan, model: nn.Module, trial: Callable[[int], None]
) -> BatchPlan:
    """The plan with the largest micro-batch with which `trial` does not run out of memory on any process.

    trial(micro) makes the forward and backward passes of one micro-batch. Call it before the optimiser has its moments:
    their room and that of DDP's buckets is kept free. The global batch, and so the curve, stays as it is.
    """
    share = plan.batch_size // plan.processes
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    tried = iter(sizes[1:])

    @find_executable_batch_size(starting_batch_size=share, reduce_batch_size_fn=lambda: next(tried, 0))
    def attempt(micro: int) -> int:
        reserved = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(3)]
        try:
            trial(micro)
        finally:
            model.zero_grad(set_to_none=True)
            reserved.clear()
        return micro

    try:
        micro = attempt()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise ValueError("not even one picture at a time fits into memory; use a smaller model or data.size") from None
    smallest = accelerator.gather(torch.tensor([micro], device=accelerator.device)).min().item()
    plan = replace(plan, micro=smallest)
    accelerator.print(f"largest micro-batch that fits: {plan}")
    return plan


def spare_copy(model: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """For a model that is about to be sharded, a whole copy in main memory for the averaged weights."""
    return copy.deepcopy(model).to("cpu") if accelerator.is_fsdp2 else None


def start_autoencoder(config: VAETrainingConfig) -> AutoencoderKL:
    """Stage 1's model: new, or that of `start_from`; with `trained_part` decoder the rest of it is frozen.

    ValueError if the folder's model is not the config's.
    """
    if config.start_from is None:
        # The scale of the latents is measured at the end; until then they are the posterior's own.
        unscaled = config.model.model_copy(update={"scaling_factor": 1.0, "shift_factor": None})
        return AutoencoderKL.from_config(unscaled, seed_for(config.train.seed, Purpose.INIT))
    folder = Path(config.start_from).expanduser()
    vae = AutoencoderKL.from_pretrained(autoencoder_folder(folder))
    own = ("sample_size", "scaling_factor", "shift_factor", "force_upcast")  # the folder's say
    for key, value in config.model.model_dump(exclude=set(own)).items():
        if getattr(vae.config, key) != value:
            raise ValueError(f"model.{key} is {value}, but the autoencoder in {folder} has {getattr(vae.config, key)}")
    if config.trained_part == "decoder":
        for module in (vae.encoder, vae.quant_conv):
            if module is not None:
                module.requires_grad_(False)
    return vae


def scale_latents(
    vae: AutoencoderKL,
    config: VAETrainingConfig,
    batches: Iterable[tuple[list[int], Tensor]],
    accelerator: Accelerator,
) -> None:
    """At the end of stage 1: unit-scale latents over the batches of all processes, which are the training pictures.

    A new autoencoder gets it per channel, folded into its convolutions, a given one by its one factor; where the
    decoder alone was trained the latents stay what they were.
    """
    if config.trained_part == "decoder":
        return
    statistics = latent_statistics(vae, batches, accelerator)
    if config.start_from is None:
        vae.set_latent_statistics(*statistics)
    else:
        vae.set_scaling_factor(*statistics)


def check_losses(config: VAETrainingConfig, perceptual: PerceptualLoss | None, accelerator: Accelerator) -> None:
    """ValueError, before training, for terms of stage 1's loss that would fail at their start step."""
    loss, size = config.loss, config.train.crop_size or config.data.size
    if perceptual is not None and size < perceptual.smallest_side:
        raise ValueError(
            f"loss.perceptual {loss.perceptual} needs pictures of {perceptual.smallest_side} px, these have {size}"
        )
    if loss.adversarial is not None and size < _discriminator_config(config).smallest_side:
        raise ValueError(
            f"loss.discriminator_layers {loss.discriminator_layers} needs pictures of "
            f"{_discriminator_config(config).smallest_side} px, these have {size}: use fewer layers"
        )
    several = [key for key in ("adversarial", "learned_variance") if getattr(loss, key)]
    if several and accelerator.is_fsdp2:
        raise ValueError(f"loss.{several[0]} is not possible under FSDP2; the autoencoder fits without sharding")
    if several and accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"loss.{several[0]} is not possible with train.precision fp16, whose loss scale serves one optimiser: take "
            "bf16"
        )


def _discriminator_config(config: VAETrainingConfig) -> DiscriminatorConfig:
    return DiscriminatorConfig(
        in_channels=config.model.out_channels,
        width=config.loss.discriminator_width,
        layers=config.loss.discriminator_layers,
        norm_num_groups=math.gcd(32, 2 * config.loss.discriminator_width),
    )


def new_discriminator(config: VAETrainingConfig) -> PatchDiscriminator:
    """The discriminator of stage 1, its weights a function of the seed."""
    seed = seed_for(config.train.seed, Purpose.DISCRIMINATOR_INIT)
    return PatchDiscriminator.from_config(_discriminator_config(config), seed)


def random_crops(pixels: Tensor, size: int, seed: int, step: int, slots: Sequence[int]) -> Tensor:
    """A square [B, C, size, size] of each picture [B, C, H, W], at a place that depends on (seed, step, slot)."""
    room = torch.tensor([pixels.shape[2] - size, pixels.shape[3] - size])
    crops = []
    for picture, slot in zip(pixels, slots, strict=True):
        places = torch.rand(2, generator=generator(seed, Purpose.TRAINING_CROP, step, slot))
        top, left = (places * (room + 1)).long().tolist()
        crops.append(picture[:, top : top + size, left : left + size])
    return torch.stack(crops)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where there is such a kernel; no weight decay on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    assert len(decayed) + len(others) == len(parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def record(config: Section, run: Path, accelerator: Accelerator) -> None:
    """Write the resolved config into the run's folder: the file alone repeats the run."""
    if accelerator.is_main_process:
        for leftover in (*run.glob(".*.tmp"), *run.glob("*/.*.tmp")):  # of a killed run
            if leftover.is_file():
                leftover.unlink()
        write_text(to_yaml(config), run / "config.yaml")
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


def open_latent_space(config: UNetTrainingConfig) -> Autoencoder:
    """The autoencoder of stage 1, frozen, or pixel space where `vae` is null.

    ValueError if it is missing or does not fit the UNet or the picture size.
    """
    if config.vae is None:
        vae, place = _pixel_space(config), "pixel space"
    else:
        vae, place = _frozen_autoencoder(config), f"the autoencoder in {config.vae}"
    for key in ("in_channels", "out_channels"):
        if getattr(config.model, key) != vae.config.latent_channels:
            raise ValueError(
                f"model.{key} is {getattr(config.model, key)}, but {place} has {vae.config.latent_channels} latent "
                "channels"
            )
    f, size = vae.config.downsampling, config.data.size
    if size % (f * config.model.downsampling):
        raise ValueError(
            f"data.size is {size}, must be a multiple of {f * config.model.downsampling}: the downsampling {f} of "
            f"{place} times the UNet's {config.model.downsampling}"
        )
    if config.model.sample_size != size // f:
        raise ValueError(
            f"model.sample_size is {config.model.sample_size}, must be the latents' size {size // f} (data.size {size} "
            f"/ {f})"
        )
    return vae


def _pixel_space(config: UNetTrainingConfig) -> PixelSpace:
    if config.model.in_channels not in PICTURE_MODES:
        raise ValueError(
            f"model.in_channels is {config.model.in_channels}, must be the channels of pictures where vae is null: "
            + ", ".join(f"{channels} ({mode})" for channels, mode in PICTURE_MODES.items())
        )
    return PixelSpace(config.model.in_channels)


def _frozen_autoencoder(config: UNetTrainingConfig) -> AutoencoderKL:
    folder = Path(config.vae).expanduser()
    if not folder.is_dir():
        raise ValueError(f"vae {config.vae!r} does not exist; train it first with train_vae.py")
    refuse_unfit(folder, accept=config.unfit_vae == "accept")
    return AutoencoderKL.from_pretrained(autoencoder_folder(folder)).requires_grad_(False)


def build_text_encoder(config: TextConfig, seed: int) -> TextEncoder:
    """The frozen pretrained text encoder, or a new one to train."""
    if config.pretrained is not None:
        return TextEncoder.from_pretrained(config.pretrained, frozen=True)
    return TextEncoder.from_config(config.config, seed)
