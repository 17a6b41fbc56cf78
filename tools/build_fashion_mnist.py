"""Fashion-MNIST from its four idx files, as the parquet files that `data.source` takes, where no hub can be reached."""

import argparse
import gzip
import io
import math
import struct
import zlib
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HUB_ID = "zalando-datasets/fashion_mnist"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package installs the files
# Letter for letter those of the dataset on the hub, so that a class has one caption, whatever the source.
LABELS = (
    *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SIDE = 28  # pixels
_SPLITS = {"train": "train", "test": "t10k"}  # the hub's names and the ones of the idx files
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes with 3 dimensions, and with 1


def build_fashion_mnist(out: Path, idx: Path = DEBIAN_FOLDER, progress: bool = True) -> dict[str, int]:
    """Writes `out`/train.parquet and test.parquet from the idx files in `idx`; returns the images of each split.

    The columns are those on the hub: `image` (PNG, 28 x 28 px, grey 0..255) and `label` (a ClassLabel with `LABELS`).
    The idx files may be in gzip (.gz) or not. All of them are read before anything is written, each parquet file is
    replaced atomically.
    ValueError: `out` is a file; an idx file is missing, damaged, or does not hold what its name says.
    """
    out, idx = Path(out), Path(idx)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder to write train.parquet and test.parquet into")
    if not idx.is_dir():
        raise ValueError(f"{idx} is no folder; {_where_to_get_it()}")
    splits = {split: _read_split(idx, stem) for split, stem in _SPLITS.items()}
    for split, (images, labels) in splits.items():
        bar = tqdm(images, split, unit="image", disable=not progress)
        _write_parquet([_png(image) for image in bar], labels, out / f"{split}.parquet")
    return {split: len(labels) for split, (_, labels) in splits.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `latentdiff build-fashion-mnist` to its parser."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for train.parquet and test.parquet")
    parser.add_argument(
        "--idx",
        type=Path,
        default=DEBIAN_FOLDER,
        metavar="FOLDER",
        help="with train-images-idx3-ubyte.gz and so on "
        f"(default: %(default)s, from the Debian package {DEBIAN_PACKAGE})",
    )
    parser.add_argument("--no-progress", action="store_false", dest="progress", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Runs `latentdiff build-fashion-mnist` and returns the exit status."""
    counts = build_fashion_mnist(args.out, args.idx, args.progress)
    print(f"{args.out}: " + ", ".join(f"{count} images in {split}.parquet" for split, count in counts.items()))
    return 0


# ---------------------------------------------------------------- idx: big-endian header, then the bytes


def _read_split(folder: Path, stem: str) -> tuple[list[bytes], bytes]:
    """The images of a split, `SIDE` x `SIDE` bytes each, row by row, and their labels, a byte each."""
    image_path, label_path = _find(folder, f"{stem}-images-idx3-ubyte"), _find(folder, f"{stem}-labels-idx1-ubyte")
    (count, height, width), values = _read_idx(image_path, _IMAGES_MAGIC)
    (label_count,), labels = _read_idx(label_path, _LABELS_MAGIC)
    if (height, width) != (SIDE, SIDE):
        raise ValueError(f"{image_path}: the images have {height} x {width} pixels, not {SIDE} x {SIDE}")
    if count == 0:
        raise ValueError(f"{image_path} holds no image")
    if count != label_count:
        raise ValueError(f"{label_path} has {label_count} labels for the {count} images of {image_path.name}")
    if (largest := max(labels)) >= len(LABELS):
        raise ValueError(f"{label_path}: label {largest} of image {labels.index(largest)} is not one of 0 to 9")
    area = SIDE * SIDE
    return [values[start : start + area] for start in range(0, len(values), area)], labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has neither {name}.gz nor {name}; {_where_to_get_it()}")


def _where_to_get_it() -> str:
    return (
        f"`apt install {DEBIAN_PACKAGE}` puts the files into {DEBIAN_FOLDER}, and --idx names another folder; "
        f"where the hub can be reached, data.source: {HUB_ID} needs no files"
    )


def _read_idx(path: Path, magic: int) -> tuple[tuple[int, ...], bytes]:
    """The dimensions and the values of an idx file of unsigned bytes; its size must be exactly what they ask for."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated, damaged or not in gzip: {error}") from None
    ndim = magic & 0xFF
    header = struct.Struct(f">{1 + ndim}I")
    if content[:4] != struct.pack(">I", magic):
        kind = f"idx, unsigned bytes, dimensions: {ndim}"
        raise ValueError(f"{path} starts with 0x{content[:4].hex()}, not with the magic number 0x{magic:08x} ({kind})")
    if len(content) < header.size:
        raise ValueError(f"{path} has {len(content)} bytes, less than the {header.size} of an idx header")
    _, *shape = header.unpack_from(content)
    values = content[header.size :]
    if len(values) != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise ValueError(f"{path} has {len(values)} bytes after the header, not the {size} that it promises")
    return tuple(shape), values


# ---------------------------------------------------------------- parquet


def _png(image: bytes) -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (SIDE, SIDE), image).save(file, format="PNG")
    return file.getvalue()


def _write_parquet(pngs: list[bytes], labels: bytes, path: Path) -> None:
    """Writes one split; the schema carries the features, by which `datasets` knows images and class names again."""
    import pyarrow
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature
    from pyarrow import parquet

    from latentdiff.formats.files import replacing

    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=list(LABELS))}).arrow_schema
    images = [{"bytes": png, "path": None} for png in pngs]
    table = pyarrow.table({"image": images, "label": list(labels)}, schema=schema)
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)
