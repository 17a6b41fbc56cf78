"""Saving beside the training."""

import errno
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file
from scripts import ROOT, arguments, assert_same_weights, finish, run_unet, start
from states import LENGTHS, equal, moments, names_in, new_state, output, same_state, steps_in, train
from torch import Tensor

from latentdiff.training import checkpoint, posthoc_ema
from latentdiff.training.checkpoint import checkpoint_folder, resume, save_checkpoint
from latentdiff.training.posthoc_ema import SNAPSHOTS
from latentdiff.training.saving import HostCopies, Saver

WRITE = checkpoint.write_safetensors


class Gate:
    """A writer that waits before its first file until it is opened, and then fails if it has an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.reached, self.opened = error, threading.Event(), threading.Event()

    def __call__(self, tensors: dict[str, Tensor], path: Path, *options: object) -> None:
        self.reached.set()
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        WRITE(tensors, path, *options)


@pytest.fixture
def saver(tmp_path: Path, accelerator: Accelerator) -> Iterator[Saver]:
    saver = Saver(tmp_path, output(2), accelerator)
    yield saver
    saver.close(saver._error)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gate]:
    def make(error: Exception | None = None) -> Gate:
        gate = Gate(error)
        monkeypatch.setattr(checkpoint, "write_safetensors", gate)
        monkeypatch.setattr(posthoc_ema, "write_safetensors", gate)
        return gate

    return make


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, accelerator, saver, gated):
    """It holds the state of when it was asked for, and is the same as one that the loop waits for."""
    state = new_state(accelerator, lengths=LENGTHS)
    train(state, 3)
    save_checkpoint(tmp_path / "waited", state, output(), accelerator)
    gate = gated()
    saver.checkpoint(state)
    assert gate.reached.wait(30) and steps_in(tmp_path) == []
    train(state, 6)
    assert steps_in(tmp_path) == [] and saver.writing and not saver.failed
    gate.opened.set()
    saver.wait()
    assert not saver.writing
    folder, waited = checkpoint_folder(tmp_path, 3), checkpoint_folder(tmp_path / "waited", 3)
    assert names_in(folder) == names_in(waited)
    for name in names_in(folder):
        assert (folder / name).read_bytes() == (waited / name).read_bytes()
    resumed = new_state(accelerator, seed=1, lengths=LENGTHS)
    assert resume(tmp_path, resumed, "latest", accelerator) and resumed.step == 3
    train(resumed, 6)
    assert same_state(resumed, state)


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path, accelerator, saver, gated):
    state = new_state(accelerator)
    for step in (1, 2):
        train(state, step)
        saver.checkpoint(state)
    saver.wait()
    gate = gated()
    train(state, 3)
    saver.checkpoint(state)
    assert gate.reached.wait(30) and steps_in(tmp_path) == [1, 2]
    gate.opened.set()
    saver.wait()
    assert steps_in(tmp_path) == [2, 3]


def test_the_next_checkpoint_waits_for_the_last(tmp_path, accelerator, saver, gated):
    """Else its copies would overwrite those that are being written."""
    state = new_state(accelerator)
    train(state, 1)
    first = moments(state)
    gate = gated()
    saver.checkpoint(state)
    assert gate.reached.wait(30)
    timer = threading.Timer(0.3, gate.opened.set)
    timer.start()
    train(state, 2)
    saver.checkpoint(state)
    assert gate.opened.is_set() and steps_in(tmp_path)[0] == 1
    saver.wait()
    written = load_file(checkpoint_folder(tmp_path, 1) / "optimizer.safetensors")
    assert equal(written, {name: tensor.contiguous() for name, tensor in first.items()})
    assert not equal(load_file(checkpoint_folder(tmp_path, 2) / "optimizer.safetensors"), written)


def test_an_error_of_the_thread_is_raised_once_it_is_asked_for(tmp_path, accelerator, saver, gated):
    """Nothing is written after it: a checkpoint says that the snapshots before it are there."""
    state = new_state(accelerator, lengths=LENGTHS)
    train(state, 1)
    saver.checkpoint(state)
    saver.wait()
    gate = gated(OSError(errno.ENOSPC, "No space left on device"))
    train(state, 2)
    saver.snapshot(2, state.power_ema)
    saver.checkpoint(state)
    assert not saver.failed
    gate.opened.set()
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            saver.wait()
        assert saver.failed
    with pytest.raises(OSError, match="No space left"):
        saver.checkpoint(state)
    assert steps_in(tmp_path) == [1] and not (tmp_path / SNAPSHOTS).exists()
    with pytest.warns(UserWarning, match=r"the newest checkpoint is not written: .*No space left"):
        saver.close(RuntimeError("something else"))


def test_what_is_not_finite_is_an_error_at_once(tmp_path, accelerator, saver):
    state = new_state(accelerator)
    train(state, 1)
    with torch.no_grad():
        next(iter(state.ema.average.values()))[0] = float("-inf")
    with pytest.raises(ValueError, match="no checkpoint is written at step 1: its ema has values .* not finite"):
        saver.checkpoint(state)
    assert steps_in(tmp_path) == [] and not saver.failed


def test_an_interrupt_ends_the_thread_after_the_current_file(tmp_path, accelerator, gated):
    state = new_state(accelerator)
    train(state, 1)
    saver = Saver(tmp_path, output(), accelerator)
    gate = gated()
    saver.checkpoint(state)
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saver.close(KeyboardInterrupt())
    assert names_in(tmp_path / "checkpoints") == [".step_00000001.tmp"]
    assert names_in(tmp_path / "checkpoints" / ".step_00000001.tmp") == ["model.safetensors"]


def test_snapshot_holds_the_averages(tmp_path, accelerator, saver):
    state = new_state(accelerator, lengths=LENGTHS)
    train(state, 3)
    expected = {name: tensor.clone() for name, tensor in state.power_ema.state().items()}
    saver.snapshot(3, state.power_ema)
    train(state, 4)
    saver.wait()
    assert equal(load_file(tmp_path / SNAPSHOTS / "step_00000003.safetensors"), expected)
    PartialState().process_index = 1
    saver.snapshot(4, state.power_ema)
    saver.wait()
    assert names_in(tmp_path / SNAPSHOTS) == ["step_00000003.safetensors"]


def test_copies_use_their_memory_again() -> None:
    """Of any type and layout, and of more tensors than the last time."""
    tensors = {
        "channels last": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "half": torch.randn(9).to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
        "whole numbers": torch.arange(5),
    }
    copies = HostCopies(torch.device("cpu"))
    for _ in range(2):
        first = copies({"a": {"step": tensors["step"]}, "b": tensors}, keep=True)
        assert all(torch.equal(first["b"][name], tensor) for name, tensor in tensors.items())
        assert all(copy.is_contiguous() for copy in first["b"].values())
    places = [tensor.data_ptr() for tensor in first["b"].values() if tensor.numel()]
    second = copies({"a": {"step": tensors["step"] + 1}, "b": tensors}, keep=True)
    assert [tensor.data_ptr() for tensor in second["b"].values() if tensor.numel()] == places
    assert float(second["a"]["step"]) == 4.0 == float(first["a"]["step"])
    more = copies({"b": tensors, "c": {"large": torch.ones(10**5)}}, keep=True)
    assert torch.equal(more["c"]["large"], torch.ones(10**5)) and torch.equal(more["b"]["half"], tensors["half"])
    assert copies({"b": tensors}, keep=False) == {"b": {}}


def test_blocks_for_pinned_memory_hold_whole_tensors(monkeypatch) -> None:
    """Small blocks, as if pinned: what does not fit begins a new one, and what is larger has one of its own."""
    monkeypatch.setattr("latentdiff.training.saving.PINNED_BLOCK", 256)
    copies = HostCopies(torch.device("cpu"))
    copies.pinned = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, pin_memory: plain(*size, dtype=dtype))
    sizes = [50, 40, 1, 200, 3, 64, 64, 10]  # of float32
    for factor in (1, 2):
        tensors = {str(i): torch.full((n,), float(factor * i)) for i, n in enumerate(sizes)}
        copied = copies({"a": tensors}, keep=True)["a"]
        assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())
        # 208 | 160 + 64 | 800 | 64, with 192 free | 256 | 256 | 64
        assert [len(block) for block in copies._blocks] == [256, 256, 832, 256, 256, 256, 256]


# ----------------------------------------------------------------------------------------------------------------------
# The scripts

SLOW = f"""
import os, sys, time
sys.path[:0] = ["{ROOT}"]
from latentdiff.training import checkpoint
write = checkpoint.write_safetensors
def slow(tensors, path):
    write(tensors, path)
    time.sleep(SECONDS)
    FAILURE
checkpoint.write_safetensors = slow
import train_unet
from latentdiff.training.arguments import run_as_command
run_as_command(train_unet.main, sys.argv[1:])
"""
EVERY_TWO = ["train.steps=12", "output.checkpoint_every=2", "validation.every=12", "validation.sample_every=12"]


def slow_writer(seconds: float, failure: str = "") -> list[str]:
    return ["-c", SLOW.replace("SECONDS", str(seconds)).replace("FAILURE", failure)]


def to_itself(number: signal.Signals) -> str:
    return f"os.kill(os.getpid(), {int(number)})"


@pytest.mark.runs
def test_killed_while_the_thread_writes(tmp_path: Path, vae_run: Path) -> None:
    """Steps were done meanwhile; the checkpoint before is what resume takes, and the end has the same bits."""
    straight = run_unet(tmp_path / "straight", vae_run, *EVERY_TWO)
    run = tmp_path / "run"
    kill = f"path.parent.name.startswith('.step_00000004') and {to_itself(signal.SIGKILL)}"
    process = start([*slow_writer(0.02, kill), *arguments(2, run, vae_run, *EVERY_TWO)[1:]])
    finish(process, expected=-signal.SIGKILL)
    assert names_in(run / "checkpoints") == [".step_00000004.tmp", "step_00000002"]
    assert names_in(run / "checkpoints" / ".step_00000004.tmp") == ["data.json", "model.safetensors"]
    run_unet(run, vae_run, *EVERY_TWO)
    for name in ("model", "ema", "optimizer", "loss_meter", "best"):
        assert_same_weights(straight, run, f"checkpoints/step_{12:08d}/{name}.safetensors")


@pytest.mark.runs
def test_a_full_disk_ends_the_run_in_one_line(tmp_path: Path, vae_run: Path) -> None:
    run = tmp_path / "run"
    full = "if path.parent.name.startswith('.step_00000004'): raise OSError(28, 'No space left on device', str(path))"
    process = start([*slow_writer(0.0, full), *arguments(2, run, vae_run, *EVERY_TWO)[1:]])
    output = finish(process, expected=1)
    assert "error: [Errno 28] No space left on device: " in output and "Traceback" not in output
    assert steps_in(run) == [2]


@pytest.mark.runs
def test_a_stop_waits_for_the_file(tmp_path: Path, vae_run: Path) -> None:
    """A signal while a checkpoint is written: that one is finished, then the one of the stop."""
    run = tmp_path / "run"
    term = f"path.name == 'model.safetensors' and {to_itself(signal.SIGTERM)}"
    process = start([*slow_writer(0.1, term), *arguments(2, run, vae_run, *EVERY_TWO, "output.keep=9")[1:]])
    output = finish(process)
    steps = steps_in(run)
    assert steps[0] == 2 and f"SIGTERM: saved at step {steps[-1]} in {run}" in output and "Traceback" not in output
