"""Saving beside the training: tensors are copied to main memory, and one thread writes them while the steps go on."""

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.config import OutputConfig
from latentdiff.distributed import on_main, whole
from latentdiff.printable import first_line
from latentdiff.training.checkpoint import TrainingState, collect, is_saved, make_room, write_checkpoint
from latentdiff.training.posthoc_ema import PowerEMA, save_snapshot

ALIGNMENT = 64  # bytes; a multiple of every element's size
PINNED_BLOCK = 2**28  # bytes; torch rounds pinned blocks up to a power of two, so one for all could be twice as large


class HostCopies:
    """Copies of tensors in main memory, whose blocks are used again: the next call overwrites the last copies.

    From NVIDIA GPUs the memory is pinned, and the device makes all copies without the host waiting for each.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._blocks: list[Tensor] = []

    def __call__(self, groups: Mapping[str, Mapping[str, Tensor]], keep: bool) -> dict[str, dict[str, Tensor]]:
        """Unsharded, row-major copies; empty where `keep` is false. Every process calls this if they are sharded."""
        sizes = [_padded(tensor) for tensors in groups.values() for tensor in tensors.values()]
        room = self._room(sizes) if keep else []
        places = iter(room)
        copies: dict[str, dict[str, Tensor]] = {}
        for group, tensors in groups.items():
            copies[group] = {}
            for name, tensor in tensors.items():
                full = whole(tensor.detach())
                if keep:
                    place = next(places)[: full.numel() * full.element_size()]
                    copies[group][name] = place.view(full.dtype).view(full.shape).copy_(full, non_blocking=True)
        if self.pinned and keep:
            torch.cuda.synchronize()
        return copies

    def _room(self, sizes: list[int]) -> list[Tensor]:
        """A place of so many bytes for each size, in blocks that are made where there are none yet."""
        block_size = min(sum(sizes), PINNED_BLOCK) if self.pinned else sum(sizes)
        places: list[Tensor] = []
        number, offset = 0, 0
        for size in sizes:
            if number < len(self._blocks) and offset + size > len(self._blocks[number]):
                number, offset = number + (offset > 0), 0
            if number < len(self._blocks) and size > len(self._blocks[number]):
                del self._blocks[number:]  # more is saved than last time
            if number == len(self._blocks):
                block = torch.empty(max(size, block_size), dtype=torch.uint8, pin_memory=self.pinned)
                self._blocks.append(block)
            places.append(self._blocks[number][offset : offset + size])
            offset += size
        return places


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class Saver:
    """Writes a run's checkpoints and snapshots in one background thread, in order.

    The loop waits only where the last checkpoint (or snapshot) is not yet written when the next one is due. After an
    error nothing more is written. Gathering sharded tensors stays in the calling thread; only rank 0 writes.
    """

    def __init__(self, run: Path, output: OutputConfig, accelerator: Accelerator) -> None:
        self.run, self.output, self.accelerator = run, output, accelerator
        self._thread = ThreadPoolExecutor(1, "saving")
        self._jobs: dict[str, Future[None]] = {}
        self._copies: dict[str, HostCopies] = {}
        self._error: Exception | None = None
        self._cancelled = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `wait` then raises why."""
        return self._error is not None

    @property
    def writing(self) -> bool:
        """Whether the thread has something left to write."""
        return not all(job.done() for job in self._jobs.values())

    def checkpoint(self, state: TrainingState) -> None:
        """Save a checkpoint, unless this step has one. Every process calls this.

        Raises what writing the one before raised, and ValueError if the disk is too full or a weight is not finite.
        """
        self._wait_for("checkpoint")
        if is_saved(self.run, state.step, self.accelerator):
            return
        make_room(self.run, state, self.accelerator)
        contents = collect(state, self.accelerator, self._copies_of("checkpoint"))
        self._submit("checkpoint", partial(write_checkpoint, self.run, contents, self.output, self._cancelled))

    def snapshot(self, step: int, power_ema: PowerEMA) -> None:
        """Save the power-function averages for `latentdiff ema`. Every process calls this. Raises as `checkpoint`."""
        self._wait_for("snapshot")
        keep = self.accelerator.is_main_process
        averages = self._copies_of("snapshot")({"averages": power_ema.state()}, keep)["averages"]
        self._submit("snapshot", lambda: save_snapshot(self.run, step, averages))

    def wait(self) -> None:
        """Until all is written. Every process calls this. Raises what writing raised."""
        for kind in ("snapshot", "checkpoint"):
            self._wait_for(kind)

    def close(self, error: BaseException | None) -> None:
        """End the thread after what it is writing; call this once. error: that of the run, None if there is none.

        After a KeyboardInterrupt the thread stops after the current file. Waits for no other process.
        """
        if isinstance(error, KeyboardInterrupt):
            self._cancelled.set()
        self._thread.shutdown()
        self._copies.clear()
        if self._error is not None and error is not self._error and not self._cancelled.is_set():
            warnings.warn(f"the newest checkpoint is not written: {first_line(self._error)}", stacklevel=2)

    def _copies_of(self, kind: str) -> HostCopies:
        return self._copies.setdefault(kind, HostCopies(self.accelerator.device))

    def _submit(self, kind: str, work: Callable[[], object]) -> None:
        if self.accelerator.is_main_process:
            self._jobs[kind] = self._thread.submit(self._do, work)

    def _do(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except Exception as error:  # of any kind: the loop raises it
                self._error = error

    def _wait_for(self, kind: str) -> None:
        def finish() -> None:
            if kind in self._jobs:
                wait([self._jobs.pop(kind)])
            if self._error is not None:
                raise self._error

        on_main(self.accelerator, finish)
