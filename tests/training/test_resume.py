"""Runs that are killed, interrupted by a signal, or have a loss that is not finite: the real scripts, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from scripts import OF_THE_MACHINE, arguments, assert_same_weights, finish, metrics, run_unet, run_vae, start

from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.training import saving
from latentdiff.training.checkpoint import checkpoint_folder, list_checkpoints, write_checkpoint

pytestmark = pytest.mark.runs

# 20 images in batches of 8 that take four passes each: most steps are inside an epoch, checkpoints between its ends.
STEPS = 23
LONG = [
    *(f"train.steps={STEPS}", "train.micro_batch_size=2", "output.checkpoint_every=5", "validation.every=5"),
    *("ema.snapshot_every=5", "logging.every=2", "output.keep=9"),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> dict[int, Path]:
    """Each stage without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    return {1: run_vae(folder / "vae", *LONG), 2: run_unet(folder / "unet", vae_run, *LONG)}


def assert_same_run(run: Path, straight: Path) -> None:
    """Weights, averages, optimiser, snapshots, the final model and every number of the log, bit for bit."""
    for name in ("model", "ema", "power_ema", "optimizer", "loss_meter", "best"):
        assert_same_weights(straight, run, f"checkpoints/step_{STEPS:08d}/{name}.safetensors")
    published = {path.relative_to(straight) for path in straight.rglob("*.safetensors")}
    published = {path for path in published if path.parts[0] not in ("checkpoints", "latents")}
    assert len(published) > 5
    for path in published:
        assert_same_weights(straight, run, str(path))
    assert log_of(run) == log_of(straight)
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        path.name for path in sorted((straight / "samples").iterdir())
    ]
    assert not list(run.rglob(".*"))  # nothing half written is left


def log_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended; looked at often enough to hit the middle of a save."""
    end = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.0002)


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; whether the process was still at work."""
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def logged(run: Path) -> int:
    """The last step of the log."""
    return max(metrics(run, "lr"), default=0) if (run / "metrics.jsonl").is_file() else 0


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# SIGKILL


def test_killed_between_checkpoints(tmp_path: Path, straight: dict[int, Path]) -> None:
    """Stage 1, inside an epoch: the steps since the checkpoint are done again, and are the same."""
    run = tmp_path / "run"
    process = start(arguments(1, run, None, *LONG))
    wait_for(process, lambda: logged(run) >= 8)
    assert kill(process)
    assert 5 <= int(list_checkpoints(run)[-1].name[-2:]) < STEPS
    run_vae(run, *LONG)
    assert_same_run(run, straight[1])


def test_killed_during_a_save(
    tmp_path: Path, vae_run: Path, straight: dict[int, Path], capsys: pytest.CaptureFixture
) -> None:
    """Stage 2: the half-written checkpoint is not used, the one before it is."""
    run = tmp_path / "run"
    process = start(arguments(2, run, vae_run, *LONG))
    wait_for(process, lambda: checkpoint_folder(run, 5).is_dir() and is_saving(run))
    assert kill(process)
    assert is_saving(run) and list_checkpoints(run) == [checkpoint_folder(run, 5)]
    run_unet(run, vae_run, *LONG)
    assert f"resumed from {checkpoint_folder(run, 5)}" in capsys.readouterr().out
    assert_same_run(run, straight[2])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_killed_at_random_points(stage: int, tmp_path: Path, vae_run: Path, straight: dict[int, Path]) -> None:
    """At least ten kills of each stage: at any moment of the start, of a step, of a validation, of a save."""
    draw = random.Random(stage)
    kills = 0
    for attempt in range(40):
        run = tmp_path / f"run_{attempt}"
        ended = False
        while not ended:
            process = start(arguments(stage, run, vae_run, *LONG))
            if kills < 10 and draw.random() < 0.4:
                before = len(list_checkpoints(run))
                wait_for(process, lambda run=run, before=before: len(list_checkpoints(run)) > before and is_saving(run))
            elif kills < 10:
                target = logged(run) + draw.randrange(0, 12)
                wait_for(process, lambda run=run, target=target: logged(run) >= target)
                time.sleep(draw.uniform(0, 0.3))
            else:
                finish(process)
            if process.returncode is None and kill(process):
                kills += 1
            else:
                ended = True
        assert_same_run(run, straight[stage])
        if kills >= 10:
            break
    assert kills >= 10


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("name", "stage"), [("SIGTERM", 2), ("SIGUSR1", 1), ("SIGINT", 2)])
def test_a_signal_saves_and_ends(
    name: str, stage: int, tmp_path: Path, vae_run: Path, straight: dict[int, Path]
) -> None:
    """Exit status 0, a line that says how to resume, and no step is lost or done twice."""
    run = tmp_path / "run"
    process = start(arguments(stage, run, vae_run, *LONG))
    wait_for(process, lambda: logged(run) >= 6)
    process.send_signal(getattr(signal, name))
    output = finish(process)
    step = int(list_checkpoints(run)[-1].name.removeprefix("step_"))
    assert 6 <= step < STEPS
    assert f"{name}: saved at step {step} in {run}; run the same command again to resume" in output
    assert "Traceback" not in output
    run_vae(run, *LONG) if stage == 1 else run_unet(run, vae_run, *LONG)
    assert_same_run(run, straight[stage])


def test_a_signal_during_loading_by_workers(tmp_path: Path) -> None:
    """Ctrl-C reaches the loading processes too; they must not take the run down with them."""
    run = tmp_path / "run"
    process = start(arguments(1, run, None, *LONG, "train.steps=5000", "data.num_workers=1"))
    wait_for(process, lambda: logged(run) >= 4)
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert workers
    for pid in [*workers, process.pid]:
        os.kill(pid, signal.SIGINT)
    output = finish(process)
    assert "SIGINT: saved at step" in output and "Traceback" not in output


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_resume_is_bitwise_on_a_gpu(stage: int, precision: str, tmp_path: Path, vae_run: Path) -> None:
    """With train.deterministic, as on a CPU."""
    options = [*LONG, "train.deterministic=true", f"train.precision={precision}"]
    runs = [tmp_path / "straight", tmp_path / "cut"]
    for run in runs:
        run_vae(run, *options) if stage == 1 else run_unet(run, vae_run, *options)
    for checkpoint in list_checkpoints(runs[1])[2:]:
        shutil.rmtree(checkpoint)
    run_vae(runs[1], *options) if stage == 1 else run_unet(runs[1], vae_run, *options)
    assert_same_run(runs[1], runs[0])


# ----------------------------------------------------------------------------------------------------------------------
# What is not finite


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the autoencoder's output NaN in the forward passes that `bad` says, counted from 0."""
    original, calls = AutoencoderKL.forward, iter(range(10**6))

    def forward(self: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reconstruction, moments = original(self, pixels, noise)
        return (reconstruction * float("nan") if bad(next(calls)) else reconstruction), moments

    monkeypatch.setattr(AutoencoderKL, "forward", forward)


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, vae_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad pass in the third step: it is counted, changes no weight, and the run continues and learns."""
    poison(monkeypatch, lambda call: call == 9)
    run = run_vae(tmp_path / "run", "train.micro_batch_size=2", "output.checkpoint_every=1", "output.keep=9")
    assert metrics(run, "skipped") == {1: 0, 2: 0, 3: 1, 4: 0, 5: 0, 6: 0}
    assert list(metrics(run, "loss")) == [1, 2, 4, 5, 6]
    for name in ("model", "optimizer"):
        before, after, later = (load_file(checkpoint_folder(run, step) / f"{name}.safetensors") for step in (2, 3, 4))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not all(torch.equal(after[key], later[key]) for key in later)
    steps = {float(v) for k, v in load_file(checkpoint_folder(run, 6) / "optimizer.safetensors").items() if v.ndim == 0}
    assert steps == {5.0}
    first = metrics(vae_run, "loss")
    assert metrics(run, "loss")[1] == pytest.approx(first[1], rel=1e-5)


def test_too_many_skipped_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the images; the checkpoint before is whole, and a healthy run resumes from it."""
    from latentdiff.config import VAETrainingConfig, load_config
    from latentdiff.data.batches import BatchPlan, StepBatches
    from latentdiff.data.captioned_images import open_images

    def write_late(*arguments: Any) -> None:
        time.sleep(0.5)  # on a busy disk the last steps are computed while the checkpoint is written
        write_checkpoint(*arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, lambda call: call >= 4)
        patch.setattr(saving, "write_checkpoint", write_late)
        with pytest.raises(ValueError, match="was not finite in 3 steps in a row") as error:
            run_vae(run, "train.max_skipped_steps=2", "train.steps=20")
    config = load_config(VAETrainingConfig, run / "config.yaml")
    images, _ = open_images(config.data, 3, 0, progress=False)
    batch = StepBatches(len(images), BatchPlan(8, 8, 1), 0, 0, 0, 20).global_batch(6)
    for index in range(len(images)):
        assert (images.name(index) in str(error.value)) == (index in batch)
    assert "the last time at step 6" in str(error.value) and f"{checkpoint_folder(run, 6)}" in str(error.value)
    assert all(value.isfinite().all() for value in load_file(checkpoint_folder(run, 6) / "model.safetensors").values())
    run_vae(run, "train.steps=8")
    assert metrics(run, "loss")[8] > 0


# ----------------------------------------------------------------------------------------------------------------------
# Memory and disk


def test_the_largest_micro_batch_that_fits(tmp_path: Path, vae_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of more than two images run out of memory (really: the allocator refuses): the run is that with two."""
    reference = run_vae(tmp_path / "two", "train.micro_batch_size=2")
    original = AutoencoderKL.forward

    def forward(self: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(pixels) > 2:
            torch.empty(10**15)
        return original(self, pixels, noise)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "forward", forward)
        found = run_vae(tmp_path / "auto", "train.micro_batch_size=auto")
    assert metrics(found, "loss") == metrics(reference, "loss")
    assert_same_weights(reference, found, "diffusion_pytorch_model.safetensors")
    # Nothing runs out of memory: the whole batch at once.
    whole = run_unet(tmp_path / "unet", vae_run, "train.micro_batch_size=auto", "train.steps=2")
    assert metrics(whole, "loss") == metrics(run_unet(tmp_path / "plain", vae_run, "train.steps=2"), "loss")


def test_a_full_disk_is_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError, match=r"a checkpoint needs 0.00 GB and a reserve of 0.02 GB, but "):
        run_vae(tmp_path / "run")
    assert not list(tmp_path.rglob("*.safetensors"))
