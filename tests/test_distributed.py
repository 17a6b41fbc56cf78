"""Several processes, gradient accumulation and sharded weights: the same run as one process, up to rounding."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, arguments, finish, launch, metrics, run_unet, run_vae, start

# 20 steps, so that what differs would have time to grow.
LONGER = ["train.steps=20", "validation.every=10", "output.checkpoint_every=10"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> dict[int, Path]:
    """Each stage on one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {1: run_vae(folder / "vae", *LONGER), 2: run_unet(folder / "unet", vae_run, *LONGER)}


def assert_same_curves(run: Path, expected: Path, rel: float = 1e-5) -> None:
    keys = ["loss", "grad_norm", "validation/loss", "validation/gap", "validation/mse", "validation/psnr"]
    for key in keys:
        values, wanted = metrics(run, key), metrics(expected, key)
        assert values.keys() == wanted.keys(), key
        for step, value in values.items():
            tolerance = {"grad_norm": 10 * rel}.get(key, rel)
            assert value == pytest.approx(wanted[step], rel=tolerance, abs=rel), (key, step)
    assert len(metrics(run, "loss")) == 20


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_processes_follow_the_same_curve(
    stage: int, processes: int, tmp_path: Path, vae_run: Path, alone: dict[int, Path]
) -> None:
    output = launch(processes, arguments(stage, tmp_path / "run", vae_run, *LONGER))
    assert f"batch 8 = {8 // processes} x {processes} processes x 1 accumulated" in output
    assert_same_curves(tmp_path / "run", alone[stage])


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_follows_the_same_curve(
    stage: int, micro: int, tmp_path: Path, vae_run: Path, alone: dict[int, Path]
) -> None:
    overrides = [*LONGER, f"train.micro_batch_size={micro}"]
    run_vae(tmp_path, *overrides) if stage == 1 else run_unet(tmp_path, vae_run, *overrides)
    assert_same_curves(tmp_path, alone[stage])


def test_resume_on_another_number_of_processes(tmp_path: Path, vae_run: Path, alone: dict[int, Path]) -> None:
    """Ten steps on two processes with accumulation, the other ten on one."""
    folder = tmp_path / "run"
    command = arguments(2, folder, vae_run, *LONGER)
    launch(2, [*command, "train.steps=10", "train.micro_batch_size=2"])
    assert "resumed from" in finish(start(command))
    assert_same_curves(folder, alone[2])


FSDP = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2-cpu.yaml")]


def test_sharded_weights_follow_the_same_curve(tmp_path: Path, vae_run: Path, alone: dict[int, Path]) -> None:
    """FSDP2 through Accelerate's own config: trains, resumes, and saves whole tensors that one process goes on from."""
    folder = tmp_path / "run"
    command = arguments(2, folder, vae_run, *LONGER, "ema.snapshot_every=10")
    output = launch(2, [*command, "train.steps=10"], *FSDP)
    assert "(FSDP2)" in output
    whole, reference = (
        {name: load_file(run / "checkpoints" / "step_00000010" / f"{name}.safetensors") for name in ("model", "ema")}
        for run in (folder, alone[2])
    )
    for name in whole:
        assert {key: value.shape for key, value in whole[name].items()} == {
            key: value.shape for key, value in reference[name].items()
        }
    assert "resumed from" in launch(2, [*command, "train.steps=15", "output.checkpoint_every=5"], *FSDP)
    assert "resumed from" in finish(start(command))
    assert_same_curves(folder, alone[2])
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        mine, expected = (load_file(run / f"{name}.safetensors") for run in (folder, alone[2]))
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, atol=2e-4, rtol=1e-3)


def test_processes_that_are_not_joined_are_refused(tmp_path: Path) -> None:
    """Else each would train alone and write into the same folder."""
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "false"}
    if not torch.cuda.is_available():
        output = finish(start(arguments(1, tmp_path / "run"), **environment), expected=2)
        assert "started as one of 2 processes, but they are not joined; without GPUs, set ACCELERATE_USE_CPU" in output
    assert "WORLD_SIZE" not in os.environ
