"""Images to pixels, what is opened and what is refused, and the order in which images come."""

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latentdiff.config import DataConfig
from latentdiff.data.batches import BatchPlan, Key, StepBatches, loader
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.images import View, to_images
from latentdiff.images import to_pixels as image_to_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """A cache of `datasets` of this test's own, so that none is left in the home folder."""
    folder = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def noise_image(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(*images: Image.Image | bytes, channels: int = 3, seed: int = 0, **config: object) -> CaptionedImages:
    """Images in memory, as `open_images` gives them."""
    rows = [{"bytes": i if isinstance(i, bytes) else encoded(i), "path": None} for i in images]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": rows}, features=features)
    return CaptionedImages(table, DataConfig(**{"source": "memory", "size": 8} | config), channels, seed)


def colour(image: CaptionedImages, index: int = 0) -> list[int]:
    """The one colour of an image of one colour, 0..255."""
    values = ((image.pixels(index) + 1) * 127.5).flatten(1)
    assert (values == values[:, :1]).all(), "not of one colour"
    torch.testing.assert_close(values, values.round(), atol=1e-4, rtol=0)
    return values[:, 0].round().int().tolist()


def write_folder(
    folder: Path, count: int, captions: bool = True, kind: str = "png", seed: int = 0, **size: int
) -> Path:
    """A folder of noise with the captions `image 0`, `image 1`, ..."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        noise_image(seed + i, **size).save(folder / f"{i:03d}.{kind}", lossless=True)
        rows.append({"file_name": f"{i:03d}.{kind}", "text": f"image {i}"})
    if captions:
        write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def open_source(source: Path | str, **config: object) -> tuple[CaptionedImages, CaptionedImages]:
    return open_images(
        DataConfig(**{"holdout": 0, "source": str(source), "size": 8} | config), 3, seed=0, progress=False
    )


def refusal(source: Path | str, **config: object) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(ValueError) as error:
        open_source(source, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- pixels ---


def test_pixels_of_known_colours():
    image = Image.new("RGB", (8, 8))
    image.putdata([(0, 255, 51)] * 32 + [(255, 0, 204)] * 32)
    pixels = opened(image).pixels(0)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, :4].amax((1, 2)), torch.tensor([-1.0, 1.0, -0.6]), atol=1e-7, rtol=0)
    torch.testing.assert_close(pixels[:, 4:].amin((1, 2)), torch.tensor([1.0, -1.0, 0.6]), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_come_back_bit_for_bit(channels, mode):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = values if channels == 1 else np.stack([np.roll(values, 31 * c) for c in range(channels)], axis=-1)
    image = Image.fromarray(array)
    assert image.mode == mode
    pixels = image_to_pixels(image)
    assert pixels.shape == (channels, 16, 16) and pixels.min() == -1.0 and pixels.max() == 1.0
    (back,) = to_images(pixels[None])
    assert back.mode == mode and np.array_equal(np.asarray(back), array)


def test_to_images_clamps_and_rounds():
    (image,) = to_images(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 1.1]).view(1, 1, 1, 6))
    assert np.asarray(image)[0].tolist() == [0, 0, 128, 191, 255, 255]
    (image,) = to_images(torch.full((1, 3, 1, 1), 0.5, dtype=torch.bfloat16))
    assert image.getpixel((0, 0)) == (191, 191, 191)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_exif_orientation_is_applied(kind):
    """Orientation 6: the camera was turned, what is stored has to be turned 90 degrees clockwise."""
    stored = Image.new("RGB", (64, 64), RED)
    stored.paste(BLUE, (0, 32, 64, 64))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = opened(encoded(stored, kind, exif=exif), size=64).pixels(0)
    left, right = pixels[:, :, 8:24].mean((1, 2)), pixels[:, :, 40:56].mean((1, 2))  # turned: blue left of red
    torch.testing.assert_close(left, torch.tensor([-1.0, -1.0, 1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(right, torch.tensor([1.0, -1.0, -1.0]), atol=0.03, rtol=0)


def transparent_images() -> dict[str, Image.Image]:
    """Half transparent or fully transparent images of each kind, black under the transparency."""
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 0
    grey = Image.new("L", (8, 8), 7)
    grey.info["transparency"] = 7
    return {
        "RGBA": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
        "LA": Image.new("LA", (8, 8), (0, 0)),
        "P": palette,
        "L": grey,
    }


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_shows_the_background(mode):
    image = transparent_images()[mode]
    with Image.open(io.BytesIO(encoded(image))) as stored:
        assert stored.mode == mode and stored.has_transparency_data
    assert colour(opened(image, background=(10, 200, 30))) == [10, 200, 30]
    assert colour(opened(image)) == [255, 255, 255]
    # In grey: the background's luminance, 0.299 R + 0.587 G + 0.114 B.
    assert colour(opened(image, background=(10, 200, 30), channels=1)) == [round(2.99 + 117.4 + 3.42)]


def test_half_transparent_is_mixed():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 51))  # a fifth of red
    assert colour(opened(image, background=(0, 100, 200))) == [51, 80, 160]
    # With an alpha channel of its own the image keeps it.
    assert colour(opened(image, channels=4)) == [255, 0, 0, 51]


@pytest.mark.parametrize(("channels", "expected"), [(1, [76]), (2, [76, 255]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_image_in_each_number_of_channels(channels, expected):
    palette = Image.new("RGB", (8, 8), RED).quantize(2)
    assert palette.mode == "P"
    for image in (Image.new("RGB", (8, 8), RED), palette):
        assert colour(opened(image, channels=channels)) == expected


def test_grey_image_in_colour():
    assert colour(opened(Image.new("L", (8, 8), 40))) == [40, 40, 40]
    assert colour(opened(Image.new("1", (8, 8), 1))) == [255, 255, 255]


def test_16_bit_grey_is_scaled_not_clipped():
    levels = [0, 257, 128 * 257, 65535]
    array = np.repeat(np.array(levels, dtype=np.uint16), 16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = opened(encoded(Image.fromarray(array), kind), channels=1).pixels(0)
        assert ((pixels + 1) * 127.5)[0, ::2, 0].tolist() == pytest.approx([0, 1, 128, 255], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.25, 0.5, 1], np.float32), [0, 64, 128, 255]),
        (np.array([0, 51, 102, 255], np.float32), [0, 51, 102, 255]),
        (np.array([0, 257, 257 * 128, 65535], np.float32), [0, 1, 128, 255]),
        (np.array([0, 1, 100, 200], np.int32), [0, 1, 100, 200]),
        (np.array([0, 257, 257 * 128, 65535], np.int32), [0, 1, 128, 255]),
        (np.array([0, 2**30, 2**31 - 1, 2**29], np.int32), [0, 128, 255, 64]),
    ],
)
def test_32_bit_images_are_scaled_not_clipped(values, expected):
    image = Image.fromarray(np.repeat(values, 16).reshape(8, 8))
    assert image.mode in ("I", "F")
    pixels = opened(encoded(image, "TIFF"), channels=1).pixels(0)
    assert ((pixels + 1) * 127.5)[0, ::2, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_values_without_a_meaning_are_unreadable(value):
    image = Image.fromarray(np.full((8, 8), value, np.float32))
    with pytest.raises(
        OSError, match=r"image row 0 cannot be read: it has values in .*, must be finite and at least 0"
    ):
        opened(encoded(image, "TIFF")).pixels(0)


def linear_profile() -> bytes:
    """An ICC profile (version 2.1) with the primaries of sRGB whose values are the light itself: a gamma of 1."""

    def fixed(*values: float) -> bytes:
        return b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    def number(value: int) -> bytes:
        return value.to_bytes(4, "big")

    white = fixed(0.9642, 1.0, 0.8249)
    primaries = {"r": (0.4360, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971), "b": (0.1431, 0.0606, 0.7141)}
    tags = {
        b"desc": b"desc" + number(0) + number(7) + b"linear\0" + bytes(78),
        b"cprt": b"text" + number(0) + b"none\0",
    }
    tags[b"wtpt"] = b"XYZ " + number(0) + white
    for name, xyz in primaries.items():
        tags[f"{name}XYZ".encode()] = b"XYZ " + number(0) + fixed(*xyz)
        tags[f"{name}TRC".encode()] = b"curv" + number(0) + number(0)
    table, body, start = number(len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + number(start + len(body)) + number(len(tag))
        body += tag + bytes(-len(tag) % 4)
    header = number(start + len(body)) + b"test" + bytes([2, 0x10, 0, 0]) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + white + bytes(48) + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_to_srgb(mode):
    """sRGB's encoding (IEC 61966-2-1) of 55 / 255 of the light is 1.055 x^(1 / 2.4) - 0.055, 0.50."""
    stored = [10, 55, 200]
    expected = [round(255 * (1.055 * (value / 255) ** (1 / 2.4) - 0.055)) for value in stored]
    assert expected == [56, 128, 229]
    image = Image.new("RGB", (8, 8), tuple(stored))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    found = colour(opened(encoded(image, icc_profile=linear_profile()), channels=4))
    assert found[3] == 255 and np.abs(np.subtract(found[:3], expected)).max() <= 1
    # Its own profile, and one that cannot be used, change nothing.
    for unchanged in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile"):
        assert colour(opened(encoded(image, icc_profile=unchanged), channels=4)) == [*stored, 255]


def test_colours_under_transparency_are_converted():
    image = Image.new("RGBA", (8, 8), (55, 55, 55, 128))
    found = colour(opened(encoded(image, icc_profile=linear_profile()), channels=4))
    assert found[3] == 128 and np.abs(np.subtract(found[:3], 128)).max() <= 1


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    assert colour(opened(encoded(image, "TIFF"))) == [255, 0, 0]
    jpeg = opened(encoded(image, "JPEG", quality=100)).pixels(0)
    torch.testing.assert_close(jpeg.mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=0.03, rtol=0)


def test_center_crop_keeps_the_centre():
    """Green square in the middle, red and blue bars beside it; the shorter side becomes `size`."""
    wide = Image.new("RGB", (64, 32), GREEN)
    wide.paste(RED, (0, 0, 16, 32))
    wide.paste(BLUE, (48, 0, 64, 32))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    for size in (32, 16):
        for image in (wide, tall):
            pixels = opened(image, size=size).pixels(0)
            assert pixels.shape == (3, size, size)
            inner = pixels[:, 4:-4, 4:-4]  # the resampling filter blurs the borders
            assert (inner[1] == 1).all() and (inner[[0, 2]] == -1).all()


def test_resize_is_lanczos_of_the_cut():
    image = noise_image(1, width=32, height=32)
    expected = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(to_images(opened(image).pixels(0)[None])[0]), expected)
    # An image of the right size is not touched.
    assert np.array_equal(
        np.asarray(to_images(opened(image, size=32).pixels(0)[None])[0]),
        np.asarray(image),
    )


def test_view_cuts_and_flips():
    image = noise_image(2, width=24, height=8)
    array = np.asarray(image)
    images = opened(image)
    for view, expected in [
        (View((0.0, 0.0)), array[:, :8]),
        (View((1.0, 0.3)), array[:, 16:]),
        (View((0.5, 0.5)), array[:, 8:16]),
        (View((0.25, 0.5), flip=True), array[:, 4:12][:, ::-1]),
    ]:
        assert np.array_equal(np.asarray(to_images(images.pixels(0, view)[None])[0]), expected)


# --- crop and flip of an epoch ---


def test_flip_probability():
    images = opened(*[noise_image(i) for i in range(4)])
    places = [(index, epoch) for index in range(4) for epoch in range(200)]

    def fraction(p: float) -> float:
        some = CaptionedImages(images.table, DataConfig(source="memory", size=8, flip=p), 3, seed=0)
        flips = [some.view(*place).flip for place in places]
        assert all(some.view(*place).crop == (0.5, 0.5) for place in places)
        return sum(flips) / len(flips)

    assert fraction(0.0) == 0.0
    assert fraction(1.0) == 1.0
    assert fraction(0.3) == pytest.approx(0.3, abs=0.05)  # 3 standard deviations of 800 samples


def test_views_depend_on_seed_epoch_and_index_alone():
    images = [noise_image(i, width=24, height=16) for i in range(6)]
    data = opened(*images, crop="random", flip=0.5, seed=3)
    keys = [Key(index=i, epoch=e, step=0, sample_index=0) for e in range(3) for i in range(6)]
    first = {(key["index"], key["epoch"]): data[key]["pixels"] for key in keys}
    # In another order, at other steps and sample_indices, from another object.
    again = opened(*images, crop="random", flip=0.5, seed=3)
    for key in reversed(keys):
        moved = Key(index=key["index"], epoch=key["epoch"], step=17, sample_index=5)
        assert torch.equal(again[moved]["pixels"], first[key["index"], key["epoch"]])
    views = [data.view(index, epoch) for index, epoch in first]
    assert len({view.crop for view in views}) == len(views)  # all cut elsewhere
    assert {view.flip for view in views} == {True, False}
    assert all(0 <= place < 1 for view in views for place in view.crop)
    other_seed = opened(*images, crop="random", flip=0.5, seed=4)
    assert all(other_seed.view(*place) != data.view(*place) for place in first)


def test_random_crops_reach_the_whole_image():
    images = opened(noise_image(0), crop="random")
    crops = torch.tensor([images.view(0, epoch).crop for epoch in range(400)])
    assert (crops.amin(0) < 0.02).all() and (crops.amax(0) > 0.98).all()
    torch.testing.assert_close(crops.mean(0), torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)


# --- opening ---


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_imagefolder(tmp_path, kind):
    images, held_out = open_source(write_folder(tmp_path / "set", 5, kind=kind))
    assert len(images) == 5 and len(held_out) == 0
    assert images.captions == [f"image {i}" for i in range(5)]
    for i in range(5):
        assert np.array_equal(np.asarray(images.image(i)), np.asarray(noise_image(i)))
        assert Path(images.name(i)).name == f"{i:03d}.{kind}"
    assert [indices for indices, _ in images.batches(2)] == [[0, 1], [2, 3], [4]]
    assert [indices for indices, _ in images.batches(2, start=1, step=2)] == [[2, 3]]
    whole = torch.cat([pixels for _, pixels in images.batches(2)])
    assert torch.equal(whole, torch.stack([images.pixels(i) for i in range(5)]))


def test_batches_are_undistorted():
    images = opened(noise_image(0), noise_image(1), flip=1.0)
    assert images.view(0, epoch=0).flip
    ((_, pixels),) = images.batches(2)
    assert torch.equal(pixels, torch.stack([image_to_pixels(noise_image(i)) for i in range(2)]))


def test_jpeg_folder_in_subfolders_with_class_names(tmp_path):
    for name in ("red_apple", "dog"):
        folder = write_folder(tmp_path / "set" / name, 2, captions=False)
        noise_image(9).save(folder / "photo.jpg")
    images, _ = open_source(tmp_path / "set", caption_column="label")
    assert images.captions == ["dog"] * 3 + ["red apple"] * 3
    assert all(images.pixels(i).shape == (3, 8, 8) for i in range(6))


def test_folder_without_captions(tmp_path):
    images, _ = open_source(write_folder(tmp_path / "set", 3, captions=False), captions="none")
    assert images.captions == ["", "", ""]


def write_parquet(
    path: Path, count: int, image_column: str = "bild", caption_column: str = "titel", seed: int = 0
) -> Path:
    """Images embedded as bytes, by `datasets` itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(noise_image(seed + i)), "path": f"{i}.png"} for i in range(count)]
    features = datasets.Features({image_column: datasets.Image(), caption_column: datasets.Value("string")})
    columns = {image_column: images, caption_column: [f"image {i}" for i in range(count)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def test_parquet_with_other_columns(tmp_path):
    path = write_parquet(tmp_path / "set" / "train.parquet", 4)
    for source in (path, path.parent):
        images, _ = open_source(source, image_column="bild", caption_column="titel")
        assert images.captions == [f"image {i}" for i in range(4)]
        assert torch.equal(images.pixels(3), image_to_pixels(noise_image(3)))


def test_a_readme_redirects_nothing(tmp_path):
    """`datasets` would read the files that the card of a local folder names, or fetch them."""
    write_parquet(tmp_path / "set" / "data.parquet", 3)
    for target in (
        "../secret/data.parquet",
        str(tmp_path / "secret" / "data.parquet"),
        "hf://datasets/someone/set/a.parquet",
    ):
        write_parquet(tmp_path / "secret" / "data.parquet", 5)
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {target}\n---\n"
        (tmp_path / "set" / "README.md").write_text(card)
        images, _ = open_source(tmp_path / "set", image_column="bild", caption_column="titel")
        assert len(images) == 3


def test_edited_captions_are_read_again(tmp_path):
    """Also where the time of change is that of before."""
    folder = write_folder(tmp_path / "images", 2)
    assert open_source(folder)[0].captions == ["image 0", "image 1"]
    times = os.stat(folder / "metadata.jsonl")
    write_metadata(folder, [{"file_name": f"00{i}.png", "text": f"other {i}"} for i in range(2)])
    os.utime(folder / "metadata.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_source(folder)[0].captions == ["other 0", "other 1"]


def test_splits_of_a_parquet_folder(tmp_path):
    """As on the hub: data/train-*.parquet are not mixed with the other splits."""
    columns = {"image_column": "bild", "caption_column": "titel"}
    write_parquet(tmp_path / "set/data/train-00000-of-00002.parquet", 4)
    write_parquet(tmp_path / "set/data/train-00001-of-00002.parquet", 3)
    write_parquet(tmp_path / "set/data/validation-00000-of-00001.parquet", 2, seed=100)
    (tmp_path / "set/README.md").write_text("About the images.", encoding="utf-8")
    images, held_out = open_source(tmp_path / "set", validation_split="validation", **columns)
    assert (len(images), len(held_out)) == (7, 2)
    # One file is one split: it cannot be its own validation set.
    path = tmp_path / "set/data/train-00000-of-00002.parquet"
    message = refusal(path, validation_split="validation", **columns)
    assert message == f"'train' is asked for, but data.source {str(path)!r} has no splits"


def test_validation_split_of_a_folder(tmp_path):
    write_folder(tmp_path / "set/train", 4)
    write_folder(tmp_path / "set/test", 2, seed=100)
    images, held_out = open_source(tmp_path / "set", validation_split="test", holdout=3)
    assert (len(images), len(held_out)) == (4, 2)
    assert {Path(held_out.name(i)).parent.name for i in range(2)} == {"test"}
    assert refusal(tmp_path / "set", split="dev") == (
        f"data.source {str(tmp_path / 'set')!r} has no folder 'dev' with images, its folders with images are: "
        "test, train"
    )


def test_progress_can_be_switched_off(tmp_path, capfd):
    folder = write_folder(tmp_path / "set", 2)
    before = datasets.are_progress_bars_disabled()
    open_source(folder)  # with progress=False
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() == before


def test_embedded_set():
    images, held_out = open_source("embedded")
    assert (len(images), len(held_out)) == (128, 0)
    assert images.captions[0] == "noto style, red apple" and len(set(images.captions)) == 128
    assert {images.image(i).size for i in range(128)} == {(128, 128)}


# --- limit and hold-out ---


def names(images: CaptionedImages) -> list[str]:
    return [Path(images.name(i)).name for i in range(len(images))]


def test_limit_and_holdout(tmp_path):
    folder = write_folder(tmp_path / "set", 20)
    everything = [f"{i:03d}.png" for i in range(20)]
    images, held_out = open_source(folder, holdout=6)
    assert len(images) == 14 and len(held_out) == 6
    assert sorted(names(images) + names(held_out)) == everything  # disjoint, nothing lost
    assert names(images) == sorted(names(images))
    assert held_out.captions == [f"image {int(name[:3])}" for name in names(held_out)]
    assert max(int(name[:3]) for name in names(held_out)) > 6  # not simply the first ones
    # The same ones for every seed of the run: stage 2 must not validate on what stage 1 trained on.
    for seed in (1, 2):
        config = DataConfig(source=str(folder), size=8, holdout=6)
        assert names(open_images(config, 3, seed, progress=False)[1]) == names(held_out)
    limited, rest = open_source(folder, limit=10, holdout=4)
    assert (len(limited), len(rest)) == (6, 4)
    assert not set(names(limited)) & set(names(rest))
    assert set(names(limited) + names(rest)) == set(names(open_source(folder, limit=10)[0]))
    assert names(open_source(folder, limit=30)[0]) == everything
    message = refusal(folder, holdout=20)
    assert message == f"data.holdout is 20, but {str(folder)!r} has only 20 images"
    assert "has only 5 images" in refusal(folder, holdout=7, limit=5)


def test_chosen_images_are_fixed_and_distinct(tmp_path):
    """A fixed choice: the same for every seed of the run, none twice, with their captions, in their order."""
    folder = write_folder(tmp_path / "set", 20)
    images, _ = open_source(folder)
    some = images.some(6)
    chosen = names(some)
    assert len(some) == 6 and len(set(chosen)) == 6 and chosen == sorted(chosen)
    assert chosen != names(images)[:6]  # not simply the first ones
    assert some.captions == [f"image {int(name[:3])}" for name in chosen]
    assert torch.equal(some.pixels(3), images.pixels(int(chosen[3][:3])))
    other, _ = open_images(DataConfig(holdout=0, source=str(folder), size=8), 3, seed=7, progress=False)
    assert names(images.some(6)) == names(other.some(6)) == chosen
    assert set(chosen) < set(names(images.some(7)))
    for count in (20, 50):
        assert names(images.some(count)) == names(images)


# --- what is refused ---


def test_missing_source(tmp_path):
    for source in ("./nowhere", str(tmp_path / "splits"), "~/no/such/folder", "images.parquet", "a/b/c"):
        assert refusal(source) == f"data.source {source!r} does not exist"
    (tmp_path / "a.csv").write_text("image,text\n", encoding="utf-8")
    assert refusal(tmp_path / "a.csv").endswith(
        "a.csv' is neither a folder nor a file of one of these kinds: .zip, .tar, .parquet"
    )


@pytest.mark.parametrize("source", ["someone/images", "someone/images-v1.0", "images"])
def test_hub_that_cannot_be_reached(source):
    message = refusal(source)
    start = f"data.source {source!r} is neither a local path nor a dataset that could be reached on the hub: "
    assert message.startswith(start) and source in message.removeprefix(start)


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith("empty' has no images, it is empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image", encoding="utf-8")
    assert refusal(tmp_path / "texts").endswith("texts' has no images; its files are 1 .txt")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    assert f"broken.parquet': {tmp_path}/broken.parquet: " in refusal(tmp_path / "broken.parquet")
    folder = write_folder(tmp_path / "set", 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text"\n', encoding="utf-8")
    assert refusal(folder).startswith(f"{folder}/metadata.jsonl, line 1: no valid JSON (")
    (folder / "metadata.jsonl").write_text("\n", encoding="utf-8")
    assert refusal(folder).endswith("metadata.jsonl is empty; write a line for each image, or delete it")


def test_missing_columns(tmp_path):
    folder = write_folder(tmp_path / "set", 2)
    assert refusal(folder, caption_column="title") == (
        f"data.caption_column 'title' is not in {folder}/metadata.jsonl; its columns are: text"
    )
    table = write_parquet(tmp_path / "table.parquet", 2)
    assert refusal(table, image_column="photo") == (
        f"data.image_column 'photo' is not in {str(table)!r}; its columns are: bild, titel"
    )
    assert refusal(table).startswith(
        f"no image of data.source {str(table)!r} has a caption; its columns are: titel (data.caption_column names one)"
    )
    path = tmp_path / "numbers.parquet"
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).to_parquet(str(path))
    assert refusal(path, image_column="image") == "data.image_column 'image' holds Value('int64'), not images"
    assert refusal(path) == (
        f"data.source {str(path)!r} has no column of images: image, text; name one with data.image_column"
    )


def test_caption_that_is_no_text(tmp_path):
    folder = write_folder(tmp_path / "set", 2)
    write_metadata(folder, [{"file_name": f"00{i}.png", "text": text} for i, text in enumerate(["a", 3])])
    assert refusal(folder) == f"{folder}/metadata.jsonl, line 2: the caption is 3, not text"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("int64")})
    rows = {"image": [{"bytes": encoded(noise_image(0)), "path": None}] * 2, "text": [None, 3]}
    path = tmp_path / "table.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    assert refusal(path) == f"{path}, row 1: column 'text': the caption is 3, not text"


def test_unreadable_images_are_skipped_with_a_warning(tmp_path):
    folder = write_folder(tmp_path / "set", 10)
    truncated = (folder / "003.png").read_bytes()[:-40]
    (folder / "003.png").write_bytes(truncated)
    (folder / "007.png").write_bytes(b"no image at all")
    with pytest.warns(UserWarning) as warnings:
        images, _ = open_source(folder, max_unreadable=0.2)
    (warning,) = warnings
    assert str(warning.message).startswith(f"2 of 10 images of {str(folder)!r} are unreadable: ")
    assert str(folder / "003.png") in str(warning.message) and str(folder / "007.png") in str(warning.message)
    assert names(images) == [f"{i:03d}.png" for i in range(10) if i not in (3, 7)]
    assert images.captions == [f"image {i}" for i in range(10) if i not in (3, 7)]
    message = refusal(folder, max_unreadable=0.19)
    assert message.startswith(f"2 of 10 images of {str(folder)!r} are unreadable: ")
    assert message.endswith("; data.max_unreadable is 0.19")


def test_files_of_several_frames_are_reported(tmp_path):
    folder = write_folder(tmp_path / "set", 3)
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    frames[0].save(folder / "000.png", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="1 of 3 images of '.*set' have several frames; the first one is used"):
        images, _ = open_source(folder)
    torch.testing.assert_close(images.pixels(0).mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))


def test_only_known_formats_are_opened(tmp_path, monkeypatch):
    """Pillow has another program read EPS; here nothing is run, and a pipe is not waited for."""
    folder = write_folder(tmp_path / "images", 2)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / "000.png").write_text(header)
    message = refusal(folder, max_unreadable=0)
    assert message.startswith(f"1 of 2 images of {str(folder)!r} are unreadable: ")
    assert "000.png (not an image of a known format)" in message
    assert not (tmp_path / "ran").exists()
    (folder / "000.png").unlink()
    os.mkfifo(folder / "000.png")
    assert "000.png (not a file)" in refusal(folder, max_unreadable=0)


def test_missing_image_in_a_table_is_unreadable(tmp_path):
    images = [{"bytes": encoded(noise_image(0)), "path": None}, None, {"bytes": b"", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    path = tmp_path / "set.parquet"
    columns = {"image": images, "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    with pytest.warns(UserWarning, match=r"2 of 3 images of .*: row 1 \(no image\), row 2 \("):
        data, _ = open_source(path, max_unreadable=0.9)
    assert data.captions == ["a"]


def test_no_decoded_images_in_the_cache(tmp_path, datasets_cache):
    """Decoding happens when an image is read: the cache never holds float pixels."""
    count, size = 12, 64
    folder = write_folder(tmp_path / "set", count, width=size, height=size)
    write_parquet(tmp_path / "set.parquet", count, "image", "text")
    for source in (folder, tmp_path / "set.parquet"):
        images, _ = open_source(source, size=size)
        batches = StepBatches(count, BatchPlan(4, 4, 1), 0, seed=0, start_step=0, total_steps=6)
        assert sum(len(batch["index"]) for batch in loader(images, batches, 0, pin_memory=False)) == 24
    cached = sum(path.stat().st_size for path in datasets_cache.rglob("*") if path.is_file())
    assert 0 < cached < count * 3 * size * size * 4 / 10


# --- order ---


def sequence(images: int, plan: BatchPlan, seed: int = 0, start: int = 0, stop: int = 9) -> dict[int, dict[int, Key]]:
    """step -> sample_index -> key, over all processes; every sample_index exactly once."""
    steps: dict[int, dict[int, Key]] = {}
    for rank in range(plan.processes):
        batches = StepBatches(images, plan, rank, seed, start, stop)
        micro_batches = list(batches)
        assert len(micro_batches) == len(batches) == (stop - start) * plan.accumulation
        for place, keys in enumerate(micro_batches):
            assert len(keys) == plan.micro
            for key in keys:
                assert key["step"] == start + place // plan.accumulation
                assert key["sample_index"] not in steps.setdefault(key["step"], {})
                steps[key["step"]][key["sample_index"]] = key
    assert all(sample_indices.keys() == set(range(plan.batch_size)) for sample_indices in steps.values())
    return steps


def flat(steps: dict[int, dict[int, Key]]) -> list[tuple[int, int]]:
    """The endless sequence of (epoch, index)."""
    return [
        (steps[step][sample_index]["epoch"], steps[step][sample_index]["index"])
        for step in sorted(steps)
        for sample_index in sorted(steps[step])
    ]


@pytest.mark.parametrize("images", [8, 12, 13, 31])
def test_every_image_once_an_epoch(images):
    keys = flat(sequence(images, BatchPlan(8, 8, 1), stop=13))
    assert len(keys) == 13 * 8
    epochs = len(keys) // images
    for epoch in range(epochs):
        part = keys[epoch * images : (epoch + 1) * images]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(images))
    orders = {tuple(index for _, index in keys[e * images : (e + 1) * images]) for e in range(epochs)}
    assert len(orders) == epochs and tuple(range(images)) not in orders


def test_sequence_does_not_depend_on_how_it_is_split():
    single = sequence(13, BatchPlan(8, 8, 1))
    for processes in (1, 2, 4):
        for accumulation in (1, 2, 4):
            if processes * accumulation <= 8:
                plan = BatchPlan(8, 8 // (processes * accumulation), processes)
                assert plan.accumulation == accumulation
                assert sequence(13, plan) == single
    assert sequence(13, BatchPlan(8, 8, 1), seed=1) != single


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_global_batch_is_what_the_processes_get(processes, accumulation):
    """Of every step, also of those before the start, on every process."""
    plan = BatchPlan(16, 16 // (processes * accumulation), processes)
    steps = sequence(37, plan, seed=5)
    expected = [[steps[step][sample_index]["index"] for sample_index in range(16)] for step in range(9)]
    for rank in range(processes):
        batches = StepBatches(37, plan, rank, seed=5, start_step=3, total_steps=9)
        assert [batches.global_batch(step) for step in range(9)] == expected


@pytest.mark.parametrize("images", [16, 17, 31, 40])
def test_global_batches_hold_every_image_once_an_epoch(images):
    batches = StepBatches(images, BatchPlan(16, 4, 2), rank=1, seed=0, start_step=0, total_steps=10)
    shown = [index for step in range(10) for index in batches.global_batch(step)]
    for first in range(0, 160 - images + 1, images):
        assert sorted(shown[first : first + images]) == list(range(images))


def test_plan_says_how_a_batch_is_split():
    assert str(BatchPlan(24, 4, 2)) == "batch 24 = 4 x 2 processes x 3 accumulated"


def test_resumed_sequence_continues_exactly():
    whole = sequence(13, BatchPlan(8, 2, 2))
    for start in (1, 4, 8):
        assert sequence(13, BatchPlan(8, 2, 2), start=start) == {s: whole[s] for s in range(start, 9)}
    assert len(StepBatches(13, BatchPlan(8, 2, 2), 0, 0, start_step=9, total_steps=9)) == 0


def test_batches_that_do_not_fit():
    message = "train.batch_size 8 is larger than the 7 training images; use a smaller one, or data.repeat"
    with pytest.raises(ValueError, match=f"^{message}$"):
        StepBatches(7, BatchPlan(8, 8, 1), 0, 0, 0, 1)
    StepBatches(8, BatchPlan(8, 8, 1), 0, 0, 0, 1)
    for plan in [(8, 3, 1), (8, 4, 4), (2, 1, 4)]:
        with pytest.raises(ValueError) as error:
            BatchPlan(*plan)
        assert str(error.value) == (
            f"train.batch_size {plan[0]} is not divisible by train.micro_batch_size {plan[1]} x {plan[2]} processes"
        )


def test_workers_give_the_same_batches():
    images = opened(*[noise_image(i, width=12) for i in range(7)], crop="random", flip=0.5)
    batches = StepBatches(7, BatchPlan(4, 2, 1), 0, seed=5, start_step=1, total_steps=4)
    alone = list(loader(images, batches, num_workers=0, pin_memory=False))
    shared = list(loader(images, batches, num_workers=2, pin_memory=False))
    assert len(alone) == len(shared) == 6
    for a, b, keys in zip(alone, shared, batches, strict=True):
        assert torch.equal(a.pop("pixels"), b["pixels"])
        assert b.pop("pixels").shape == (2, 3, 8, 8)
        expected = {
            "index": [k["index"] for k in keys],
            "sample_indices": [k["sample_index"] for k in keys],
            "step": keys[0]["step"],
            "captions": ["", ""],
        }
        assert a == b == expected


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such signals")
def test_workers_outlive_a_signal_to_the_whole_run():
    """Ctrl-C and pre-emption reach them too, and the run still needs the images of its step."""
    images = opened(*[noise_image(i, width=12) for i in range(7)])
    batches = StepBatches(7, BatchPlan(4, 2, 1), 0, seed=5, start_step=0, total_steps=8)
    alone = list(loader(images, batches, num_workers=0, pin_memory=False))
    feed = iter(loader(images, batches, num_workers=2, pin_memory=False))
    shared = [next(feed), next(feed)]  # one from each: both are ready
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    shared += feed
    assert [batch["index"] for batch in shared] == [batch["index"] for batch in alone]
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(alone, shared, strict=True))


def test_images_many_times_in_a_batch():
    """With repeat a batch may be larger than the set: it continues with the next epochs, each a permutation."""
    plan = BatchPlan(8, 4, 1)
    with pytest.raises(ValueError, match="^train.batch_size 8 is larger than the 3 training images times data.repea"):
        StepBatches(3, plan, 0, 0, 0, 1, repeat=2)
    batches = StepBatches(3, plan, 0, 0, 0, 3, repeat=3)
    keys = [key for batch in batches for key in batch]
    assert len(keys) == 24 and [key["epoch"] for key in keys] == [i // 3 for i in range(24)]
    for epoch in range(8):
        assert sorted(key["index"] for key in keys if key["epoch"] == epoch) == [0, 1, 2]
    assert batches.global_batch(1) == [key["index"] for key in keys[8:16]]
    one = [key for batch in StepBatches(1, plan, 0, 0, 0, 1, repeat=8) for key in batch]
    assert [key["index"] for key in one] == [0] * 8 and [key["sample_index"] for key in one] == [*range(8)]
