"""Files within zip and tar archives, by an address such as "set.zip::cats/0001.png"; plain paths are addresses too."""

import os
import re
import stat
import tarfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "::"
SUFFIXES = (".zip", ".tar")
_ADDRESS = re.compile(rf"(.+?\.(?:zip|tar)){SEPARATOR}(.+)", re.IGNORECASE | re.DOTALL)
MAX_MEMBER_BYTES = 2**30  # of one unpacked file; a small zip file can hold one that fills the memory


class Identity(NamedTuple):
    """What tells that a file has changed without reading it."""

    bytes: int
    modified: int  # nanoseconds since 1970


class Place(NamedTuple):
    """Where a file is in a tar file, and what tells that this has changed since."""

    start: int  # bytes
    size: int
    archive: Identity


def is_archive(path: Path) -> bool:
    """Whether this is a file that `members` can list, judged by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def address_of(archive: Path, member: str) -> str:
    """The address of a file in an archive."""
    return f"{archive}{SEPARATOR}{member}"


def members(archive: Path) -> list[str]:
    """The names of an archive's files, in its order. Raises ValueError if it is damaged or compressed as a whole."""
    if archive.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(archive) as file:
                return [info.filename for info in file.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ValueError(f"{archive} is not a usable zip file: {error}") from None
    return list(_tar_index(str(archive), *identity(str(archive))))


def file_of(address: str) -> str:
    """The path of the file, or of the archive that it is in."""
    return _split(address)[0]


def place_of(address: str) -> Place | None:
    """The place of a file in a tar file; None for others. Raises OSError if it is not there."""
    archive, member = _split(address)
    if not member or not archive.lower().endswith(".tar"):
        return None
    known = identity(archive)
    found = _tar_index(archive, *known).get(member)
    if found is None:
        raise FileNotFoundError(f"{archive} has no file {member}")
    return Place(*found, known)


def read_file(address: str, place: Place | None = None) -> bytes:
    """The bytes of a file. Raises OSError, also for what is damaged, encrypted or beyond MAX_MEMBER_BYTES.

    place: what `place_of` gave, else a tar file's index is read; OSError if the tar file has changed since.
    """
    archive, member = _split(address)
    if not member:
        if not stat.S_ISREG(os.stat(address).st_mode):
            raise OSError("not a file")  # reading a pipe would wait for ever
        return Path(address).read_bytes()
    if place is not None and place.archive != identity(archive):
        raise OSError(f"{archive} has changed")
    if place := place or place_of(address):
        start, size, _ = place
        _check_size(size)
        with open(archive, "rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{archive} is truncated")
        return content
    try:
        # One for each process: workers must not share the position in the file.
        file = _zip(archive, identity(archive), os.getpid())
        _check_size(file.getinfo(member).file_size)
        return file.read(member)
    except KeyError:
        raise FileNotFoundError(f"{archive} has no file {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError is that of an encrypted file, NotImplementedError of an unknown compression.
        raise OSError(str(error)) from None


def identity(path: str) -> Identity:
    """Of a file or an archive. Raises OSError if it is missing."""
    found = os.stat(path)
    return Identity(found.st_size, found.st_mtime_ns)


def _split(address: str) -> tuple[str, str]:
    """Archive and member; of a plain path the path and ""."""
    found = _ADDRESS.match(address)
    return (found[1], found[2]) if found and os.path.isfile(found[1]) else (address, "")


def _check_size(size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise OSError(f"it has {size} bytes, at most {MAX_MEMBER_BYTES} are read")


@lru_cache(maxsize=16)
def _zip(archive: str, known: Identity, process: int) -> zipfile.ZipFile:
    """An open zip file; known: so that a replaced one is opened again."""
    return zipfile.ZipFile(archive)


@lru_cache(maxsize=4)  # they take memory: who reads in any order gives the place
def _tar_index(archive: str, size: int, modified: int) -> dict[str, tuple[int, int]]:
    """Where a tar file's members begin, and their sizes in bytes."""
    try:
        with tarfile.open(archive, "r:") as file:
            return {one.name: (one.offset_data, one.size) for one in file if one.isreg()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{archive} is not a usable tar file (uncompressed): {error}") from None
