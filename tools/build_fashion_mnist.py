"""Convert Fashion-MNIST's four idx files to the parquet files that `data.source` takes, without the hub.

python tools/build_fashion_mnist.py saved/fashion-mnist [--idx FOLDER]
"""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from tqdm import tqdm

from latentdiff.commands.common import NoProgress
from latentdiff.training.arguments import SETTINGS, run_as_command, run_typer

HUB_ID = "zalando-datasets/fashion_mnist"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package installs the files
# Exactly as the dataset on the hub spells them, so that a class has the same caption from either source.
LABELS = (
    *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SIDE = 28  # pixels
_SPLITS = {"train": "train", "test": "t10k"}  # the hub's names -> the idx files' names
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes of 3 dimensions, and of 1


def build_fashion_mnist(out: Path, idx: Path = DEBIAN_FOLDER, progress: bool = True) -> dict[str, int]:
    """Write `out`/train.parquet and test.parquet from the idx files in `idx`; returns how many images each split has.

    The columns are those on the hub: `image` (PNG, 28 x 28 px, grey 0..255) and `label` (a ClassLabel with `LABELS`).
    The idx files may be compressed with gzip (.gz) or not. All of them are read before anything is written; each
    parquet file is replaced atomically.
    Raises ValueError if `out` is a file, or an idx file is missing, damaged, or not what its name says.
    """
    out, idx = Path(out), Path(idx)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder to write train.parquet and test.parquet into")
    if not idx.is_dir():
        raise ValueError(f"{idx} is not a folder; {_where_to_get_it()}")
    splits = {split: _read_split(idx, stem) for split, stem in _SPLITS.items()}
    for split, (images, labels) in splits.items():
        bar = tqdm(images, split, unit="image", disable=not progress)
        _write_parquet([_png(image) for image in bar], labels, out / f"{split}.parquet")
    return {split: len(labels) for split, (_, labels) in splits.items()}


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
    """The dimensions and the values of an idx file of unsigned bytes, which must have exactly the size they imply."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated, damaged or not gzip: {error}") from None
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
        raise ValueError(f"{path} has {len(values)} bytes after the header, not the {size} that it declares")
    return tuple(shape), values


# ---------------------------------------------------------------- parquet


def _png(image: bytes) -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (SIDE, SIDE), image).save(file, format="PNG")
    return file.getvalue()


def _write_parquet(pngs: list[bytes], labels: bytes, path: Path) -> None:
    """Write one split; the schema carries the features, from which `datasets` restores images and class names."""
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


# ---------------------------------------------------------------- command line

app = typer.Typer(**SETTINGS)


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for train.parquet and test.parquet.")],
    idx: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help=f"Folder of train-images-idx3-ubyte.gz etc.; the default is the Debian package {DEBIAN_PACKAGE}'s.",
        ),
    ] = DEBIAN_FOLDER,
    no_progress: NoProgress = False,
) -> None:
    """Convert Fashion-MNIST's idx files to train.parquet and test.parquet."""
    counts = build_fashion_mnist(out, idx, not no_progress)
    print(f"{out}: " + ", ".join(f"{count} images in {split}.parquet" for split, count in counts.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input is one line and exit status 2."""
    run_as_command(lambda given: run_typer(app, given), arguments)


if __name__ == "__main__":
    main()
