"""What several processes share: numbers and work of the main process, whole tensors, evaluations."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def from_main(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """The main process's numbers, on every process; all must pass equally many."""
    return broadcast(torch.tensor(values, dtype=torch.long, device=accelerator.device)).tolist()


def on_all(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work`, which makes no collective calls, on every process and wait for all; if one fails, all fail."""
    error = None
    try:
        work()
    except Exception as caught:  # whatever it is: the others must not wait for this process
        error = caught
    failures = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device))
    if error is not None:
        raise error
    if failures.item() > 0:
        raise ValueError("another process failed; its message says why")


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait; if it fails there, all fail."""
    on_all(accelerator, work if accelerator.is_main_process else lambda: None)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective call if it is sharded, so every process makes it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors whole, in main memory, one after another; only where `keep` is true are they held."""
    held = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            held[name] = full.cpu().contiguous()  # as it is written: no second copy there
    return held


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into `target`, wherever it or its shards are. Every process has the same `values`."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        values = distribute_tensor(values.to(target.to_local().device), mesh, placements, src_data_rank=None)
    target.copy_(values)


def _share(count: int, accelerator: Accelerator | None) -> list[int]:
    """Which of `count` pieces of work this process does: as many as every other one, repeats filling up the last."""
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    each = -(-count // processes)
    return [i % count for i in range(rank * each, (rank + 1) * each)]


def _batches(indices: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    for first in range(0, len(indices), batch_size):
        yield list(indices[first : first + batch_size])


def _gather(results: Tensor, count: int, accelerator: Accelerator | None) -> Tensor:
    """The results [each, ...] of every process's share, in order, without the repeats: [count, ...] on the CPU."""
    return (results if accelerator is None else accelerator.gather(results))[:count].cpu()
