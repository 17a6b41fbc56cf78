"""Devices."""

import subprocess
import sys

import pytest
import torch

from latentdiff import devices
from latentdiff.devices import choose_precision, peak_flops, peak_memory, products_lack_avx512


def test_precision():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="^train.precision fp16 needs a GPU"):
        choose_precision("fp16", cpu)
    assert choose_precision("fp32", cpu).mixed_precision == "no"
    assert choose_precision("bf16", cpu).mixed_precision == "bf16"
    assert choose_precision("fp16", torch.device("cuda")).mixed_precision == "fp16"


@pytest.mark.parametrize(
    ("processor", "amx", "instructions", "expected"),
    [
        ("AMD EPYC 9554", False, True, "bf16"),
        ("Intel(R) Xeon(R) Processor", True, True, "bf16"),
        ("Intel(R) Xeon(R) Processor", False, True, "no"),  # bf16 took 1.6 times as long as float32 there
        ("AMD EPYC 7763", False, False, "no"),
    ],
)
def test_automatic_precision_is_the_faster_one(
    processor: str, amx: bool, instructions: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor_name", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    automatic = choose_precision("auto", torch.device("cpu"))
    assert automatic.mixed_precision == expected
    assert automatic.reason == ("this cpu computes in bf16" if expected == "bf16" else "this cpu has no fast bf16")


@pytest.mark.parametrize(
    ("processor", "avx512", "expected"),
    [("AMD EPYC 9554", True, True), ("AMD EPYC 7763", False, False), ("Intel(R) Xeon(R) Processor", True, False)],
)
def test_products_without_avx512(processor: str, avx512: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "processor_name", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products_lack_avx512.__wrapped__() == expected


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4),
        ("NVIDIA H100 PCIe", "fp16", False, 756.0),
        ("NVIDIA H100 NVL", "no", True, 417.5),
        ("NVIDIA H200", "no", False, 66.9),
        ("NVIDIA A100-SXM4-80GB", "no", True, 156.0),
        ("NVIDIA A100 80GB PCIe", "bf16", True, 312.0),
        ("NVIDIA L40S", "bf16", False, 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", False, None),
        ("NVIDIA A10G", "bf16", True, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", True, None),
    ],
)
def test_peak_of_a_device(name: str, precision: str, tf32: bool, teraflops: float | None) -> None:
    assert peak_flops(name, precision, tf32) == (None if teraflops is None else teraflops * 1e12)


def test_peak_memory_of_a_process() -> None:
    """Touching 200 MB raises it by that, however large the process was that started this one."""
    script = """
import torch
from latentdiff.devices import peak_memory
before = peak_memory(torch.device("cpu"))
kept = torch.ones(50_000_000)
print(peak_memory(torch.device("cpu")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(2e8, rel=0.2)
    assert peak_memory(torch.device("meta")) is None
