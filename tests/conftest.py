"""Shared test settings: one torch thread (two busy processes on few cores spin), no network, no leftover state."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = (_cache := tempfile.TemporaryDirectory()).name  # removed at the end

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state per process; each run of a script gets its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts import run_vae

    return run_vae(tmp_path_factory.mktemp("stage1") / "vae")


@pytest.fixture(scope="session")
def unet_run(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> Path:
    from scripts import run_unet

    return run_unet(tmp_path_factory.mktemp("stage2") / "demo", vae_run)
