"""The ways in which people keep captioned images: what is read, what is reported, what is refused."""

import csv
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from latentdiff.config import DataConfig
from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.data.captioned_images import CaptionedImages, open_images

# Relative path -> caption; the images are noise of seed 0, 1, ... in this order.
CAPTIONS = {"a.png": "a red cat", "b.png": "two dogs", "c.png": "a blue house"}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def encoded(seed: int, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, names: Sequence[str] = tuple(CAPTIONS), seed: int = 0) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(seed + i))
    return folder


def opened(source: Path, **config: object) -> CaptionedImages:
    return open_images(
        DataConfig(**{"holdout": 0, "source": str(source), "size": 8} | config), 3, seed=0, progress=False
    )[0]


def captions(source: Path, **config: object) -> dict[str, list[str]]:
    """All captions by the name that an image has within the source."""
    images = opened(source, **config)
    names = [images.name(i).removeprefix(f"{source}").lstrip("/:") for i in range(len(images))]
    return dict(zip(names, images.all_captions, strict=True))


def refusal(source: Path, **config: object) -> str:
    with pytest.raises(ValueError) as error:
        opened(source, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


ALL = {name: [text] for name, text in CAPTIONS.items()}


# --- forms of captions ---


def csv_text(rows: Sequence[Sequence[str]], delimiter: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


FILES: dict[str, Mapping[str, str]] = {
    "metadata.jsonl": {
        "metadata.jsonl": "".join(json.dumps({"file_name": k, "text": v}) + "\n" for k, v in CAPTIONS.items())
    },
    "another column": {
        "metadata.jsonl": "".join(json.dumps({"file_name": k, "Beschreibung": v}) + "\n" for k, v in CAPTIONS.items())
    },
    "metadata.csv": {"metadata.csv": csv_text([("file_name", "caption"), *CAPTIONS.items()])},
    "captions.csv": {"captions.csv": csv_text([("image", "what it shows"), *CAPTIONS.items()], ";")},
    "without a header": {"captions.tsv": csv_text(list(CAPTIONS.items()), "\t")},
    "kohya": {
        "metadata.json": json.dumps(
            {f"/home/me/set/{name[:-4]}": {"caption": text.split()[0], "tags": text} for name, text in CAPTIONS.items()}
        )
    },
    "a list": {"metadata.json": json.dumps([{"filename": k, "prompt": v} for k, v in CAPTIONS.items()])},
    "names to captions": {"captions.json": json.dumps(CAPTIONS)},
    ".txt": {f"{name[:-4]}.txt": f"{text}\n" for name, text in CAPTIONS.items()},
    ".png.txt": {f"{name}.txt": text for name, text in CAPTIONS.items()},
    ".caption": {f"{name[:-4]}.caption": text for name, text in CAPTIONS.items()},
    ".json": {f"{name[:-4]}.json": json.dumps({"caption": text, "id": 3}) for name, text in CAPTIONS.items()},
}


@pytest.mark.parametrize("form", FILES)
def test_captions_in_files(tmp_path, form):
    folder = write_images(tmp_path / "set")
    for name, text in FILES[form].items():
        (folder / name).write_text(text, encoding="utf-8")
    expected = ALL
    if form == "kohya":
        expected = {name: [f"{text.split()[0]}, {text}"] for name, text in CAPTIONS.items()}
    assert captions(folder) == expected
    where = "metadata.json" if form in ("kohya", "a list") else next(iter(FILES[form]))
    where = f"{form.removeprefix('.png')} files" if form.startswith(".") else where
    assert opened(folder).notes == (
        f"{folder}: 3 images (3 .png)",
        f"captions: 3 from {where}, such as {next(iter(expected.values()))[0]}",
    )


def test_absolute_paths_of_another_machine(tmp_path):
    """The end of the path decides; a name that could be either of two files is neither."""
    folder = write_images(tmp_path / "set", ["cat/1.png", "dog/1.png", "dog/2.png"])
    names = {"/home/me/set/dog/1": "a dog", "C:\\set\\cat\\1.png": "a cat", "/elsewhere/2": "two", "/elsewhere/1": "?"}
    (folder / "metadata.json").write_text(json.dumps({name: {"caption": text} for name, text in names.items()}))
    with pytest.warns(
        UserWarning, match=r"1 of 4 images of .* unreadable: elsewhere/1 \(.*metadata.json, /elsewhere/1\)"
    ):
        assert captions(folder) == {"dog/1.png": ["a dog"], "cat/1.png": ["a cat"], "dog/2.png": ["two"]}


def test_captions_of_folder_names(tmp_path):
    folder = write_images(tmp_path / "set", ["red_apple/1.png", "dog/1.png", "dog/2.png"])
    expected = {"dog/1.png": ["dog"], "dog/2.png": ["dog"], "red_apple/1.png": ["red apple"]}
    assert captions(folder) == captions(folder, captions="folder") == expected
    assert captions(folder, captions="file_name")["dog/1.png"] == ["1"]
    # A word that usually names a split is a class among others.
    write_images(folder, ["train/1.png", "train/2.png"], seed=10)
    assert set(sum(captions(folder).values(), [])) == {"dog", "red apple", "train"}


def test_repeats_of_folder_names(tmp_path):
    folder = write_images(tmp_path / "set", ["10_red_apple/1.png", "3_dog/1.png", "3_dog/2.png"])
    images = opened(folder)
    assert images.captions == ["red apple", "dog", "dog"] and images.repeats == [10, 3, 3]
    assert images.notes[1] == "times per epoch, from the folders' names: 10_red_apple 10, 3_dog 3"
    (folder / "3_dog/1.txt").write_text("a sleeping dog")
    for image in ("10_red_apple/1", "3_dog/2"):
        (folder / f"{image}.txt").write_text("an image")
    images = opened(folder)
    assert images.captions == ["an image", "a sleeping dog", "an image"] and images.repeats == [10, 3, 3]
    # A number in one name alone is part of the name.
    assert opened(write_images(tmp_path / "other", ["10_pins/1.png", "dog/1.png"])).repeats is None


def test_captions_of_file_names(tmp_path):
    names = ["a_red_cat.png", "a-red-cat (2).png", "two dogs_003.png"]
    assert opened(write_images(tmp_path / "set", names)).captions == ["a red cat", "a red cat", "two dogs"]
    numbered = write_images(tmp_path / "numbered", ["IMG_0001.png", "IMG_0002.png"])
    assert refusal(numbered).startswith(f"no image of data.source {str(numbered)!r} has a caption. A caption can be in")
    assert opened(numbered, captions="file_name").captions == ["IMG", "IMG"]


def test_no_captions(tmp_path):
    folder = write_images(tmp_path / "set")
    for word in ("metadata.jsonl", ".txt", "data.captions=folder", "data.captions=none", "data.constant_caption"):
        assert word in refusal(folder)
    assert captions(folder, captions="none") == dict.fromkeys(CAPTIONS, [""])
    assert not opened(folder, captions="none").captioned
    assert captions(folder, constant_caption="a photo") == dict.fromkeys(CAPTIONS, ["a photo"])
    # Stage 1 needs none.
    images, _ = open_images(
        DataConfig(holdout=0, source=str(folder), size=8), 3, 0, progress=False, captions_needed=False
    )
    assert images.notes[1] == "captions: none found"
    for keys, message in [
        ({"captions": "none", "constant_caption": "a"}, "constant_caption replaces all captions"),
        ({"captions": "folder", "caption_column": "text"}, "caption_column is 'text', but captions is folder"),
        ({"keep_tokens": 1}, "keep_tokens is 1, but shuffle_caption is false"),
    ]:
        with pytest.raises(ValidationError, match=message):
            DataConfig(source="a", size=8, **keys)


def test_forms_are_mixed_and_missing_captions_are_a_choice(tmp_path):
    folder = write_images(tmp_path / "set", [*CAPTIONS, "d.png", "e.png"])
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "of metadata"}\n{"file_name": "e.png"}\n')
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"of {name}.txt")
    (folder / "d.txt").write_text(" \n")
    assert refusal(folder) == (
        f"2 of 5 images of data.source {str(folder)!r} have no caption: e.png, d.png; data.missing_captions=drop "
        "leaves them out, empty trains them without"
    )
    images = opened(folder, missing_captions="empty")
    assert images.captions == ["of metadata", "", "of b.txt", "of c.txt", ""]
    assert images.notes[1:] == (
        "captions: 1 from metadata.jsonl, 2 from .txt files, such as of metadata",
        "without a caption, trained with the empty caption: 2 images (e.png, d.png)",
    )
    assert opened(folder, missing_captions="drop").captions == ["of metadata", "of b.txt", "of c.txt"]
    assert opened(folder, captions="sidecar", missing_captions="drop").captions[0] == "of a.txt"
    assert refusal(folder, captions="column").startswith("4 of 5 images ")


def test_several_captions(tmp_path):
    """A list, several rows of one file, several lines of a text file: each epoch draws one."""
    folder = write_images(tmp_path / "set")
    rows = [("a.png", ["a cat", "a red cat"]), ("b.png", "two dogs"), ("b.png", "dogs"), ("b.png", "dogs")]
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))
    (folder / "c.txt").write_text("a house\n\na blue house\n")
    images = opened(folder)
    assert images.all_captions == [["a cat", "a red cat"], ["two dogs", "dogs"], ["a house", "a blue house"]]
    assert images.captions == ["a cat", "two dogs", "a house"]
    assert images.notes[-1] == "several captions: 3 images, of which each epoch draws one"
    drawn = [images.caption(0, epoch) for epoch in range(200)]
    assert drawn == [opened(folder).caption(0, epoch) for epoch in range(200)]
    assert 70 < drawn.count("a cat") < 130 and set(drawn) == {"a cat", "a red cat"}  # 4 standard deviations
    assert drawn != [images.caption(1, epoch).replace("two dogs", "a cat") for epoch in range(200)]


def test_tags_are_shuffled(tmp_path):
    folder = write_images(tmp_path / "set", ["a.png"])
    (folder / "a.txt").write_text("cat, red , small,old")
    images = opened(folder, shuffle_caption=True, keep_tokens=1)
    drawn = {images.caption(0, epoch) for epoch in range(60)}
    assert len(drawn) == 6 and all(sorted(text.split(", ")) == ["cat", "old", "red", "small"] for text in drawn)
    assert all(text.startswith("cat, ") for text in drawn)
    assert opened(folder).caption(0, 5) == "cat, red , small,old"


# --- folders, splits, links, archives ---


def test_a_folder_is_one_set_unless_it_is_split(tmp_path):
    """Names such as train.png and folders such as test mean nothing by themselves."""
    folder = write_images(tmp_path / "test-dev", ["train.png", "x.png", "val/1.png", "test/dev.png", "train/7.png"])
    assert list(captions(folder, constant_caption="a")) == [
        *("test/dev.png", "train.png", "train/7.png", "val/1.png", "x.png"),
    ]
    assert opened(folder, constant_caption="a").notes[1] == (
        "the folders test, train, val are read as one set; data.split and data.validation_split keep them apart"
    )
    config = DataConfig(source=str(folder), size=8, constant_caption="a", validation_split="val")
    assert [len(images) for images in open_images(config, 3, 0, progress=False)] == [1, 1]
    assert list(captions(folder, constant_caption="a", split="test")) == ["test/dev.png"]


def test_validation_source(tmp_path):
    folder, other = write_images(tmp_path / "set"), write_images(tmp_path / "other", ["x.png", "y.png"], seed=2)
    config = DataConfig(source=str(folder), size=8, constant_caption="a", validation_source=str(other))
    images, held_out = open_images(config, 3, 0, progress=False)
    # x.png is the same file as c.png.
    assert (len(images), len(held_out)) == (2, 2) and config.has_validation_set
    assert images.notes[-1] == f"held out too, so not trained on: 1 image ({folder / 'c.png'})"
    with pytest.raises(ValueError, match="every image of '.*other' is also held out"):
        open_images(config.model_copy(update={"source": str(other)}), 3, 0, progress=False)


def test_held_out_images_share_no_file_with_the_training_set(tmp_path):
    folder = write_images(tmp_path / "set", [f"{i}.png" for i in range(10)])
    for i in range(10):
        (folder / f"copy of {i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    config = DataConfig(source=str(folder), size=8, captions="none", holdout=4)
    images, held_out = open_images(config, 3, 0, progress=False)
    assert len(held_out) == 4 and not set(images.digests) & set(held_out.digests)
    assert len(images) + len(held_out) + int(images.notes[-1].split()[7]) == 20


def test_linked_files_and_folders_are_read(tmp_path):
    target = write_images(tmp_path / "elsewhere", ["1.png", "2.png"])
    folder = write_images(tmp_path / "set", ["a.png"], seed=9)
    (folder / "more").symlink_to(target)
    (folder / "more" / "loop").symlink_to(folder)
    (folder / "b.png").symlink_to(target / "1.png")
    assert list(captions(folder, captions="none")) == ["a.png", "b.png", "more/1.png", "more/2.png"]
    (target / "loop").unlink()
    only = tmp_path / "only"
    only.mkdir()
    (only / "linked").symlink_to(target)
    assert list(captions(only, captions="none")) == ["linked/1.png", "linked/2.png"]


def test_what_is_not_read_is_reported(tmp_path):
    folder = write_images(tmp_path / "set", ["a.png", "b.JPG", ".hidden.png", "__MACOSX/a.png"])
    for name in ("film.mp4", "layers.psd", "notes.txt", "README.md", "LICENSE-MIT.txt", "a.txt"):
        (folder / name).write_text("a text")
    images = opened(folder, missing_captions="empty")
    assert images.notes == (
        f"{folder}: 2 images (1 .png, 1 .jpg)",
        "not read: 1 .mp4, 1 .psd, 1 .txt (film.mp4, layers.psd, notes.txt)",
        "captions: 1 from .txt files, such as a text",
        "without a caption, trained with the empty caption: 1 image (b.JPG)",
    )


def test_files_that_metadata_names_must_be_there(tmp_path):
    folder = write_images(tmp_path / "set")
    names = [*CAPTIONS, "../outside.png"]
    (folder / "captions.csv").write_text(csv_text([("file", "text"), *((name, "a text") for name in names)]))
    (tmp_path / "outside.png").write_bytes(encoded(7))
    with pytest.warns(UserWarning, match=r"1 of 4 images of .* unreadable: outside.png \(.*captions.csv, line 5\)"):
        assert list(captions(folder)) == list(CAPTIONS)
    assert "outside.png" in refusal(folder, max_unreadable=0)
    (folder / "b.png").unlink()
    assert refusal(folder).startswith(f"2 of 4 images of {str(folder)!r} are unreadable: ")


def archive_files() -> dict[str, bytes]:
    files = {name: encoded(i) for i, name in enumerate(CAPTIONS)}
    return files | {f"{name[:-4]}.txt": text.encode() for name, text in CAPTIONS.items()}


def write_zip(path: Path, files: Mapping[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_zip_and_tar_files(tmp_path):
    folder = write_images(tmp_path / "set")
    for name, content in archive_files().items():
        (folder / name).write_bytes(content)
    expected = opened(folder)
    for archive in (write_zip(tmp_path / "set.zip", archive_files()), write_tar(tmp_path / "set.tar", archive_files())):
        images = opened(archive)
        assert captions(archive) == ALL and images.digests == expected.digests
        assert images.name(1) == f"{archive}::b.png"
        assert (images.pixels(2) == expected.pixels(2)).all()
    # A folder that holds nothing else.
    (tmp_path / "zipped").mkdir()
    write_zip(tmp_path / "zipped/set.zip", archive_files())
    assert opened(tmp_path / "zipped").captions == list(CAPTIONS.values())


def test_shards(tmp_path):
    """Two shards with the same names in them, by a pattern and as a folder; the image of one key has two captions."""
    for i in range(2):
        files = {"000.png": encoded(i), "000.txt": f"image {i}".encode(), "000.json": b'{"caption": "unused"}'}
        write_tar(tmp_path / f"shards/{i:05d}.tar", files)
    for source in (tmp_path / "shards", tmp_path / "shards/0000*.tar"):
        images = opened(source)
        assert images.captions == ["image 0", "image 1"]
        assert images.name(1) == f"{tmp_path}/shards/00001.tar::000.png"


def test_damaged_archives(tmp_path):
    good = write_zip(tmp_path / "good.zip", archive_files()).read_bytes()
    (tmp_path / "half.zip").write_bytes(good[: len(good) // 2])
    assert refusal(tmp_path / "half.zip") == f"{tmp_path}/half.zip is not a usable zip file: File is not a zip file"
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    assert refusal(tmp_path / "text.tar").startswith(f"{tmp_path}/text.tar is not a usable tar file (uncompressed): ")
    flipped = bytearray(good)
    flipped[60] ^= 255  # within the first image
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.warns(UserWarning, match="1 of 3 images of .* are unreadable: .*flipped.zip::a.png"):
        assert len(opened(tmp_path / "flipped.zip")) == 2
    (tmp_path / "gone.zip").write_bytes(good)
    images = opened(tmp_path / "gone.zip")
    (tmp_path / "gone.zip").unlink()
    with pytest.raises(OSError, match="image .*gone.zip::b.png cannot be read: "):
        images.image(1)


# --- tables ---


def table_of(captions: Sequence[object], text: object, column: str = "text") -> datasets.Dataset:
    rows = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(len(captions))]
    features = datasets.Features({"picture": datasets.Image(), column: text})
    return datasets.Dataset.from_dict({"picture": rows, column: list(captions)}, features=features)


def test_saved_to_disk(tmp_path):
    table = table_of(["a cat", "a dog"], datasets.Value("string"), "caption")
    table.save_to_disk(str(tmp_path / "one"))
    assert opened(tmp_path / "one").captions == ["a cat", "a dog"]
    splits = datasets.DatasetDict({"train": table.select([0]), "test": table.select([1])})
    splits.save_to_disk(str(tmp_path / "splits"))
    config = DataConfig(source=str(tmp_path / "splits"), size=8, validation_split="test")
    assert [one.captions for one in open_images(config, 3, 0, progress=False)] == [["a cat"], ["a dog"]]
    assert refusal(tmp_path / "splits", split="dev").endswith("there is no split 'dev', its splits are: train, test")


def test_captions_of_a_table(tmp_path):
    path, texts = tmp_path / "set.parquet", datasets.Sequence(datasets.Value("string"))
    table_of([["a cat", "a red cat"], ["a dog"], []], texts, "captions").to_parquet(str(path))
    assert refusal(path).startswith(f"1 of 3 images of data.source {str(path)!r} have no caption: {path}, row 2; ")
    assert opened(path, missing_captions="drop").all_captions == [["a cat", "a red cat"], ["a dog"]]
    assert opened(path, missing_captions="empty").all_captions[2] == [""]
    table_of(["a", None], datasets.Value("string")).to_parquet(str(path))
    assert f"have no caption: {path}, row 1; " in refusal(path)
    table_of([1, 0], datasets.ClassLabel(names=["cat", "red_dog"]), "label").to_parquet(str(path))
    assert opened(path).captions == ["red dog", "cat"]
    assert (
        refusal(path, captions="folder")
        == f"data.captions is 'folder', but {str(path)!r} is a table; use column or none"
    )


# --- damaged metadata: the file and the line are named ---


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            '[{"file_name": "a.png", "text": "a"}]',
            "line 1: a list, must be one object {...} on each line",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "a"}\n7\n',
            'line 2: 7, must be an object such as {"file_name',
        ),
        ("metadata.jsonl", '{"file_name": "a.png"\n', "line 1: no valid JSON ("),
        (
            "metadata.jsonl",
            '{"file_name": 3, "text": "a"}\n{"file_name": "a.png"}',
            "line 1: file_name is 3, not the name",
        ),
        ("metadata.json", '{"a.png": 3}', "a.png: 3, must be a caption or an object with one"),
        ("metadata.json", '"a"', ": 'a', must be a list or an object"),
        (
            "metadata.csv",
            "file_name,text\na.png,a red, blue cat\n",
            "line 2: 3 values for the 2 columns file_name, text; put",
        ),
        (
            "metadata.csv",
            "who,what\nme,a cat\n",
            " has no column file_name with the images' files; its columns are: who",
        ),
        ("metadata.csv", "\n", " is empty; write a line for each image, or delete it"),
    ],
)
def test_damaged_metadata(tmp_path, name, text, message):
    folder = write_images(tmp_path / "set", ["a.png"])
    (folder / name).write_text(text, encoding="utf-8")
    found = refusal(folder)
    assert message in found and str(folder / name) in found


def test_text_that_is_not_utf_8(tmp_path):
    folder = write_images(tmp_path / "set", ["a.png", "b.png"])
    (folder / "a.txt").write_bytes("﻿ein Kätzchen".encode("utf-16"))
    (folder / "b.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    assert refusal(folder) == f"{folder}/b.txt is not UTF-8 text"
    (folder / "b.txt").unlink()
    (folder / "b.TXT").write_bytes("ein Kätzchen".encode("utf-8-sig"))
    assert opened(folder).captions[1] == "ein Kätzchen"


# --- formats ---


def test_avif_and_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    folder = tmp_path / "set"
    folder.mkdir()
    image = Image.new("RGB", (64, 64), (200, 40, 40))
    image.save(folder / "a.avif", quality=95)
    heif.from_pillow(image).save(folder / "b.heic", quality=95)
    images = opened(folder, captions="none")
    assert images.notes[0] == f"{folder}: 2 images (1 .avif, 1 .heic)"
    for index in range(2):
        values = (images.pixels(index).mean((1, 2)) + 1) * 127.5
        assert values.tolist() == pytest.approx([200, 40, 40], abs=4)


def test_heic_without_its_package(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    folder = tmp_path / "set"
    folder.mkdir()
    heif.from_pillow(Image.new("RGB", (64, 64))).save(folder / "b.heic")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    assert 'b.heic (HEIC images need another package: pip install "latentdiff[heic]")' in refusal(
        folder, captions="none"
    )


def test_one_unreadable_file_is_tolerated_in_a_small_set(tmp_path):
    folder = write_images(tmp_path / "set")
    (folder / "b.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 3 images of .* are unreadable: .*b.png \(an empty file\); skipped"):
        assert len(opened(folder, captions="none")) == 2
    os.truncate(folder / "a.png", 60)
    assert refusal(folder, captions="none").startswith(f"2 of 3 images of {str(folder)!r} are unreadable: ")


# --- the order of training ---


def test_repeated_images_come_as_often_as_they_should(tmp_path):
    """Each occurrence in an epoch is a view of its own; an epoch without repeats is as it was."""
    batches = StepBatches(3, BatchPlan(4, 2, 1), 0, seed=1, start_step=0, total_steps=6, repeats=[5, 1, 2])
    keys = [key for micro_batch in batches for key in micro_batch]
    assert len(keys) == 24 and [sum(key["index"] == i for key in keys) for i in range(3)] == [15, 3, 6]
    for epoch in range(3):
        own = keys[8 * epoch : 8 * epoch + 8]
        assert sorted((key["index"], key["epoch"] - 5 * epoch) for key in own) == [
            *((0, k) for k in range(5)), (1, 0), (2, 0), (2, 1)
        ]  # fmt: skip
    assert batches.global_batch(1) == [key["index"] for key in keys[4:8]]
    later = StepBatches(3, BatchPlan(4, 2, 1), 0, seed=1, start_step=4, total_steps=6, repeats=[5, 1, 2])
    assert [key for micro_batch in later for key in micro_batch] == keys[16:]
    once = [StepBatches(9, BatchPlan(4, 2, 1), 0, 1, 0, 6, repeats=repeats) for repeats in (None, [1] * 9)]
    assert list(once[0]) == list(once[1])
    with pytest.raises(
        ValueError, match=r"batch_size 9 is larger than the 3 training images \(data.holdout is 2\); use"
    ):
        StepBatches(3, BatchPlan(9, 9, 1), 0, 1, 0, 1, repeats=[5, 1, 2], holdout=2)
