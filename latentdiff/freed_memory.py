"""What becomes of the memory of freed tensors on a CPU: it can stay with the process for the next ones."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Bytes: up to which a tensor is no mapping of its own, and how much free memory stays. With larger tensors among them
# the free pieces often do not fit the next ones, and decoding takes much more memory (docs/LOG.md).
_KEPT = (2**26, 2**31 - 1)
_USUAL = (2**25, 2**26)  # the most that glibc raises them to by itself
# By which users choose for themselves
_VARIABLES = {"GLIBC_TUNABLES"} | {
    f"MALLOC_{name}_" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")
}


class _Blocks:
    """How many blocks want freed memory to be kept, in all threads."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.count = 0


_blocks = _Blocks()


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within the block memory that tensors on a CPU free stays with the process; afterwards it goes back to the system.

    glibc, the C library of most Linux systems, returns it at once, and the next tensor gets it again page by page. That
    can take a fifth of the time of a decoder (docs/LOG.md). Its thresholds are the whole process's, so the outermost
    block counts. They can't be read: afterwards they are what glibc raises them to where large tensors are freed.
    Tensors of more than 64 MiB are returned all the same.
    Does nothing on GPUs, with other C libraries, and where the environment has GLIBC_TUNABLES or MALLOC_... thresholds.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    with _blocks.lock:
        _blocks.count += 1
        if _blocks.count == 1:
            _set_thresholds(libc, _KEPT)
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.count -= 1
            if _blocks.count == 0:
                _set_thresholds(libc, _USUAL)
                libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or _VARIABLES & os.environ.keys():
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _set_thresholds(libc: ctypes.CDLL, thresholds: tuple[int, int]) -> None:
    mmap_threshold, trim_threshold = thresholds
    if libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold):  # without this one the other makes it worse
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
