"""What several processes must agree on. Plain tensors are sent, nothing is pickled."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


def from_main(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """The main process's numbers, on every process; all must pass equally many."""
    return broadcast(torch.tensor(values, dtype=torch.long, device=accelerator.device)).tolist()


def together(accelerator: Accelerator, work: Callable[[], None]) -> None:
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
    together(accelerator, work if accelerator.is_main_process else lambda: None)
