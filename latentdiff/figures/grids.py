"""Grids of images, with or without labels."""

import math
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentdiff.figures.charts import evenly_chosen

FONT_SIZE = 14
GAP = 6  # pixels between images, and around labels
ROW_LABEL_WIDTH = 160  # pixels at most
LABEL_LINES = 3  # at most


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images in a table with a label left of each row and above each column; returns RGB.

    A column is as wide as its widest image, a row as high as its highest, and images lie at their top left. Labels
    are wrapped at words to at most three lines, and what then does not fit is cut; if all of one kind are empty they
    take no room.
    Raises ValueError if there is no image or the numbers of labels are not those of rows and columns.
    """
    _check_table(rows, row_labels, column_labels)
    font = ImageFont.load_default(size=FONT_SIZE)
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    above = [_wrapped(label, width, LABEL_LINES, font) for label, width in zip(column_labels, widths, strict=True)]
    lines = [max(1, min(LABEL_LINES, height // _line_height(font))) for height in heights]
    beside = [_wrapped(label, ROW_LABEL_WIDTH, n, font) for label, n in zip(row_labels, lines, strict=True)]
    heights = [max(height, len(text) * _line_height(font)) for height, text in zip(heights, beside, strict=True)]
    margin_left = max(ceil(font.getlength(line)) for text in beside for line in [*text, ""])
    margin_top = max(map(len, above)) * _line_height(font)
    lefts = _places(margin_left, widths)
    tops = _places(margin_top, heights)

    table = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(table)
    for left, width, text in zip(lefts, widths, above, strict=False):
        for i, line in enumerate(text):
            place = (left + width / 2, GAP + margin_top - (len(text) - i) * _line_height(font))
            draw.text(place, line, fill="black", font=font, anchor="ma")
    for top, height, text in zip(tops, heights, beside, strict=False):
        first = top + (height - len(text) * _line_height(font)) / 2
        for i, line in enumerate(text):
            draw.text((GAP + margin_left, first + i * _line_height(font)), line, fill="black", font=font, anchor="ra")
    for top, row in zip(tops, rows, strict=False):
        for left, image in zip(lefts, row, strict=False):
            table.paste(image.convert("RGB"), (left, top))
    return table


def _check_table(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    if not rows or not rows[0]:
        raise ValueError("a table of images needs at least one image")
    if len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row labels for {len(rows)} rows of images, must be as many")
    for i, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(f"row {i} has {len(row)} images for {len(column_labels)} column labels, must be as many")


def _places(margin: int, sizes: Sequence[int]) -> list[int]:
    """Where each image starts along a side, and where the table ends: gaps around everything but an absent margin."""
    places = [GAP + margin + (GAP if margin else 0)]
    for size in sizes:
        places.append(places[-1] + size + GAP)
    return places


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _wrapped(text: str, width: int, max_lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of `text` at most `width` pixels wide, broken at spaces; too long a word or text ends in "..."."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [" ".join(lines[max_lines - 1 :])]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    kept = max((n for n in range(len(line)) if font.getlength(line[:n].rstrip() + "...") <= width), default=0)
    return line[:kept].rstrip() + "..." if kept else ""


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in rows of `columns` (about square, at most eight wide), two pixels apart, on white."""
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        grid.paste(image.convert("RGB"), ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return grid


MAX_SAMPLES = 12  # grids in samples.png
MAX_SAMPLES_SIZE = (2400, 8000)  # pixels; a larger samples.png is scaled down


def stacked_samples(paths: Sequence[Path]) -> Image.Image:
    """Sample grids `step_00000100.png`, ... top to bottom, each with its step to the left."""
    chosen = evenly_chosen(paths, MAX_SAMPLES)
    grids = [Image.open(path).convert("RGB") for path in chosen]
    font = ImageFont.load_default(size=18)
    labels = [f"{int(path.stem.removeprefix('step_')):,}" for path in chosen]
    gap = 12
    margin = 2 * gap + math.ceil(max(font.getlength(label) for label in ("step", *labels)))
    tops = np.cumsum([3 * gap, *(max(grid.height, 18) + gap for grid in grids)]).tolist()
    stack = Image.new("RGB", (margin + max(grid.width for grid in grids) + gap, tops[-1]), "white")
    draw = ImageDraw.Draw(stack)
    draw.text((margin - gap, gap), "step", fill="black", font=font, anchor="rt")
    for grid, label, top in zip(grids, labels, tops, strict=False):
        stack.paste(grid, (margin, top))
        draw.text((margin - gap, top + grid.height // 2), label, fill="black", font=font, anchor="rm")
    stack.thumbnail(MAX_SAMPLES_SIZE, Image.Resampling.LANCZOS)
    return stack
