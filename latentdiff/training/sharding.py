"""Tensors that are spread over processes (FSDP2): whole for files and validation, filled from whole ones.

With one process or plain data parallelism every tensor is whole already, and these functions hand it through.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
