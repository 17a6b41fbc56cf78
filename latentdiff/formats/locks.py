"""Locks that end with the process that holds them, however it ends."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, if no one else does: True if it is held.

    The kernel releases it when the process dies. True without a lock where there are none: on Windows, and on network
    file systems that do not support them.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def holding_file(path: Path) -> Iterator[bool]:
    """The same with a file, which is made and at the end removed by who holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        held = fcntl is None or _lock(descriptor)
        if not held or _is_at(descriptor, path):
            break
        os.close(descriptor)  # its last holder removed it in the meantime
    try:
        yield held
    finally:
        if held:
            path.unlink(missing_ok=True)
        os.close(descriptor)


class FolderUse:
    """A folder in use by this process: together with others, or alone so that its files can be removed.

    It ends with `end`, when the object is collected, and with the process. Where there are no locks (see `holding`)
    everyone gets what he asks for.
    """

    def __init__(self, descriptor: int | None, alone: bool) -> None:
        self.alone = alone
        self._descriptor = descriptor
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    @classmethod
    def begin(cls, folder: Path, alone: bool) -> Self | None:
        """Use a folder, which is made if it is not there; None if another process is in the way.

        alone: as long as no one else uses it; if someone does, it is used together with him.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return cls(None, alone)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed in the meantime
            return None
        use = cls(descriptor, alone and _lock(descriptor))
        if not use.alone and not use.share():
            return None
        return use if _is_at(descriptor, folder) else None

    def share(self) -> bool:
        """Use it no longer alone; False, and it is not used, if another process was faster to take it alone."""
        self.alone = False
        return self._descriptor is None or _lock(self._descriptor, shared=True)

    def end(self) -> None:
        """Not used any more; nothing if it has ended already."""
        if self._close is not None:
            self._close()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, shared: bool = False) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True
