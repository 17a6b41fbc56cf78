"""What was found in a source is kept, and only new and changed files are read again."""

import os
import tarfile
import threading
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from latentdiff import archives
from latentdiff.config import DataConfig
from latentdiff.data import index
from latentdiff.data.captioned_images import CaptionedImages, open_images

NAMES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path / "datasets-cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded to be checked, in the order of decoding."""
    names: list[str] = []

    def content_of(entry: dict, original=index.content_of) -> bytes:
        names.append(Path(entry["path"] or "row").name)
        return original(entry)

    monkeypatch.setattr(index, "content_of", content_of)
    return names


def write(path: Path, seed: int, size: tuple[int, int] = (8, 10)) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return settled(path)


def settled(path: Path, seconds: float = 60) -> Path:
    """The file as if it had been written a minute ago."""
    os.utime(path, (time.time() - seconds,) * 2)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images with captions in .txt files."""
    folder = tmp_path / "set"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        path = write(folder / name, seed)
        path.with_suffix(".txt").write_text(f"image {path.stem}")
        settled(path.with_suffix(".txt"))
    return folder


def opened(source: Path, **config: object) -> CaptionedImages:
    images, _ = open_images(
        DataConfig(**{"holdout": 0, "source": str(source), "size": 8} | config), 3, seed=0, progress=False
    )
    return images


def seen(images: CaptionedImages) -> list[tuple]:
    """All that matters of a set."""
    pixels = [images.pixels(i).sum().item() for i in range(len(images))]
    return [images.notes, images.sizes, images.all_captions, images.digests, images.repeats, pixels]


def test_an_unchanged_folder_is_not_read_again(folder: Path, read: list[str]) -> None:
    first = opened(folder)
    assert sorted(read) == [*NAMES]
    read.clear()
    second = opened(folder)
    assert read == [] and seen(second) == seen(first)
    assert second.table.cache_files, "the table must be mapped from a file"
    assert not opened(folder, captions="none").captioned, "another question has an answer of its own"


def test_only_new_and_changed_images_are_read(folder: Path, read: list[str]) -> None:
    opened(folder)
    read.clear()
    write(folder / "b.png", seed=9, size=(20, 8))
    write(folder / "e.png", seed=5).with_suffix(".txt").write_text("image e")
    settled(folder / "e.txt")
    (folder / "c.png").unlink()
    images = opened(folder)
    assert sorted(read) == ["b.png", "e.png"]
    assert images.captions == ["image a", "image b", "image d", "image e"] and images.sizes[1] == (20, 8)
    read.clear()
    assert seen(opened(folder)) == seen(images) and read == []


def test_changed_captions_are_noticed(folder: Path, read: list[str]) -> None:
    opened(folder)
    read.clear()
    (folder / "b.txt").write_text("another caption")
    settled(folder / "b.txt", seconds=30)
    assert opened(folder).captions[1] == "another caption" and read == []


def test_files_that_were_just_written_are_read_again(folder: Path, read: list[str]) -> None:
    """A file system's clock ticks every few milliseconds; a second write within a tick would not be seen."""
    os.utime(folder / "b.png")
    opened(folder)
    read.clear()
    status = (folder / "b.png").stat()
    write(folder / "b.png", seed=9)
    os.utime(folder / "b.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (folder / "b.png").stat().st_size == status.st_size
    images = opened(folder)
    assert read == ["b.png"]
    assert images.digests[1] == index.digest_of_bytes((folder / "b.png").read_bytes())


def test_warnings_are_repeated_and_bad_files_are_tried_again(folder: Path, read: list[str]) -> None:
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[:50])
    settled(folder / "b.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    (folder / "a.png").unlink()
    settled(folder / "a.gif")
    for expected in ([*"abcd"], ["b"]):
        read.clear()
        with pytest.warns(UserWarning) as caught:
            images = opened(folder)
        assert [name.split(".")[0] for name in sorted(read)] == expected
        texts = [str(one.message) for one in caught]
        assert len(texts) == 2 and "a.gif" in texts[0] and "b.png" in texts[1] and len(images) == 3
    (folder / "b.png").write_bytes(content)
    settled(folder / "b.png")
    for expected in (["b.png"], []):
        read.clear()
        with pytest.warns(UserWarning, match=r"a\.gif"):
            assert len(opened(folder)) == 4
        assert read == expected


def test_images_of_a_table_stay_in_it(tmp_path: Path, datasets_cache: Path, read: list[str]) -> None:
    rows = [{"bytes": write(tmp_path / "a.png", i, (64, 64)).read_bytes(), "path": None} for i in range(4)]
    columns = {"picture": rows, "text": ["one", None, "three", "four"], "kind": [*"abcd"]}
    features = datasets.Features(picture=datasets.Image(), text=datasets.Value("string"), kind=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set.parquet")
    settled(tmp_path / "set.parquet")
    first = opened(tmp_path / "set.parquet", missing_captions="drop")
    assert len(read) == 3
    read.clear()
    second = opened(tmp_path / "set.parquet", missing_captions="drop")
    assert read == [] and seen(second) == seen(first) and second.captions == ["one", "three", "four"]
    assert second.table["kind"][:] == ["a", "c", "d"]
    kept = sum(path.stat().st_size for path in (datasets_cache / "latentdiff").rglob("*") if path.is_file())
    assert kept < len(rows[0]["bytes"])


@pytest.fixture
def shard(folder: Path, tmp_path: Path) -> Path:
    """The folder as a tar file."""
    with tarfile.open(tmp_path / "set.tar", "w") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)
    return settled(tmp_path / "set.tar")


def test_a_known_shard_is_not_listed(shard: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(shard)

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"{arguments} is listed")

    monkeypatch.setattr(archives, "_tar_index", refuse)
    second = opened(shard)
    assert seen(second)[1:] == seen(first)[1:] == seen(opened(folder))[1:]


def test_a_shard_that_is_replaced_while_it_is_read(shard: Path) -> None:
    images = opened(shard)
    assert images.pixels(2).shape == (3, 8, 8)
    os.utime(shard)
    with pytest.raises(OSError, match=r"c\.png cannot be read: .*set\.tar has changed"):
        images.pixels(2)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [("index.json", b"{"), ("index.json", b'{"versions": {}}'), ("*.arrow", b"\xff\xff"), ("*.arrow", None)],
)
def test_a_damaged_index_is_made_anew(
    folder: Path, datasets_cache: Path, read: list[str], pattern: str, content: bytes | None
) -> None:
    first = seen(opened(folder))
    (path,) = datasets_cache.rglob(pattern)
    path.unlink() if content is None else path.write_bytes(content)
    read.clear()
    assert seen(opened(folder)) == first and sorted(read) == [*NAMES]
    assert len([*datasets_cache.rglob("*.arrow")]) == 1


def test_without_a_place_to_keep_it_the_set_is_read_each_time(
    folder: Path, datasets_cache: Path, read: list[str]
) -> None:
    datasets_cache.write_bytes(b"a file in the way")
    assert seen(opened(folder)) == seen(opened(folder)) and len(read) == 8


def test_of_several_processes_one_reads(folder: Path, read: list[str]) -> None:
    """Threads here: each opens the lock for itself, as processes do."""
    found: list[list[tuple]] = []
    threads = [threading.Thread(target=lambda: found.append(seen(opened(folder)))) for _ in range(3)]
    with warnings.catch_warnings():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2] and len(read) == 4
