"""`latentdiff inspect`: counts, histograms, problems, duplicates, exit status, HTML, metadata.jsonl."""

import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from command_line import refusal
from PIL import Image

from latentdiff.commands.cli import main
from latentdiff.config import DataConfig, UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.data.metadata import refuse_metadata, write_metadata
from latentdiff.evaluation.inspection import (
    Inspection,
    Section,
    contact_sheet,
    inspect,
    read_settings,
    sections,
)
from latentdiff.evaluation.inspection_page import as_html, as_text
from latentdiff.models.tokenizer import CLIPTokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
SCRIPT = "<script>alert(1)</script>"


def smooth(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A few random colours, enlarged; one seed is the same image in every size."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BOX)


def write_set(folder: Path, count: int = 4) -> Path:
    """Images of 32 pixels with the captions "a picture of number 0", ..."""
    folder.mkdir()
    for i in range(count):
        smooth(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of number {i}")
    return folder


def found_in(source: Path, size: int = 16, *overrides: str) -> Inspection:
    return inspect(read_settings(str(source), size, None, ["data.holdout=0", *overrides]), progress=False)


def section(found: Inspection, title: str) -> Section:
    return next(part for part in sections(found) if part.title.startswith(title))


def lines(found: Inspection, title: str) -> dict[str, list[str]]:
    """The findings of a section with their names."""
    return {finding.text: list(finding.names) for finding in section(found, title).findings}


def bars(found: Inspection, title: str, number: int = 0) -> dict[str, int]:
    """The bars of a histogram that are not empty."""
    return {label: count for label, count in section(found, title).histograms[number].bars if count}


def status(*arguments: str) -> int:
    try:
        main(["inspect", *arguments, "--no-progress"])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


# --- the report ---


def test_a_good_set(tmp_path, capsys):
    folder = write_set(tmp_path / "set", 6)
    assert status(str(folder), "--size", "16", "data.holdout=2") == 0
    printed = capsys.readouterr().out
    for line in (
        "  None: training would start.",
        "  readable: 6 (6 PNG)",
        f"  {folder}: 6 images (6 .png)",
        "  shorter side: 32 to 32 px, trained at 16 px",
        "    32 to 63  6  ##############################",
        "  different captions: 6, of 6",
        "  equal files: none",
        "  near-duplicates: none",
        "  2 images to validate on (data.holdout=2, the same ones in every run)",
    ):
        assert line in printed.splitlines(), line
    found = found_in(folder, 16, "data.holdout=2")
    images, held_out = open_images(DataConfig(source=str(folder), size=16, holdout=2), 3, 7, progress=False)
    assert [row.name for row in found.rows if row.held_out] == [Path(held_out.name(i)).name for i in range(2)]
    assert [row.captions for row in found.training] == images.all_captions
    assert list(tmp_path.iterdir()) == [folder] and len(list(folder.iterdir())) == 12  # nothing was written


def test_sizes_and_crop(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, size in {"a": (16, 16), "b": (15, 30), "c": (40, 32), "d": (64, 16), "e": (100, 100)}.items():
        smooth(ord(name), size).save(folder / f"{name}.png")
    found = found_in(folder, 16, "data.captions=none")
    assert lines(found, "Sizes")["shorter side: 15 to 100 px, trained in 4 buckets"] == []
    buckets = ["12 x 22: 1", "14 x 18: 1", "16 x 16: 2", "22 x 12: 1"]
    assert lines(found, "Sizes")["buckets (height x width: images)"] == buckets
    found = found_in(folder, 16, "data.captions=none", "data.buckets=false")
    assert bars(found, "Sizes") == {"8 to 15": 1, "16 to 31": 2, "32 to 63": 1, "64 and more": 1}
    assert bars(found, "Sizes", 1) == {"1:2 to 2:3": 1, "4:5 to 5:4": 2, "5:4 to 3:2": 1, "2:1 and more": 1}
    assert lines(found, "Sizes") == {
        "shorter side: 15 to 100 px, trained at 16 px": [],
        "smaller than the training size, so enlarged: 1": ["b.png (15 x 30)"],
        # (0.5 + 0.2 + 0.75) / 5
        "the centre crop cuts away 29.0% of an image on average, 75.0% at most": [
            *("d.png (75%)", "b.png (50%)", "c.png (20%)"),
        ],
    }
    assert found.problems == []


def test_buckets(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(6):
        smooth(i, (96, 48) if i < 3 else (48, 96)).save(folder / f"{i}.png")
    overrides = ["data.captions=none", "data.holdout=2"]
    found = found_in(folder, 256, *overrides)
    images, held_out = open_images(found.settings.data, 3, 0, progress=False)
    assert found.images is not None and found.images.layout == images.layout and len(images.layout.shapes) == 2
    assert [row.shape for row in found.training] == [images.shape(i) for i in range(4)]
    named = lines(found, "Sizes")["buckets (height x width: images)"]
    assert len(named) == 2 and all(name.endswith(": 3") for name in named)
    assert max(row.cut_away for row in found.rows) < 0.1
    sizes = {found.picture(row, 160).size for row in found.sheet()}
    sheet = contact_sheet(found)  # four in a row, each whole
    assert len(sizes) == 2 and sheet.width >= 4 * max(w for w, _ in sizes) and sheet.height > max(h for _, h in sizes)
    assert as_html(found, sections(found)).count("<figure>") >= 4
    squares = found_in(folder, 256, *overrides, "data.buckets=false")
    assert {row.cut_away for row in squares.rows} == {0.5} and {row.shape for row in squares.rows} == {(256, 256)}
    small = found_in(folder, 64, *overrides, "data.min_size=100")
    assert len(small.problems) == 1 and "data.min_size must be at most 48" in small.problems[0]


def test_formats_and_conversions(tmp_path):
    folder = write_set(tmp_path / "set", 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth(1, (20, 40)).save(folder / "turned.jpg", exif=turned)
    smooth(2).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(folder / "deep.png")
    smooth(3).convert("RGBA").save(folder / "alpha.png")
    smooth(4).save(folder / "moving.gif", save_all=True, append_images=[smooth(5)])
    (folder / "notes.pdf").write_text("")
    found = found_in(folder, 16, "data.constant_caption=a picture")
    assert lines(found, "Images") == {
        "readable: 6 (3 PNG, 2 JPEG, 1 GIF)": [],
        f"{folder}: 6 images (3 .png, 2 .jpg, 1 .gif)": [],
        "not read: 1 .pdf (notes.pdf)": [],
        f"1 of 6 images of {str(folder)!r} have several frames; the first one is used: {folder / 'moving.gif'}": [],
        "converted from CMYK: 1": ["cmyk.jpg"],
        "scaled from 16 or 32 bits to 8: 1": ["deep.png"],
        "turned upright (EXIF): 1": ["turned.jpg"],
        "with an alpha channel: 1": ["alpha.png"],
    }
    (row,) = (row for row in found.rows if row.name == "turned.jpg")
    assert (row.file.width, row.file.height) == (40, 20)


def test_caption_lengths_are_those_of_the_tokenizer(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    (folder / "0.txt").write_text("cat " * 75)  # 77 tokens
    (folder / "1.txt").write_text("cat " * 76)
    found = found_in(folder)
    assert set(found.tokens.values()) == {77, 78, 7}
    assert bars(found, "Captions") == {"3 to 10": 1, "61 to 77": 1, "more than 77": 1}
    text = "images with captions of more than 77 tokens, whose rest is cut off: 1"
    assert lines(found, "Captions")[text] == ["1.png (78 tokens)"]
    tokenizer = CLIPTokenizer.load()
    with pytest.warns(UserWarning, match="has 78 tokens, the text encoder reads 77"):
        tokenizer(list(found.tokens))


def test_captions_like_classes(tmp_path):
    folder = tmp_path / "set"
    for i in range(12):
        (folder / ("cat" if i < 8 else "red_dog")).mkdir(parents=True, exist_ok=True)
        smooth(i).save(folder / ("cat" if i < 8 else "red_dog") / f"{i}.png")
    captions = lines(found_in(folder), "Captions")
    assert captions["the most frequent ones"] == ["8 x cat", "4 x red dog"]
    assert "captions: 12 from folder names, such as cat" in captions
    assert "captions look like classes: each comes 6 times on average" in captions
    assert not any("classes" in line for line in lines(found_in(write_set(tmp_path / "other")), "Captions"))


def test_duplicates(tmp_path):
    folder = write_set(tmp_path / "set", 4)
    for name in ("copy", "other"):
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    (folder / "copy.txt").write_text("a picture of number 0")
    (folder / "other.txt").write_text("something else")
    shutil.copy(folder / "2.png", folder / "two.png")
    (folder / "two.txt").write_text("a picture of number 2")
    smooth(1, (48, 40)).save(folder / "near.jpg", quality=80)
    (folder / "near.txt").write_text("a picture of number 1, larger")
    found = found_in(folder)
    assert lines(found, "Duplicates") == {
        "groups of equal files: 2 (5 images)": ["0.png = copy.png = other.png", "2.png = two.png"],
        "of these with different captions: 1": ["0.png = copy.png = other.png"],
        "groups of near-duplicates: 1 (2 images)": ["1.png ~ near.jpg"],
    }
    # Held out as a set of its own, beside the file that it was made from.
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for name in ("near.jpg", "near.txt", "copy.png", "copy.txt"):
        shutil.move(folder / name, held_out / name)
    found = found_in(folder, 16, f"data.validation_source={held_out}")
    text = "held out with a near-duplicate in training, so that validation looks too good: 1"
    assert lines(found, "Duplicates")[text] == ["near.jpg"]
    assert {row.name for row in found.training} == {"1.png", "2.png", "3.png", "two.png"}
    note = f"held out too, so not trained on: 2 images ({folder / '0.png'}, {folder / 'other.png'})"
    assert note in lines(found, "Images")
    assert f"2 images to validate on ({held_out})" in lines(found, "Held out")


def test_without_the_library_near_duplicates_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert status(str(write_set(tmp_path / "set"))) == 0
    assert (
        'near-duplicates were not looked for: that needs pip install "latentdiff[inspect]"' in capsys.readouterr().out
    )


def test_names_are_relative_to_the_source(tmp_path, monkeypatch):
    write_set(tmp_path / "set", 1)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in (tmp_path / "set").iterdir():
            file.write(path, f"sub/{path.name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("./set", "set/", "~/set"):
        assert [row.name for row in found_in(Path(source)).rows] == ["0.png"]
        assert [row.name for row in inspect(read_settings(source, 16, None), False).rows] == ["0.png"]
    assert [row.name for row in found_in(Path("set.zip")).rows] == ["sub/0.png"]


# --- problems ---


def test_all_problems_are_listed(tmp_path, capsys):
    folder = write_set(tmp_path / "set", 5)
    for name in ("0.txt", "1.txt"):
        (folder / name).unlink()
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "zero"}\n{"file_name": "1.png", "text": 5}\n[1]\nnonsense\n'
        '{"file_name": "gone.png", "text": "gone"}\n{"file_name": 3, "text": "three"}\n'
    )
    (folder / "2.txt").write_bytes(b"\xff\xfa\x80")
    (folder / "3.png").write_bytes(b"damaged")
    (folder / "4.png").write_bytes(b"")
    assert status(str(folder), "--size", "16", "data.holdout=9") == 1
    found = found_in(folder, 16, "data.holdout=9")
    metadata = folder / "metadata.jsonl"
    starts = [
        f"{metadata}, line 3: a list, must be one object",
        f"{metadata}, line 4: no valid JSON",
        f"{metadata}, line 2: the caption is 5, not text",
        f"{metadata}, line 6: file_name is 3, not the name of a file",
        f"{folder / '2.txt'} is not UTF-8 text",
        f"2 of 5 images of data.source {str(folder)!r} have no caption: 1.png, 2.png",
        f"3 of 6 images of {str(folder)!r} are unreadable: {folder / '3.png'} (not an image of a known format), ",
        f"data.holdout is 9, but {str(folder)!r} has only 3 images",
    ]
    assert len(found.problems) == len(starts)
    for problem, start in zip(found.problems, starts, strict=True):
        assert problem.startswith(start) and "\n" not in problem
    assert found.unread[-1] == f"gone.png ({metadata}, line 5) (is not there)"
    assert {row.name: row.captions for row in found.rows}["0.png"] == ["zero"]
    printed = capsys.readouterr().out
    assert printed.startswith("Problems: training would refuse this\n")
    # What training says first is among them.
    with pytest.raises(ValueError) as error:
        open_images(DataConfig(source=str(folder), size=16, holdout=9), 3, 0, progress=False)
    assert str(error.value) in found.problems


def test_rows_of_other_metadata(tmp_path):
    folder = write_set(tmp_path / "set", 2)
    (folder / "captions.csv").write_text("file_name,text\n0.png,zero\n1.png,one,more\n")
    (folder / "metadata.json").write_text('[{"file_name": "0.png", "text": "nought"}, 7]')
    problems = found_in(folder).problems
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{folder / 'captions.csv'}, line 3",
        f"{folder / 'metadata.json'}, entry 2",
    ]


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = io.BytesIO()
    smooth(0).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 3, "text": ["a", None, "c"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    found = found_in(path)
    assert found.problems == [
        f"1 of 3 images of data.source {str(path)!r} have no caption: {path}, row 1; "
        "data.missing_captions=drop leaves them out, empty trains them without"
    ]
    assert lines(found, "Duplicates")["groups of equal files: 1 (3 images)"] == ["row 0 = row 1 = row 2"]
    wrong = found_in(path, 16, "data.caption_column=titel", "data.image_column=image")
    assert wrong.problems[0].startswith("data.caption_column 'titel' is not in")
    assert found_in(path, 16, "data.missing_captions=empty").problems == []


@pytest.mark.parametrize("files", [{}, {"notes.pdf": b""}, {"a.png": b"damaged", "a.txt": b"a"}])
def test_a_source_without_any_image_is_one_problem(tmp_path, files, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    page = tmp_path / "report.html"
    assert status(str(folder), "--html", str(page), "--sheet", str(tmp_path / "sheet.png")) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n\n") == 1 and str(folder) in printed and page.is_file()
    assert status(str(tmp_path / "nowhere")) == 1
    assert "nowhere' does not exist" in capsys.readouterr().out


def test_wrong_usage(tmp_path, capsys):
    folder = str(write_set(tmp_path / "set"))
    for arguments, message in [
        ([], "SOURCE is missing"),
        ([folder, "data.caption=folder"], "caption"),
        ([folder, "train.steps=3"], "train"),
        ([folder, "--size", "0"], "--size"),
        ([folder, "--sheet", "sheet.jpg"], "--sheet sheet.jpg must end in .png"),
        ([folder, "--html", str(tmp_path)], "is a folder, must be a file"),
        ([folder, "--config", "nowhere.yaml"], "config nowhere.yaml does not exist"),
    ]:
        error = refusal(capsys, "inspect", *arguments)
        assert error.startswith("error: ") and message in error


# --- with a training config ---


def test_a_training_config(tmp_path, capsys):
    folder = write_set(tmp_path / "set", 9)
    (folder / "0.txt").write_text("cat " * 30)
    other = [f"data.source={folder}", "data.validation_split=null", "data.validation_limit=null", "data.holdout=0"]
    settings = read_settings(str(folder), None, CONFIGS / "unet.yaml", [*other[1:], "train.batch_size=16"])
    assert settings.data.size == 64 and settings.tokens == 24 and settings.channels == 3
    found = inspect(settings, progress=False)
    assert found.problems == [
        "train.batch_size 16 is larger than the 9 training images; use a smaller one, or data.repeat"
    ]
    text = "images with captions of more than 24 tokens, whose rest is cut off: 1"
    assert lines(found, "Captions")[text] == ["0.png (32 tokens)"]
    steps = load_config(UNetTrainingConfig, CONFIGS / "unet.yaml").train.steps
    assert f"{steps:,} steps of 16 images are {steps * 16 / 9:,.1f} epochs of this set" in lines(found, "What to")
    # The overrides may follow the config without a source: it is the config's.
    assert status("--config", str(CONFIGS / "unet.yaml"), *other, "train.batch_size=8") == 0
    assert f"{folder}: 9 images (9 .png)" in capsys.readouterr().out
    # Stage 1 needs no captions.
    for path in folder.glob("*.txt"):
        path.unlink()
    stage_1 = [*other[1:], "train.batch_size=8"]
    assert inspect(read_settings(str(folder), None, CONFIGS / "vae.yaml", stage_1), progress=False).problems == []
    refused = inspect(read_settings(str(folder), None, CONFIGS / "unet.yaml", stage_1), progress=False).problems
    assert len(refused) == 1 and "no image of data.source" in refused[0]


def test_drawn_sets():
    found = inspect(read_settings("embedded", 32, None, ["data.holdout=4", "data.limit=12"]), progress=False)
    assert len(found.training) == 8 and found.problems == []
    assert all(re.fullmatch(r"[\w./-]+\.webp", row.name) and not row.name.startswith("/") for row in found.rows)
    overrides = ["data.objects=2", "data.validation_split=held_out", "data.validation_limit=3", "data.limit=20"]
    found = inspect(read_settings("embedded:compositions", 32, None, overrides), progress=False)
    assert (len(found.training), len(found.rows)) == (20, 23)
    assert bars(found, "Sizes") == {"32 to 63": 23}


# --- files ---


def test_html_is_escaped_and_needs_nothing_else(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    name = "<script>x\"'&<b>.png"
    shutil.copy(folder / "0.png", folder / name)
    (folder / f"{name[:-4]}.txt").write_text(f"{SCRIPT}\x1b[31m & a cat")
    (folder / "<img src=x>.pdf").write_text("")
    found = found_in(folder)
    page = as_html(found, sections(found))
    assert SCRIPT not in page and "<script" not in page and "<img src=x" not in page and "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;script&gt;x&quot;&#x27;&amp;&lt;b&gt;.png" in page
    assert page.count("<img ") == page.count('<img src="data:image/png;base64,') >= 4
    assert not re.findall(r'(?:href|src)\s*=\s*"(?!data:)|url\(|@import|\son\w+=', page)
    assert "default-src 'none'" in page
    for part in sections(found):
        assert f">{part.title}</h2>" in page
    assert "\x1b" not in as_text(sections(found))


def test_the_contact_sheet_shows_what_the_model_sees(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    wide = Image.new("RGB", (64, 32), "blue")
    wide.paste("red", (16, 0, 48, 32))  # what the centre crop keeps
    wide.save(folder / "wide.png")
    sheet, page = tmp_path / "out" / "sheet.png", tmp_path / "out" / "report.html"
    arguments = [str(folder), "--size", "160", "data.constant_caption='a red square \u4e2d'"]
    assert status(*arguments, "--sheet", str(sheet), "--html", str(page)) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{page}\n{sheet}\n")
    image = Image.open(sheet)
    assert image.getpixel((20, 80)) == image.getpixel((150, 80)) == (255, 0, 0)
    assert image.getpixel((image.width - 3, 80)) == (255, 255, 255)
    many = inspect(read_settings("embedded", 32, None), progress=False)
    assert len(many.sheet()) == 16 and contact_sheet(many).width > 400


# --- metadata.jsonl ---


def opened(folder: Path, **config: object) -> CaptionedImages:
    return open_images(DataConfig(**{"holdout": 0, "source": str(folder), "size": 16} | config), 3, 0, progress=False)[
        0
    ]


def by_name(images: CaptionedImages) -> list[tuple[str, list[str]]]:
    return [(images.name(i), images.all_captions[i]) for i in range(len(images))]


def test_written_metadata_gives_the_same_captions(tmp_path, capsys):
    folder = write_set(tmp_path / "set", 4)
    (folder / "sub").mkdir()
    smooth(7).save(folder / "sub" / 'ein "Bild".png')
    (folder / "sub" / 'ein "Bild".txt').write_text("ein Bild,\u2028 schön\nnoch eins\n", encoding="utf-8")
    before = by_name(opened(folder))
    assert status(str(folder), "--size", "16", "--write-metadata") == 0
    assert capsys.readouterr().out.endswith(f"\n\n{folder / 'metadata.jsonl'}\n")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"file_name": "0.png", "text": "a picture of number 0"}
    assert rows[4]["file_name"] == 'sub/ein "Bild".png' and isinstance(rows[4]["text"], list)
    for path in folder.rglob("*.txt"):
        path.unlink()
    after = opened(folder)
    assert by_name(after) == before and "5 from metadata.jsonl" in after.notes[1]


@pytest.mark.parametrize("captions", ["auto", "folder", "file_name"])
def test_written_metadata_of_names(tmp_path, captions):
    folder = tmp_path / "set"
    for i, name in enumerate(["3_red cat/a big_one.png", "3_red cat/b small.png", "2_dog/a dog.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        smooth(i).save(folder / name)
    before = opened(folder, captions=captions)
    write_metadata(DataConfig(holdout=0, source=str(folder), size=16, captions=captions))
    after = opened(folder)
    assert by_name(after) == by_name(before) and after.repeats == before.repeats == [2, 3, 3]
    assert "metadata.jsonl" in "".join(after.notes)


def test_written_metadata_keeps_what_is_missing_and_unreadable(tmp_path):
    folder = write_set(tmp_path / "set", 4)
    (folder / "1.txt").unlink()
    (folder / "2.png").write_bytes(b"damaged")
    config = {"missing_captions": "empty", "max_unreadable": 0.5}
    with pytest.warns(UserWarning, match="unreadable"):
        before = by_name(opened(folder, **config))
    assert status(str(folder), "--write-metadata") == 1  # problems do not keep it from being written
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.warns(UserWarning, match="unreadable"):
        assert by_name(opened(folder, **config)) == before
    with pytest.raises(ValueError, match="1 of 4 images .* have no caption: 1.png"):
        opened(folder)


def test_written_metadata_of_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(folder / "train", 3)
    write_set(folder / "test", 2)
    config = DataConfig(source=str(folder), size=16, validation_split="test")
    before = [by_name(half) for half in open_images(config, 3, 0, progress=False)]
    assert write_metadata(config) == [folder / "train" / "metadata.jsonl", folder / "test" / "metadata.jsonl"]
    for path in folder.rglob("*.txt"):
        path.unlink()
    # Files of equal content in both are left out as before.
    assert [by_name(half) for half in open_images(config, 3, 0, progress=False)] == before


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.json", "sub/captions.tsv"])
def test_metadata_is_never_replaced(tmp_path, name, capsys):
    folder = write_set(tmp_path / "set")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    error = refusal(capsys, "inspect", str(folder), "--write-metadata")
    assert error == f"error: {folder / name} is there already and is not replaced\n"
    assert (folder / name).read_text() == "x" and len([*folder.glob("*.jsonl")]) == (name == "metadata.jsonl")


def test_metadata_is_written_into_folders_of_images_only(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    archives = tmp_path / "archives"
    archives.mkdir()
    with zipfile.ZipFile(archives / "set.zip", "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    tables = tmp_path / "tables"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tables)
    capsys.readouterr()  # bars of datasets
    for source in (archives / "set.zip", archives, tables, "embedded", "someone/a-set", tmp_path / "*"):
        error = refusal(capsys, "inspect", str(source), "--write-metadata")
        assert error.startswith("error: metadata.jsonl can be written into a folder of images only")
        assert error.count("\n") == 1
    refuse_metadata(str(folder))
    for config, message in [
        ({"captions": "none"}, "has no captions that metadata.jsonl could hold"),
        ({"captions": "column"}, "has no captions that metadata.jsonl could hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_metadata(DataConfig(holdout=0, source=str(folder), size=16, **config))
    (folder / "a\\b.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "a\\b.txt").write_text("a")
    with pytest.raises(ValueError, match="has a backslash"):
        write_metadata(DataConfig(holdout=0, source=str(folder), size=16))
    assert not list(tmp_path.rglob("metadata.jsonl"))
