"""Whether other processes use the cores of a run on a CPU: then its threads spin while they wait for one another."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")  # of Linux
LEAST_SECONDS = 20.0  # for which a share is taken
TOO_MUCH = 0.3  # a run alone on its cores has 0 to 0.15, one beside one busy process 0.8 (docs/LOG.md)


def seconds_waited() -> float | None:
    """Seconds for which threads of this process were ready to run and had no core, all added up; None if unknown."""
    waited = 0
    try:
        for task in TASKS.iterdir():
            try:
                waited += int((task / "schedstat").read_text().split()[1])
            except FileNotFoundError:  # a thread that has just ended
                continue
    except (OSError, ValueError, IndexError):  # no Linux, or a kernel without the numbers
        return None
    return waited / 1e9


class CrowdWatch:
    """Warns, once, if this process's threads wait for cores that others use.

    Only with several threads: they wait for one another at each operation, so that a step takes many times as long
    when one of them has no core. A single thread only gets its share of the core.
    """

    def __init__(self, device: torch.device, waited: Callable[[], float | None] = seconds_waited) -> None:
        self.threads = torch.get_num_threads()
        self.waited = waited
        self.watching = device.type == "cpu" and self.threads > 1
        self._start: tuple[float, float] | None = None

    def look(self, own_work: bool = False, now: float | None = None) -> None:
        """Call this now and then between steps; it reads a few small files, at most every `LEAST_SECONDS`.

        own_work: whether another thread of the run is at work, which is no reason to warn.
        """
        if not self.watching:
            return
        if own_work:
            self._start = None
            return
        now = time.perf_counter() if now is None else now
        if self._start is not None and now - self._start[0] < LEAST_SECONDS:
            return
        waited = self.waited()
        if waited is None:
            self.watching = False
            return
        if self._start is not None:
            share = (waited - self._start[1]) / (now - self._start[0])
            if share > TOO_MUCH:
                self.watching = False
                warnings.warn(
                    f"other processes use these cores: the {self.threads} threads of this run wait for one "
                    f"{min(1.0, share / self.threads):.0%} of the time, and each waits for the others; run with "
                    "OMP_NUM_THREADS=1, or stop the other processes",
                    stacklevel=2,
                )
        self._start = now, waited
