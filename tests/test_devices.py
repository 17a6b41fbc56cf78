"""Devices."""

import pytest
import torch

from latentdiff import devices
from latentdiff.devices import choose_precision


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
