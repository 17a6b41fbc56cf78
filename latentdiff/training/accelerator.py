"""The accelerator, trackers, and the largest micro-batch that fits into memory."""

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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

from latentdiff.config import TrainConfig, UNetTrainingConfig, VAETrainingConfig
from latentdiff.data.batches import BatchPlan
from latentdiff.devices import choose_precision

TRACKERS = "trackers"


def start_accelerator(config: VAETrainingConfig | UNetTrainingConfig) -> tuple[Accelerator, BatchPlan]:
    """The accelerator, and how its processes split a batch.

    Raises ValueError for a batch that does not divide, a tracker that is not installed, a distribution strategy
    other than plain data parallelism and FSDP2, Muon with fp16 or FSDP2, and weights in bf16 or a compiled step with
    FSDP2.
    """
    train = config.train
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        _end_with_the_launcher()
        # Imported later, by DDP, its default arguments would hold the process group until the interpreter is gone, and
        # gloo's threads would still need the interpreter then: SIGABRT after a finished run.
        importlib.import_module("torch.distributed.nn.functional")
    # Before the Accelerator: Accelerate joins the processes when its first state is made.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if launched != state.num_processes:
        raise ValueError(
            f"started as one of {launched} processes, but they are not joined; without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    assert state.device is not None
    precision = choose_precision(train.wanted_precision, state.device)
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
    if config.optimizer.kind == "muon" and (accelerator.is_fsdp2 or accelerator.mixed_precision == "fp16"):
        raise ValueError("optimizer.kind muon works neither under FSDP2 nor with train.precision fp16; use adamw")
    if train.weights == "bf16" and accelerator.is_fsdp2:
        raise ValueError(
            "train.weights bf16 does not work under FSDP2, which itself rounds the float32 weights that it shards: set "
            "it to float32 and train.precision to bf16"
        )
    if train.compile == "step" and accelerator.is_fsdp2:
        raise ValueError(
            "train.compile step does not work under FSDP2, which gathers the weights between the blocks: set it to "
            "blocks"
        )
    _set_arithmetic(train, accelerator.device)
    processes = accelerator.num_processes
    per_process = max(1, train.batch_size // processes)
    if train.micro_batch_size == "auto" and accelerator.is_fsdp2:
        raise ValueError(
            "train.micro_batch_size auto is not possible under FSDP2, where processes wait for one another"
        )
    micro = train.micro_batch_size if isinstance(train.micro_batch_size, int) else per_process
    plan = BatchPlan(train.batch_size, micro, processes)
    accelerator.print(
        f"{accelerator.device}, {processes} process(es){' (FSDP2)' if accelerator.is_fsdp2 else ''}, precision "
        f"{accelerator.mixed_precision.replace('no', 'fp32')} ({precision.reason}); {plan}"
    )
    return accelerator, plan


def _end_with_the_launcher() -> None:
    """A launcher that is killed can't stop its processes: Linux then sends each a SIGTERM, so it saves and stops."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


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


def _installed(trackers: Sequence[str]) -> list[Any] | None:
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
    accelerator: Accelerator, plan: BatchPlan, model: nn.Module, loss_of: Callable[[int], Tensor]
) -> BatchPlan:
    """The plan with the largest micro-batch that fits into memory on every process.

    loss_of(count): the loss of a micro-batch of `count` images; its backward pass is tried too. Call it before the
    optimiser has its moments: room for them and for DDP's buckets is kept free. The global batch, and so the loss
    curve, does not change.

    Raises ValueError if not even one image fits.
    """
    per_process = plan.batch_size // plan.processes
    sizes = [n for n in range(per_process, 0, -1) if per_process % n == 0]
    smaller = iter(sizes[1:])

    @find_executable_batch_size(starting_batch_size=per_process, reduce_batch_size_fn=lambda: next(smaller, 0))
    def attempt(micro: int) -> int:
        reserved = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(3)]
        try:
            with accelerator.no_sync(model):
                accelerator.backward(loss_of(micro))
        finally:
            model.zero_grad(set_to_none=True)
            reserved.clear()
        return micro

    try:
        micro = attempt()  # pyright: ignore[reportCallIssue] (the decorator passes the size)
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise ValueError("not even one image at a time fits into memory; use a smaller model or data.size") from None
    fitting: Any = accelerator.gather(torch.tensor([micro], device=accelerator.device))
    plan = replace(plan, micro=int(fitting.min()))
    accelerator.print(f"largest micro-batch that fits: {plan}")
    return plan
