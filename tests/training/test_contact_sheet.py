"""The images as the model sees them, which a run writes at its start."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.training.contact_sheet import ContactSheet, write_contact_sheet


def opened(folder: Path, colours: list[int], **settings: object) -> tuple[CaptionedImages, CaptionedImages]:
    """Images of 24 x 16 px, the left third black, the rest grey, with captions such as "Grey 3"."""
    folder.mkdir()
    for i, colour in enumerate(colours):
        pixels = np.full((16, 24, 3), colour, dtype=np.uint8)
        pixels[:, :8] = 0
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"Grey {i}")
    config = DataConfig.model_validate(
        {"source": str(folder), "size": 16, "captions": "sidecar", "holdout": 0} | settings
    )
    return open_images(config, 3, 0, progress=False)


def test_images_are_cropped_as_in_training(tmp_path: Path) -> None:
    images, held_out = opened(tmp_path / "set", [100, 150, 200], buckets=False)
    write_contact_sheet(tmp_path, images, held_out)
    # Three squares, five times as large (at least 80 px), two pixels apart.
    sheet = np.asarray(Image.open(tmp_path / "images.png"))
    assert sheet.shape == (80, 3 * 80 + 2 * 2, 3)
    # The square in the middle of 24 x 16 pixels begins at column 4: four black columns are left.
    assert [int(sheet[40, 82 * i + 60, 0]) for i in range(3)] == [100, 150, 200]
    assert sheet[40, 18].max() == 0 and sheet[40, 22].min() == 100
    assert ContactSheet.load(tmp_path) == ContactSheet(["Grey 0", "Grey 1", "Grey 2"], 3, 3, 0, {})


def test_sixteen_images_are_spread_over_the_set(tmp_path: Path) -> None:
    images, held_out = opened(tmp_path / "set", list(range(40)), buckets=True)
    write_contact_sheet(tmp_path, images, held_out)
    sheet = ContactSheet.load(tmp_path)
    assert sheet is not None and sheet.captions == [f"Grey {i}" for i in range(0, 32, 2)] and sheet.columns == 4
    height, width = images.layout.shapes[0]
    assert width > height  # in a bucket
    factor = -(-80 // width)
    assert Image.open(tmp_path / "images.png").size == (4 * factor * width + 6, 4 * factor * height + 6)


def test_prompts_are_told_apart_by_the_captions(tmp_path: Path) -> None:
    images, held_out = opened(tmp_path / "set", list(range(6)), holdout=2)
    write_contact_sheet(tmp_path, images, held_out, (images.captions[0].lower(), held_out.captions[1], "Grey 7"))
    sheet = ContactSheet.load(tmp_path)
    assert sheet is not None and (sheet.training, sheet.held_out) == (4, 2)
    assert list(sheet.prompts.values()) == ["training caption", "held-out caption", "new"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    assert ContactSheet.load(tmp_path) is None
    (tmp_path / "images.json").write_text(json.dumps({"captions": [1]}))
    with pytest.raises(ValueError, match=r"images.json is damaged"):
        ContactSheet.load(tmp_path)
