"""Stopping a run early without losing a step: SIGTERM, SIGUSR1 (pre-emption) and Ctrl-C."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import distributed

FAILED = 1000  # exchanged in place of a signal's number, and greater than any
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class StopRequest:
    """Within the block, a signal asks the run to save and stop instead of killing it; a second Ctrl-C kills it.

    A signal may reach the processes of a run at different moments, or only one of them. So each step starts an exchange
    of flags between the hosts (gloo, without waiting for a device), which is read at the next step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received = 0
        self.previous: dict[int, Any] = {}
        shared = accelerator.num_processes > 1
        self.group: Any = distributed.new_group(backend="gloo") if shared else None
        self.exchange: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.exchange is not None and kind is None:
            self.exchange[0].wait()

    def agreed(self, failed: bool = False) -> tuple[str | None, bool]:
        """The signal for which all processes stop before this step, or None; and whether one of them has `failed`.

        Each calls this once per step.
        """
        if self.group is None:
            return _name(self.received), failed
        agreed = 0
        if self.exchange is not None:
            self.exchange[0].wait()
            agreed = int(self.exchange[1])
        flag = torch.tensor(FAILED if failed else self.received)
        self.exchange = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self.group, async_op=True), flag
        return _name(agreed if agreed != FAILED else 0), agreed == FAILED

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _name(number: int) -> str | None:
    return signal.Signals(number).name if number else None
