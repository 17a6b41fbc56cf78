"""The files of a folder, a zip file or tar shards under their relative paths; which of them are images."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from latentdiff.archives import address_of, is_archive, members, read_file
from latentdiff.images import FORMATS, HEIF_SUFFIXES

IGNORED_FOLDERS = ("__MACOSX",)  # what macOS adds to zip files


@dataclass(frozen=True)
class FileTree:
    """Addresses (see `latentdiff.archives`) by relative path, sorted by path. source: as the user named it."""

    source: str
    files: dict[str, str]

    @classmethod
    def of_folder(cls, source: str, folder: Path) -> "FileTree":
        """All files of a folder and its sub-folders, linked ones too; of a folder without images, of its archives.

        Hidden files are left out.
        """
        files = {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in walk(folder)}
        tree = cls(source, dict(sorted(files.items())))
        archives = [Path(address) for address in tree.files.values() if is_archive(Path(address))]
        return cls.of_archives(source, archives) if archives and not tree.images() else tree

    @classmethod
    def of_archives(cls, source: str, archives: Iterable[Path]) -> "FileTree":
        """All files of zip and tar files; with several archives each one is like a folder of its name."""
        archives = list(archives)
        files: dict[str, str] = {}
        for archive in archives:
            for member in members(archive):
                parts = [part for part in member.split("/") if part not in ("", ".", "..")]
                if all(map(_visible, parts)):
                    relative = "/".join([archive.name, *parts] if len(archives) > 1 else parts)
                    files[relative] = address_of(archive, member)
        return cls(source, dict(sorted(files.items())))

    def images(self, split: str | None = None) -> list[str]:
        """The relative paths of the images, of all or of the sub-folder `split`."""
        suffixes = image_suffixes()
        inside = "" if split is None else f"{split}/"
        return [path for path in self.files if path.startswith(inside) and suffix_of(path) in suffixes]

    def text(self, path: str) -> str:
        """A text file's content; ValueError if it is not UTF-8 (or UTF-16 with its mark) or cannot be read."""
        try:
            content = read_file(self.files[path])
            return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except OSError as error:
            raise ValueError(f"{self.files[path]} cannot be read: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{self.files[path]} is not UTF-8 text") from None

    def folders(self) -> list[str]:
        """The names of the folders at the top that hold images."""
        return sorted({path.split("/")[0] for path in self.images() if "/" in path})


def walk(folder: Path) -> Iterator[str]:
    """The files of a folder and its sub-folders, linked ones too, without hidden ones."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder above it, or to one that was read
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if _visible(name))
        yield from (os.path.join(parent, name) for name in sorted(names) if _visible(name))


def suffix_of(path: str) -> str:
    """Such as ".png", in small letters."""
    return posixpath.splitext(path)[1].lower()


def image_suffixes() -> set[str]:
    """The suffixes of the formats that are read."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS} | set(HEIF_SUFFIXES)


def by_suffix(paths: Iterable[str]) -> str:
    """How many files of each kind, such as "24 .jpg, 3 .avif"."""
    counts = Counter(suffix_of(path) or "without a suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in IGNORED_FOLDERS
