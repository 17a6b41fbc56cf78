"""Choose (style, object) pairs of an emoji set to hold out of training, for `build_emoji.py --held-out`.

python tools/build_emoji.py saved/emoji-64 --size 64
python tools/choose_held_out.py saved/emoji-64 configs/emoji-styles/held_out.txt --count 300
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from latentdiff.commands.common import Command
from latentdiff.training.arguments import SETTINGS, run_as_command, run_typer

MIN_STYLES = 3  # of an object: it is still trained in two of them
# Mean squared error of pixels in -1 .. 1, a PSNR of 26 dB. Many drawings are nearer to another one than that (a tongue
# is the same in two styles, a man differs from a woman by a few pixels): which of the two an image shows is no question
# that pixels can answer.
MIN_DISTANCE = 0.01
CHUNK = 256  # images compared with all others at once

Row = dict[str, Any]


def choose_held_out(rows: Sequence[Row], distances: Sequence[float], count: int) -> list[tuple[str, str]]:
    """`count` random (style, label) pairs in the order of `rows`, as many of each style, each object at most once.

    Only of objects that MIN_STYLES styles have, and whose drawing is MIN_DISTANCE or more from every other one. The
    same choice every time.
    rows: of metadata.jsonl; distances: of each row's drawing to the nearest other one.
    Raises ValueError if the styles do not divide `count` or have too few such objects.
    """
    styles: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        styles[row["label"]].add(row["style"])
    candidates: dict[str, list[str]] = {row["style"]: [] for row in rows}
    for row, distance in zip(rows, distances, strict=True):
        if len(styles[row["label"]]) >= MIN_STYLES and distance >= MIN_DISTANCE:
            candidates[row["style"]].append(row["label"])
    if count < 1 or count % len(candidates):
        raise ValueError(f"count is {count}, must be a multiple of {len(candidates)}, the number of styles")
    shuffle = random.Random(0).shuffle
    for labels in candidates.values():
        shuffle(labels)
    chosen: dict[str, str] = {}
    for _ in range(count // len(candidates)):  # in turn, so that no style takes the objects of a smaller one
        for style, labels in candidates.items():
            label = next((label for label in labels if label not in chosen), None)
            if label is None:
                raise ValueError(f"count is {count}, but style {style!r} has too few objects for its share")
            chosen[label] = style
    return [(row["style"], row["label"]) for row in rows if chosen.get(row["label"]) == row["style"]]


def nearest_distances(images: np.ndarray) -> list[float]:
    """The mean squared error of each image to the nearest other one: [N, values] -> N."""
    squares = np.square(images, dtype=np.float64).sum(axis=1)
    found: list[float] = []
    for first in range(0, len(images), CHUNK):
        part = slice(first, first + CHUNK)
        distances = squares[part, None] + squares - 2.0 * (images[part] @ images.T)
        rows = np.arange(len(distances))
        distances[rows, first + rows] = np.inf
        found += (distances.min(axis=1).clip(min=0) / images.shape[1]).tolist()
    return found


def _read(folder: Path) -> tuple[list[Row], np.ndarray]:
    """The metadata and the images [N, values] in -1 .. 1 of a set without splits."""
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{folder} is not a set without splits that tools/build_emoji.py wrote ({error})") from None
    rows = [json.loads(line) for line in lines]
    images = []
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            images.append(np.asarray(image.convert("RGB"), np.float32).ravel() / 127.5 - 1)
    return rows, np.stack(images)


# ---------------------------------------------------------------- command line

app = typer.Typer(**SETTINGS)


@app.command(cls=Command)
def choose(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A set that tools/build_emoji.py wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The list to write.")],
    count: Annotated[int, typer.Option(help="Pairs to hold out, a multiple of the number of styles.")] = 300,
) -> None:
    """Write a list of (style, object) pairs to hold out."""
    rows, images = _read(folder)
    pairs = choose_held_out(rows, nearest_distances(images), count)
    heading = (
        f"# {count} pairs of style and object to hold out, as many of each style, each object once. Chosen by\n"
        f"# tools/choose_held_out.py: objects in {MIN_STYLES} or more styles, drawings that differ from all others.\n"
    )
    out.write_text(heading + "".join(f"{style}\t{label}\n" for style, label in pairs), encoding="utf-8")
    print(f"{out}: {len(pairs)} of {len(rows)} pairs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input is one line and exit status 2."""
    run_as_command(lambda given: run_typer(app, given), arguments)


if __name__ == "__main__":
    main()
