"""Work shared by several processes: run on main, broadcast, gather unsharded tensors. Nothing is pickled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def from_main(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """Broadcast the main process's numbers; every process must pass equally many."""
    received: Any = broadcast(torch.tensor(values, dtype=torch.long, device=accelerator.device))
    return received.tolist()


def on_all(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Run `work`, which makes no collective calls, on every process and wait; if one fails, all fail."""
    error = None
    try:
        work()
    except Exception as caught:  # of any kind: the other processes must not wait for this one
        error = caught
    failures: Any = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device))
    if error is not None:
        raise error
    if failures.item() > 0:
        raise ValueError("another process failed; its message says why")


def on_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Run `work` on the main process while the others wait; if it fails there, all fail."""
    on_all(accelerator, work if accelerator.is_main_process else lambda: None)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. A collective call if it is sharded (FSDP2): every process makes it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors unsharded, in main memory, gathered one after another; empty where `keep` is false."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()  # contiguous, so that writing it needs no second copy
    return gathered


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy an unsharded tensor into `target`, which may be sharded. Every process has the same `values`."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        values = distribute_tensor(values.to(target.to_local().device), mesh, placements, src_data_rank=None)
    target.copy_(values)


def shared_indices(count: int, accelerator: Accelerator | None) -> list[int]:
    """The indices in 0 .. count - 1 that this process works on: equally many on each, so the last ones may repeat."""
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    each = -(-count // processes)
    return [i % count for i in range(rank * each, (rank + 1) * each)]


def chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """The indices in order, `size` at a time."""
    for first in range(0, len(indices), size):
        yield list(indices[first : first + size])


def gather_rows(rows: Tensor, count: int, accelerator: Accelerator | None) -> Tensor:
    """One row for each of every process's `shared_indices`, [each, ...] -> all in order, [count, ...] on the CPU."""
    gathered: Any = rows if accelerator is None else accelerator.gather(rows)
    return gathered[:count].cpu()
