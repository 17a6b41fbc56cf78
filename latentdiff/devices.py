"""The device, its precision, and how tensors get there."""

import platform
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.printable import listed, shortened


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
        reason = str(error).splitlines()[0]
        if "device type at start of device string" in reason:  # torch lists all that it was ever built for
            reason = "no such device, must be cpu, cuda, cuda:1, mps or xpu"
        raise ValueError(f"--device {name}: {reason}") from None


WEIGHT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A type of weights, which may be given by its name; None stays None. ValueError for another type."""
    named = WEIGHT_TYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and named not in (*WEIGHT_TYPES.values(), torch.float64):
        known = listed(list(WEIGHT_TYPES))
        raise ValueError(f"dtype is {shortened(value)}, must be one of {known}, as torch's type or by name")
    return named


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


@cache
def products_lack_avx512() -> bool:
    """Whether the CPU has AVX-512 and PyTorch's float32 products do not use it.

    MKL, which computes them, does so on Intel's processors alone; oneDNN, which computes convolutions, on all.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and "Intel" not in processor_name() and torch.cpu._is_avx512_supported()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device without the host waiting: copies to NVIDIA GPUs need pinned memory for that."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# Dense peaks as published, in TFLOP/s: of bf16 and fp16 (products summed in float32), TF32, and float32 without tensor
# cores; by torch's name of the device, a regular expression.
_PEAKS = {
    "NVIDIA H200": (989.4, 494.7, 66.9),
    "NVIDIA H200 NVL": (835.5, 417.5, 60.0),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 66.9),
    "NVIDIA H100 NVL": (835.5, 417.5, 60.0),
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.0),
    "NVIDIA A100(-SXM4|-PCIE)?[ -](40|80)GB( PCIe)?": (312.0, 156.0, 19.5),
    "NVIDIA A40": (149.7, 74.8, 37.4),
    "NVIDIA A10": (125.0, 62.5, 31.2),
    "NVIDIA L40S": (362.05, 183.0, 91.6),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
}


def peak_flops(name: str, mixed_precision: str, tf32: bool) -> float | None:
    """The published dense peak of a device, FLOP/s; None if it is not known.

    name: as torch gives it, such as "NVIDIA H100 80GB HBM3". mixed_precision: accelerate's name. tf32: train.tf32.
    """
    for pattern, (half, tensor_float, single) in _PEAKS.items():
        if re.fullmatch(pattern, name):
            return (half if mixed_precision in ("bf16", "fp16") else tensor_float if tf32 else single) * 1e12
    return None


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that this process has had allocated on the GPU or, on a CPU, in main memory. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    status = Path("/proc/self/status")  # Linux; its getrusage has the peak of the process that started this one
    if status.is_file():
        kilobytes = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return None if kilobytes is None else int(kilobytes[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
