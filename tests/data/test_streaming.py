"""Data sets that are streamed: what is kept of them, what an interruption costs, and what training makes of it."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from latentdiff.config import DataConfig
from latentdiff.data import streaming
from latentdiff.data.captioned_images import CaptionedImages, open_images


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(streaming, "SHARD", 4)


def smooth(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (3, 3, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    return Image.fromarray(values.squeeze()).resize(size, Image.Resampling.BICUBIC)


def write_table(path: Path, captions: Sequence[object], text: object = None, bad: int | None = None) -> Path:
    """Images of 48 x 32 px, the last one transparent, and one of damaged bytes."""
    rows = []
    for i in range(len(captions)):
        file = io.BytesIO()
        smooth(i, (48, 32), "RGBA" if i == len(captions) - 1 else "RGB").save(file, "PNG")
        rows.append({"bytes": b"damaged" if i == bad else file.getvalue(), "path": f"{i}.png"})
    features = datasets.Features({"picture": datasets.Image(), "caption": text or datasets.Value("string")})
    datasets.Dataset.from_dict({"picture": rows, "caption": list(captions)}, features=features).to_parquet(str(path))
    return path


def opened(source: Path, folder: Path, **keys: object) -> tuple[CaptionedImages, CaptionedImages]:
    config = DataConfig(**{"holdout": 0, "source": str(source), "stream_to": str(folder), "size": 16} | keys)
    return open_images(config, 3, 0, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_are_kept_at_the_training_size(tmp_path):
    source = write_table(tmp_path / "set.parquet", [f"image {i}" for i in range(10)])
    images, held_out = opened(source, tmp_path / "kept", holdout=3)
    assert (len(images), len(held_out)) == (7, 3)
    whole, _ = open_images(DataConfig(source=str(source), size=16, holdout=3), 3, 0, progress=False)
    assert images.captions == whole.captions and images.notes[0] == f"{source}: 10 images (9 .jpg, 1 .png)"
    for i in range(7):
        assert images.image(i).size == (24, 16)  # of 48 x 32, halved
        assert (images.pixels(i) - whole.pixels(i)).abs().mean() < 0.02  # JPEG, and resized before the crop
    assert sorted(contents(tmp_path / "kept")) == ["000000.tar", "000001.tar", "000002.tar", "stream.json"]
    # The source is not needed any more.
    source.unlink()
    again, _ = opened(source, tmp_path / "kept", holdout=3)
    assert again.digests == images.digests


def test_small_images_are_not_enlarged(tmp_path):
    source = write_table(tmp_path / "set.parquet", ["a", "b"])
    assert opened(source, tmp_path / "kept", size=64)[0].image(0).size == (48, 32)


def test_an_interrupted_stream_goes_on(tmp_path, monkeypatch):
    source, folder = write_table(tmp_path / "set.parquet", [f"image {i}" for i in range(11)]), tmp_path / "kept"
    opened(source, tmp_path / "expected")
    write = streaming._write
    written: list[str] = []

    def interrupted(path: Path, *arguments: object) -> int:
        if len(written) == 2:
            path.with_suffix(".partial").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(streaming, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(source, folder)
    assert json.loads((folder / "train/stream.json").read_text()).keys() == {"source", "size", "columns"}
    monkeypatch.setattr(streaming, "_write", lambda path, *rest: written.append(path.name) or write(path, *rest))
    images, _ = opened(source, folder)
    assert written == ["000000.tar", "000001.tar", "000002.tar"] and len(images) == 11
    assert contents(folder) == contents(tmp_path / "expected")


def test_captions_and_damaged_images(tmp_path):
    texts = datasets.Sequence(datasets.Value("string"))
    source = write_table(tmp_path / "set.parquet", [["a cat", "a red cat"], [], ["a dog"]], texts, bad=2)
    with pytest.warns(UserWarning, match=r"1 of 3 images of .* are unreadable: .*000000.tar::000000002.png"):
        images, _ = opened(source, tmp_path / "kept", missing_captions="empty")
    assert images.all_captions == [["a cat", "a red cat"], [""]]
    labels = datasets.ClassLabel(names=["cat", "red_dog"])
    source = write_table(tmp_path / "labels.parquet", [1, 0], labels)
    assert opened(source, tmp_path / "labels")[0].captions == ["red dog", "cat"]
    images, _ = opened(source, tmp_path / "none", captions="none")
    assert not images.captioned and torch.equal(images.pixels(0), opened(source, tmp_path / "labels")[0].pixels(0))
    with tarfile.open(tmp_path / "none/train/000000.tar") as shard:
        assert json.load(shard.extractfile("000000000.json")) == {"caption": []}


def test_a_folder_of_other_images_is_refused(tmp_path):
    source = write_table(tmp_path / "set.parquet", ["a", "b"])
    opened(source, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"kept/train holds images of size \[16, 16\]; use a new folder, or delete"):
        opened(source, tmp_path / "kept", size=32)
    (tmp_path / "other/train").mkdir(parents=True)
    (tmp_path / "other/train/a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="other/train holds other files; use a new folder"):
        opened(source, tmp_path / "other")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match="stream_to is for data sets of the hub, but data.source '.*folder' is a local"
    ):
        opened(tmp_path / "folder", tmp_path / "new")
    with pytest.raises(ValueError, match=r"data.source 'someone/images', streamed: "):
        opened(Path("someone/images"), tmp_path / "new")
    assert len(opened(source, tmp_path / "new")[0]) == 2  # nothing was kept of that
    with pytest.raises(ValidationError, match="stream_to is for data sets of the hub, but source is embedded"):
        DataConfig(holdout=0, source="embedded", size=8, stream_to="a")
