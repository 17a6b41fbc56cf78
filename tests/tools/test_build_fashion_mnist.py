"""tools/build_fashion_mnist.py on small idx files."""

import gzip
import itertools
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import open_images
from tools.build_fashion_mnist import build_fashion_mnist, main

# As the dataset on the hub spells them.
NAMES = "T - shirt / top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
TRAIN_LABELS = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9]
TEST_LABELS = [7, 7, 2]


def idx_images(images: np.ndarray) -> bytes:
    return bytes([0, 0, 8, 3]) + struct.pack(">iii", *images.shape) + images.tobytes()


def idx_labels(labels: list[int]) -> bytes:
    return bytes([0, 0, 8, 1]) + struct.pack(">i", len(labels)) + bytes(labels)


def some_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


TRAIN, TEST = some_images(len(TRAIN_LABELS), 0), some_images(len(TEST_LABELS), 1)


def write(folder: Path, name: str, content: bytes, *, zipped: bool) -> None:
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)


def write_all(folder: Path, *, zipped: bool) -> Path:
    folder.mkdir()
    write(folder, "train-images-idx3-ubyte", idx_images(TRAIN), zipped=zipped)
    write(folder, "train-labels-idx1-ubyte", idx_labels(TRAIN_LABELS), zipped=zipped)
    write(folder, "t10k-images-idx3-ubyte", idx_images(TEST), zipped=zipped)
    write(folder, "t10k-labels-idx1-ubyte", idx_labels(TEST_LABELS), zipped=zipped)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data_config(out: Path, **values: object) -> DataConfig:
    settings = {"source": str(out), "split": "train", "validation_split": "test", "caption_column": "label", "size": 28}
    return DataConfig(**settings | values)


@pytest.mark.parametrize("zipped", [True, False])
def test_pixels_and_captions_are_those_of_the_idx_files(tmp_path, zipped):
    counts = build_fashion_mnist(tmp_path / "out", write_all(tmp_path / "idx", zipped=zipped), progress=False)
    assert counts == {"train": 12, "test": 3}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    opened = open_images(data_config(tmp_path / "out"), 1, 0, progress=False)
    for split, images, labels in zip(opened, (TRAIN, TEST), (TRAIN_LABELS, TEST_LABELS), strict=True):
        assert split.captions == [NAMES[label] for label in labels]
        read = np.stack([np.asarray(split.image(i)) for i in range(len(split))])
        assert read.dtype == np.uint8 and np.array_equal(read, images)
        assert torch.equal(split.first(99)[:, 0], torch.from_numpy(images).float() / 127.5 - 1)


def test_columns_are_those_of_the_hub(tmp_path):
    build_fashion_mnist(tmp_path / "out", write_all(tmp_path / "idx", zipped=True), progress=False)
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert table.features == {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    assert table["label"][:] == TRAIN_LABELS
    assert table[0]["image"].format == "PNG" and table[0]["image"].mode == "L"


def test_command_converts_for_use_without_captions(tmp_path, capsys):
    idx = write_all(tmp_path / "idx", zipped=True)
    main([str(tmp_path / "out"), "--idx", str(idx), "--no-progress"])
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}: 12 images in train.parquet, 3 images in test.parquet\n"
    assert printed.err == ""
    training, held_out = open_images(data_config(tmp_path / "out", captions="none", size=32), 1, 0, False)
    assert training.captions == [""] * 12 and held_out.first(3).shape == (3, 1, 32, 32)


def test_building_again_replaces_the_files(tmp_path):
    idx = write_all(tmp_path / "idx", zipped=False)
    build_fashion_mnist(tmp_path / "out", idx, progress=False)
    write(idx, "t10k-images-idx3-ubyte", idx_images(TEST[:2]), zipped=False)
    write(idx, "t10k-labels-idx1-ubyte", idx_labels([4, 5]), zipped=False)
    assert build_fashion_mnist(tmp_path / "out", idx, progress=False) == {"train": 12, "test": 2}
    _, held_out = open_images(data_config(tmp_path / "out"), 1, 0, progress=False)
    assert held_out.captions == ["Coat", "Sandal"]


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def starts(found: str, magic: str) -> str:
    return f"starts with {found}, not with the magic number {magic}"


WRONG = {
    "labels for images": (IMAGES, idx_labels(TEST_LABELS), starts("0x00000801", "0x00000803")),
    "images for labels": (LABELS, idx_images(TEST), starts("0x00000803", "0x00000801")),
    "other type": (IMAGES, b"\0\0\x0d\3" + idx_images(TEST)[4:], starts("0x00000d03", "0x00000803")),
    "no header": (IMAGES, idx_images(TEST)[:15], "has 15 bytes, less than the 16 of an idx header"),
    "empty file": (LABELS, b"", starts("0x", "0x00000801")),
    "cut short": (
        IMAGES,
        idx_images(TEST)[:-1],
        "has 2351 bytes after the header, not the 3 x 28 x 28",
    ),
    "too long": (LABELS, idx_labels(TEST_LABELS) + b"\0", "has 4 bytes after the header, not the 3 that it declares"),
    "side": (IMAGES, idx_images(np.zeros((3, 28, 32), np.uint8)), "the images have 28 x 32 pixels, not 28 x 28"),
    "no image": (IMAGES, idx_images(TEST[:0]), "holds no image"),
    "counts": (LABELS, idx_labels([1, 2]), "has 2 labels for the 3 images of t10k-images-idx3-ubyte"),
    "no such class": (LABELS, idx_labels([1, 10, 2]), "label 10 of image 1 is not one of 0 to 9"),
}


@pytest.mark.parametrize(("zipped", "case"), list(itertools.product([True, False], WRONG)))
def test_wrong_file_is_named_and_nothing_written(tmp_path, zipped, case):
    name, content, problem = WRONG[case]
    idx = write_all(tmp_path / "idx", zipped=zipped)
    write(idx, name, content, zipped=zipped)
    with pytest.raises(ValueError) as raised:
        build_fashion_mnist(tmp_path / "out", idx, progress=False)
    message = str(raised.value)
    assert message.startswith(str(idx / name)) and problem in message and "\n" not in message
    assert not (tmp_path / "out").exists()


ZIPPED = gzip.compress(idx_images(TEST), mtime=0)


@pytest.mark.parametrize(
    "content",
    [idx_images(TEST), ZIPPED[: len(ZIPPED) // 2], ZIPPED[:-8] + bytes(8), ZIPPED[:10] + b"\xff" * 9],
    ids=["not gzip", "truncated", "checksum", "garbage"],
)
def test_broken_gzip_is_named(tmp_path, content):
    idx = write_all(tmp_path / "idx", zipped=True)
    (idx / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{idx}/{IMAGES}.gz is truncated, damaged or not gzip: .+"):
        build_fashion_mnist(tmp_path / "out", idx, progress=False)


def test_missing_folder_and_missing_file_are_named(tmp_path, capsys):
    idx = write_all(tmp_path / "idx", zipped=True)
    with pytest.raises(ValueError, match=f"^{idx / IMAGES}.gz is a file, not a folder to write"):
        build_fashion_mnist(idx / f"{IMAGES}.gz", idx, progress=False)
    (idx / f"{LABELS}.gz").unlink()
    with pytest.raises(ValueError, match=f"^{idx} has neither {LABELS}.gz nor {LABELS}; .*apt install dataset-fashion"):
        build_fashion_mnist(tmp_path / "out", idx, progress=False)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), "--idx", str(tmp_path / "nowhere")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and f"{tmp_path / 'nowhere'} is not a folder" in error
    assert "apt install dataset-fashion-mnist" in error and "zalando-datasets/fashion_mnist" in error
