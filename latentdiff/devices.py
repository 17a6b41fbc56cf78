"""The device, its precision, and how tensors get there."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def processor_name() -> str:
    """The processor's name, as far as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def choose_device(name: str | None) -> torch.device:
    """The device of --device, by default a GPU if there is one; ValueError if it can't be used."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Precision:
    """The compute type (accelerate's name for it) and why it was chosen."""

    mixed_precision: str
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The config's precision; for `auto`, bf16 where the device is faster with it, else fp32.

    Raises ValueError for fp16 on a CPU.
    """
    if wanted != "auto":
        if wanted == "fp16" and device.type == "cpu":
            raise ValueError("train.precision fp16 needs a GPU; on this CPU use auto, bf16 or fp32")
        return Precision("no" if wanted == "fp32" else wanted, "set in the config")
    if computes_in_bf16(device):
        return Precision("bf16", f"this {device.type} computes in bf16")
    return Precision("no", f"this {device.type} has no fast bf16")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device is faster in bf16 than in float32.

    A CPU needs units for it: Intel's without AMX have the instructions, but are slower (docs/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    slow = "Intel" in processor_name() and not torch.cpu._is_amx_tile_supported()
    return mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not slow


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device without the host waiting: copies to NVIDIA GPUs need pinned memory for that."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
