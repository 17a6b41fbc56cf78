"""The memory of freed tensors."""

import json
import os
import platform
import subprocess
import sys

import pytest

# Page faults of twelve tensors of 48 MiB, one after another: 12,288 pages of 4 KiB each. And the memory of the process.
SCRIPT = """
import json
import resource
from pathlib import Path

import torch

from latentdiff.freed_memory import freed_memory_kept

cpu, gpu = torch.device("cpu"), torch.device("cuda")
torch.set_num_threads(1)


def faults():
    for _ in range(12):  # it may take some until there is a free piece that fits
        torch.ones(12, 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.ones(12, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


with freed_memory_kept(gpu):
    found = {"gpu": faults(), "megabytes": megabytes()}
with freed_memory_kept(cpu):
    with freed_memory_kept(cpu):
        found["inner block"] = faults()
    found["outer block"] = faults()
    found["megabytes kept"] = megabytes()
found["megabytes after"] = megabytes()
print(json.dumps(found))
"""
PAGES = 12 * 12_288


def measure(**variables: str) -> dict[str, int]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", SCRIPT]
    return json.loads(subprocess.run(command, env=environment | variables, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_stays_within_the_outermost_block():
    found = measure()
    assert found["inner block"] < PAGES // 10 and found["outer block"] < PAGES // 10
    assert found["gpu"] >= PAGES
    assert found["megabytes kept"] > found["megabytes"] + 40
    assert found["megabytes after"] < found["megabytes"] + 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_the_environment_has_its_way():
    found = measure(GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert min(found["gpu"], found["inner block"], found["outer block"]) >= PAGES
