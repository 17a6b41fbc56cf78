"""Several processes, gradient accumulation and sharded weights: the same run as one process, up to rounding."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, arguments, finish, launch, metrics, run_unet, run_vae, start

from latentdiff.training.checkpoint import checkpoint_folder

# 20 steps, so that what differs would have time to grow.
LONGER = ["train.steps=20", "validation.every=10", "output.checkpoint_every=10", "optimizer.lr_schedule=constant"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> dict[int, Path]:
    """Each stage on one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {1: run_vae(folder / "vae", *LONGER), 2: run_unet(folder / "unet", vae_run, *LONGER)}


KEYS = ["loss", "validation/loss", "validation/baseline", "validation/mse", "validation/psnr"]


def assert_same_curves(run: Path, expected: Path) -> None:
    """To the relative 1e-5 of float32 sums in another order. A run may have been validated at further steps."""
    for key in KEYS:
        values, wanted = metrics(run, key), metrics(expected, key)
        assert wanted.keys() <= values.keys(), key
        for step, value in wanted.items():
            assert values[step] == pytest.approx(value, rel=1e-5, abs=0), (key, step)
    assert list(metrics(run, "loss")) == list(range(1, 21))


@pytest.mark.runs
@pytest.mark.parametrize(
    ("stage", "processes"), [(1, 2), (2, 2), *(pytest.param(stage, 4, marks=pytest.mark.slow) for stage in (1, 2))]
)
def test_processes_follow_the_same_curve(
    stage: int, processes: int, tmp_path: Path, vae_run: Path, alone: dict[int, Path]
) -> None:
    output = launch(processes, arguments(stage, tmp_path / "run", vae_run, *LONGER))
    assert f"batch 8 = {8 // processes} x {processes} processes x 1 accumulated" in output
    assert_same_curves(tmp_path / "run", alone[stage])


@pytest.mark.runs
@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_follows_the_same_curve(
    stage: int, micro: int, tmp_path: Path, vae_run: Path, alone: dict[int, Path]
) -> None:
    overrides = [*LONGER, f"train.micro_batch_size={micro}"]
    run_vae(tmp_path, *overrides) if stage == 1 else run_unet(tmp_path, vae_run, *overrides)
    assert_same_curves(tmp_path, alone[stage])


@pytest.mark.runs
def test_resume_on_another_number_of_processes(tmp_path: Path, vae_run: Path, alone: dict[int, Path]) -> None:
    """Ten steps on one process, five on two with accumulation, the last five on one."""
    folder = tmp_path / "run"
    run_unet(folder, vae_run, *LONGER, "train.steps=10")
    command = arguments(2, folder, vae_run, *LONGER, "train.steps=15", "train.micro_batch_size=2")
    assert "resumed from" in launch(2, command)
    run_unet(folder, vae_run, *LONGER)
    assert_same_curves(folder, alone[2])


FSDP = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2-cpu.yaml")]


@pytest.mark.runs
def test_sharded_weights_follow_the_same_curve(tmp_path: Path, vae_run: Path, alone: dict[int, Path]) -> None:
    """FSDP2 through Accelerate's own config: trains, saves whole tensors, resumes; one process continues from them."""
    folder = tmp_path / "run"
    command = arguments(2, folder, vae_run, *LONGER, "ema.snapshot_every=10")
    assert "(FSDP2)" in launch(2, [*command, "train.steps=10"], *FSDP)
    for name in ("model", "ema"):
        mine, expected = (load_file(checkpoint_folder(run, 10) / f"{name}.safetensors") for run in (folder, alone[2]))
        assert {key: value.shape for key, value in mine.items()} == {k: v.shape for k, v in expected.items()}
    assert "resumed from" in launch(2, [*command, "train.steps=15"], *FSDP)
    run_unet(folder, vae_run, *LONGER, "ema.snapshot_every=10")
    assert_same_curves(folder, alone[2])
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        mine, expected = (load_file(run / f"{name}.safetensors") for run in (folder, alone[2]))
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, atol=2e-4, rtol=1e-3)


@pytest.mark.runs
@pytest.mark.slow
def test_sharded_weights_with_compiled_blocks_follow_the_same_curve(
    tmp_path: Path, vae_run: Path, alone: dict[int, Path]
) -> None:
    """In float32; saved, resumed, and continued by one process without compilation."""
    folder = tmp_path / "run"
    command = arguments(2, folder, vae_run, *LONGER, "train.compile=blocks")
    for steps in (10, 15):
        assert "(FSDP2)" in launch(2, [*command, f"train.steps={steps}"], *FSDP)
    run_unet(folder, vae_run, *LONGER)
    assert_same_curves(folder, alone[2])
    mine, expected = (load_file(run / "unet/diffusion_pytorch_model.safetensors") for run in (folder, alone[2]))
    assert mine.keys() == expected.keys()


@pytest.mark.runs
def test_processes_that_are_not_joined_are_refused(tmp_path: Path) -> None:
    """Else each would train alone, and all would write into the same folder."""
    if torch.cuda.is_available():
        pytest.skip("with GPUs they are joined")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = finish(start([*launcher, *arguments(1, tmp_path / "run")]), expected=1)
    assert "started as one of 2 processes, but they are not joined; without GPUs, set ACCELERATE_USE_CPU" in output
    assert not (tmp_path / "run").exists()


AGREEMENT = """
import os, signal, sys
import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from latentdiff.data.batches import BatchPlan
from latentdiff.training.accelerator import fit_micro_batch
from latentdiff.training.arguments import run_as_command
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.optimizer import apply_gradients, backward, clip_gradients, synchronising
from latentdiff.training.stopping import StopRequest

def main(arguments):
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index

    # A loss that is not finite on one process (its gradient is): all skip, and the next step counts again.
    bare = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), lr=0.1, fused=True))
    loss_meter = LossMeter(["loss"], accelerator)
    for step, added in enumerate([(1.0, 2.0), (1.0, float("inf")), (3.0, 6.0)]):
        before = [p.detach().clone() for p in bare.parameters()]
        output = model(torch.ones(1, 1)).sum()
        loss = output - output.detach() + added[rank]
        backward(accelerator, loss, 1.0)
        loss_meter.add({"loss": loss}, 1.0)
        skip = loss_meter.close(step, clip_gradients(accelerator, model, None))
        apply_gradients(accelerator, optimizer, skip)
        assert skip.item() == (step == 1), (rank, step)
        assert (step == 1) == all(torch.equal(a, b) for a, b in zip(before, bare.parameters())), (rank, step)
    window = loss_meter.read()
    assert abs(window.means["loss"] - 3.0) < 1e-6 and window.skipped == 1, window
    assert (window.longest_skip_streak, window.last_skipped_step) == (1, 1), window

    # Gradients are exchanged once per step, for any accumulation.
    exchanges = []

    def counting(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counting)
    for micro_step in range(4):
        with synchronising(accelerator, model, last=micro_step == 3):
            backward(accelerator, model(torch.full((1, 1), rank + 1.0)).sum(), 0.25)
    assert exchanges == [0], exchanges
    assert bare.weight.grad.item() == 1.5

    # A signal to one process: all stop before the same step.
    seen = []
    with StopRequest(accelerator) as stop:
        for step in range(6):
            if step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(stop.agreed()[0])
            if seen[-1]:
                break
    assert seen == [None] * 4 + ["SIGTERM"], seen

    # A failure of the first process beside its steps: all know of it before the same step.
    seen = []
    with StopRequest(accelerator) as stop:
        while not seen or not seen[-1][1]:
            seen.append(stop.agreed(failed=rank == 0 and len(seen) >= 2))
    assert seen == [(None, False)] * 3 + [(None, True)], seen

    # The micro-batch that fits on the process with the least memory.
    layer = torch.nn.Linear(1, 1)

    def trial(micro):
        if micro > (8, 2)[rank]:
            torch.empty(10**15)
        return layer(torch.ones(micro, 1)).sum()

    plan = fit_micro_batch(accelerator, BatchPlan(16, 8, 2), layer, trial)
    assert plan == BatchPlan(16, 2, 2), plan
    sys.stdout.write(f"agreed {rank}\\n")  # in one piece
    accelerator.end_training()

run_as_command(main)
"""


@pytest.mark.runs
def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "agreement.py"
    script.write_text(AGREEMENT, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = finish(start([*launcher, str(script)], ACCELERATE_USE_CPU="true"))
    assert "agreed 0" in output and "agreed 1" in output


THREADS_LEFT = """
import os
from pathlib import Path
from latentdiff.training.arguments import run_as_command
from train_unet import main

run_as_command(main)
threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
os.write(1, f"left {[name for name in threads if 'gloo' in name]}\\n".encode())
"""


@pytest.mark.runs
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_outlives_a_run(tmp_path: Path, vae_run: Path) -> None:
    """A thread of gloo that lets go of a tensor after the interpreter has ended aborts the process."""
    script = tmp_path / "train.py"
    script.write_text(THREADS_LEFT, encoding="utf-8")
    _, *command = arguments(2, tmp_path / "run", vae_run, "train.steps=2")
    assert launch(2, [str(script), *command]).count("left []") == 2


@pytest.mark.runs
@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
@pytest.mark.parametrize("killed", ["launcher", "worker"])
def test_killed_processes_leave_no_others_behind(killed: str, tmp_path: Path) -> None:
    """The launcher is killed: its processes save and stop. One of them is killed: the others end in one line."""
    command = arguments(1, tmp_path, None, "train.steps=100000", "validation.every=100000", "logging.every=100000")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = start([*launcher, *command], ACCELERATE_USE_CPU="true")
    try:
        while not checkpoint_folder(tmp_path, 3).exists():
            assert run.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(run.pid).children()
        assert len(workers) == 2
        (run if killed == "launcher" else workers[1]).send_signal(signal.SIGKILL)
        output, _ = run.communicate(timeout=60)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    finally:
        run.kill()
    assert ("SIGTERM: saved at step" in output) == (killed == "launcher"), output
    assert ("error: another process of this run has ended or does not answer" in output) == (killed == "worker"), output
