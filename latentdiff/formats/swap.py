"""A model in a folder is replaced as a whole: whatever interrupts it, the old model or the new one is there."""

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from latentdiff.formats.files import CHANGING_NAMES, TEMPORARY, sync_folder, take_name
from latentdiff.formats.locks import holding

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, see man 2 renameat2


@contextmanager
def replacing_model(folder: Path, owned: Sequence[str], last: str) -> Iterator[Path]:
    """A temporary folder whose files become the model in `folder` at the end, in place of the one that is there.

    owned: glob patterns of the files that belong to a model; those of the old model go. All else in the folder stays.
    last: the file without which a folder holds no model.
    An old model is replaced in one step: a folder of links to all else, and of the new model, trades places with it.
    Where the file system cannot do that, the files are replaced one by one, `last` at the end.
    Raises ValueError if `folder` is a file, OSError if one of the new files has the name of a folder.
    """
    folder = folder.resolve()  # a link to a folder stays
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model needs a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(_room(folder), folder.name) as staged:
        yield staged
        assert (staged / last).is_file(), f"{last} was not written"
        new = _sync_tree(staged)
        with CHANGING_NAMES:
            if not folder.is_dir():
                os.rename(staged, folder)
            else:
                in_the_way = [folder / name for name in new if (folder / name).is_dir()]
                if in_the_way:
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(in_the_way[0]))
                old = {path for pattern in owned for path in folder.glob(pattern) if not _is_folder(path)}
                if not old or not _trade(folder, staged, new, old):
                    _move(folder, staged, new, old, last)
            sync_folder(folder.parent)


def _room(folder: Path) -> Path:
    """Where to write what goes into `folder`: beside it, or in it if it is a mount point or all we may write to."""
    if not folder.is_dir():
        return folder.parent
    beside = folder.stat().st_dev == folder.parent.stat().st_dev and os.access(folder.parent, os.W_OK)
    return folder.parent if beside else folder


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, which is not followed."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself and not a link to one."""
    return path.is_dir() and not path.is_symlink()


@contextmanager
def writing_new(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that becomes `path` at the end, whole; its folder is for more, and is removed.

    Raises ValueError if there is something at `path`, which is never replaced, before or after it is written.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path.parent, path.name) as room:
        staged = room / path.name
        yield staged
        if staged.is_dir():
            _sync_tree(staged)
        with CHANGING_NAMES:
            _refuse_existing(path)
            if staged.is_dir():
                os.rename(staged, path)
            elif not take_name(path, staged):
                _refuse_existing(path)
            sync_folder(path.parent)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ValueError(f"{path} exists, delete it first or choose another name")


@contextmanager
def _temporary(parent: Path, name: str) -> Iterator[Path]:
    """A new folder that is removed at the end, if it is still there; those of dead processes are removed first."""
    prefix = f".{name[:100]}."
    for leftover in parent.glob(f"{glob.escape(prefix)}*{TEMPORARY}"):
        with suppress(FileNotFoundError), holding(leftover) as abandoned:
            if abandoned:
                shutil.rmtree(leftover, ignore_errors=True)
    with ExitStack() as stack:
        while True:
            path = parent / f"{prefix}{secrets.token_hex(8)}{TEMPORARY}"
            path.mkdir()
            with suppress(FileNotFoundError):
                if stack.enter_context(holding(path)) and path.is_dir():
                    break
            # Another process took it for abandoned before it was locked.
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _sync_tree(folder: Path) -> list[str]:
    """Wait until all files of a folder are on the disk; returns their paths, relative to it."""
    files: list[str] = []
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files.append(os.path.relpath(path, folder))
        sync_folder(Path(place))
    return sorted(files)


def _trade(folder: Path, staged: Path, new: Sequence[str], old: Collection[Path]) -> bool:
    """Let `folder` trade places with a folder of links to all of it but the old model, and of the new model.

    False if that cannot be done here; then nothing has changed.
    """
    traded = False
    # What was `folder` is removed under the other name: not by two at once.
    with holding(folder), _temporary(folder.parent, folder.name) as whole:
        try:
            _link_others(folder, whole, {*old, staged})
            for name in new:
                (whole / name).parent.mkdir(exist_ok=True)
                os.rename(staged / name, whole / name)
            for place, _, _ in os.walk(whole, topdown=False):
                sync_folder(Path(place))
            traded = _exchange(folder, whole)
        except OSError:
            pass
        finally:
            if not traded:
                for name in new:
                    if (whole / name).exists():
                        os.rename(whole / name, staged / name)
    return traded


def _link_others(source: Path, target: Path, left_out: Collection[Path]) -> None:
    """Give all else in a folder a second name in `target`; links stay links, folders that become empty are left out."""
    for path in source.iterdir():
        if path in left_out:
            continue
        if path.is_symlink():
            os.symlink(os.readlink(path), target / path.name)
        elif not path.is_dir():
            os.link(path, target / path.name)
        else:
            inside = list(path.iterdir())
            if not inside or any(entry not in left_out for entry in inside):
                (target / path.name).mkdir()
                _link_others(path, target / path.name, left_out)
    shutil.copystat(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths trade names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _move(folder: Path, staged: Path, new: Sequence[str], old: Collection[Path], last: str) -> None:
    """Put the new model's files into the folder one by one; in between it holds no model."""
    for path in sorted(old, key=lambda path: path != folder / last):
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with suppress(OSError):  # if it is empty now
                path.parent.rmdir()
    for name in sorted(new, key=lambda name: name == last):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(staged / name, folder / name)
        sync_folder((folder / name).parent)
