"""Small sets of images in memory."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


def png_rows(arrays: Sequence[np.ndarray]) -> list[dict]:
    """An image column of PNG files, from uint8 [H, W, 3]."""
    rows = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return rows


def image_set(
    arrays: Sequence[np.ndarray], captions: Sequence[str] | None = None, channels: int = 3, **config: object
) -> CaptionedImages:
    """Images from uint8 [H, W, 3], by default of 16 pixels; `config` are keys of DataConfig."""
    columns: dict[str, list] = {"image": png_rows(arrays)}
    features = {"image": datasets.Image(decode=False)}
    if captions is None:
        config = {"captions": "none", **config}
    else:
        columns["text"] = list(captions)
        features["text"] = datasets.Value("string")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return CaptionedImages(table, DataConfig(**{"source": "memory", "size": 16} | config), channels, seed=0)


def noise_images(count: int, size: int = 16) -> CaptionedImages:
    """Images of noise with the captions `image 0`, `image 1`, ..."""
    arrays = [np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8) for i in range(count)]
    return image_set(arrays, [f"image {i}" for i in range(count)], size=size)


def blobs(count: int, size: int = 16) -> CaptionedImages:
    """Smooth images without captions: a few random colours, enlarged."""
    small = [np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8) for i in range(count)]
    enlarged = [Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC) for array in small]
    return image_set([np.asarray(image) for image in enlarged], size=size)


def coloured_arrays(names: Sequence[str], per_class: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """Images of 16 pixels and their classes in turn: each its class's colour and noise."""
    noise = np.random.default_rng(seed)
    captions = [names[i % len(names)] for i in range(per_class * len(names))]
    values = [np.array(COLOURS.get(name, (0, 0, 0))) + noise.integers(-30, 31, (16, 16, 3)) for name in captions]
    return [value.clip(0, 255).astype(np.uint8) for value in values], captions


def coloured(
    names: Sequence[str] = ("red", "green"), per_class: int = 6, seed: int = 0, channels: int = 3, **config: object
) -> CaptionedImages:
    """Images whose captions are their colours."""
    return image_set(*coloured_arrays(names, per_class, seed), channels, **config)


def mixed_folder(folder: Path, kinds: Mapping[str, tuple[int, int, int]]) -> Path:
    """A folder of images of noise with their names as captions. kinds: name -> (height, width, number of images)."""
    folder.mkdir(parents=True)
    lines = []
    for seed, (kind, (height, width, count)) in enumerate(kinds.items()):
        for i in range(count):
            values = np.random.default_rng([seed, i]).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{kind}_{i}.png")
            lines.append(json.dumps({"file_name": f"{kind}_{i}.png", "text": f"{kind}_{i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
