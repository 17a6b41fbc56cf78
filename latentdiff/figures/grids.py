"""Grids of images, with or without labels."""

from collections.abc import Sequence
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 14
GAP = 2  # pixels between images of an unlabelled grid
LABELLED_GAP = 6  # pixels between images, and around images and labels
MAX_ROW_LABEL_WIDTH = 160  # pixels
MAX_LABEL_LINES = 3


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in rows, two pixels apart, on white; returns RGB.

    columns: images per row; by default about as many as rows, at most eight.
    """
    columns = columns or min(8, ceil(sqrt(len(images))))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    width, height = images[0].size
    return _pasted(rows, _starts(0, [width] * columns, GAP), _starts(0, [height] * len(rows), GAP), GAP, border=0)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images in a table with a label left of each row and above each column, on white; returns RGB.

    A column is as wide as its widest image, a row as high as its highest, and images lie at their top left. Labels
    are wrapped at words to at most three lines, and cut if they still do not fit. Labels that are all empty take no
    room.
    Raises ValueError if there is no image, or the numbers of labels are not those of rows and columns.
    """
    _check_table(rows, row_labels, column_labels)
    font, line_height = _label_font()
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    above = [_wrapped(label, width, MAX_LABEL_LINES, font) for label, width in zip(column_labels, widths, strict=True)]
    lines = [max(1, min(MAX_LABEL_LINES, height // line_height)) for height in heights]
    beside = [_wrapped(label, MAX_ROW_LABEL_WIDTH, n, font) for label, n in zip(row_labels, lines, strict=True)]
    heights = [max(height, len(text) * line_height) for height, text in zip(heights, beside, strict=True)]
    margin_left = max(ceil(font.getlength(line)) for text in beside for line in [*text, ""])
    margin_top = max(map(len, above)) * line_height
    lefts = _starts(_after_margin(margin_left), widths, LABELLED_GAP)
    tops = _starts(_after_margin(margin_top), heights, LABELLED_GAP)

    table = _pasted(rows, lefts, tops, LABELLED_GAP, border=LABELLED_GAP)
    draw = ImageDraw.Draw(table)
    for left, width, text in zip(lefts, widths, above, strict=False):
        for i, line in enumerate(text):
            position = (left + width / 2, LABELLED_GAP + margin_top - (len(text) - i) * line_height)
            draw.text(position, line, fill="black", font=font, anchor="ma")
    for top, height, text in zip(tops, heights, beside, strict=False):
        first = top + (height - len(text) * line_height) / 2
        for i, line in enumerate(text):
            position = (LABELLED_GAP + margin_left, first + i * line_height)
            draw.text(position, line, fill="black", font=font, anchor="ra")
    return table


def magnified(image: Image.Image, side: int) -> Image.Image:
    """An image scaled by a whole factor, its pixels as squares, so that it is not narrower than `side` pixels."""
    factor = max(1, ceil(side / image.width))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def picture(image: Image.Image, side: int) -> Image.Image:
    """An image for a contact sheet: at most `side` pixels, a small one enlarged to about half of that."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return magnified(image, side // 2)


def padded(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images of several sizes in the middle of white, all as wide and as high as any of them; RGB."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheets = [Image.new("RGB", (width, height), "white") for _ in images]
    for sheet, image in zip(sheets, images, strict=True):
        sheet.paste(image.convert("RGB"), ((width - image.width) // 2, (height - image.height) // 2))
    return sheets


def captioned_grid(cells: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """Cells of a few images side by side, all of one size, each with its caption underneath, on white; returns RGB.

    Captions are wrapped as those of `labelled_grid`.
    Raises ValueError if there is no image, or the number of captions is not that of the cells.
    """
    if not cells or not cells[0] or len(captions) != len(cells):
        raise ValueError(f"{len(captions)} captions for {len(cells)} cells of images, must be as many and at least one")
    font, line_height = _label_font()
    strips = [image_grid(cell, columns=len(cell)) for cell in cells]
    width, height = strips[0].size
    lines = [_wrapped(caption, width, MAX_LABEL_LINES, font) for caption in captions]
    text_height = line_height * max(map(len, lines))
    captioned = []
    for strip, text in zip(strips, lines, strict=True):
        cell = Image.new("RGB", (width, height + text_height), "white")
        cell.paste(strip)
        for i, line in enumerate(text):
            ImageDraw.Draw(cell).text((width / 2, height + i * line_height), line, fill="black", font=font, anchor="ma")
        captioned.append(cell)
    rows = [captioned[i : i + columns] for i in range(0, len(captioned), columns)]
    lefts = _starts(LABELLED_GAP, [width] * columns, 2 * LABELLED_GAP)
    tops = _starts(LABELLED_GAP, [height + text_height] * len(rows), LABELLED_GAP)
    return _pasted(rows, lefts, tops, LABELLED_GAP, border=LABELLED_GAP)


def _label_font() -> tuple[ImageFont.FreeTypeFont, int]:
    """The font of labels and captions, and the height of a line in pixels."""
    font = ImageFont.load_default(size=FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size it is
    return font, sum(font.getmetrics())


def _starts(first: int, sizes: Sequence[int], gap: int) -> list[int]:
    """Where each image starts along a side, and where one more would: the end of the last one plus a gap."""
    starts = [first]
    for size in sizes:
        starts.append(starts[-1] + size + gap)
    return starts


def _after_margin(margin: int) -> int:
    """Where the first image of a labelled grid starts: there are gaps around labels, but none around absent ones."""
    return LABELLED_GAP + margin + (LABELLED_GAP if margin else 0)


def _pasted(
    rows: Sequence[Sequence[Image.Image]], lefts: Sequence[int], tops: Sequence[int], gap: int, border: int
) -> Image.Image:
    """Rows of images on white, image (i, j) with its top left at (lefts[j], tops[i]); RGB.

    lefts, tops: as `_starts` returns them for `gap`; border: pixels right of and below the last image.
    """
    grid = Image.new("RGB", (lefts[-1] - gap + border, tops[-1] - gap + border), "white")
    for top, row in zip(tops, rows, strict=False):
        for left, image in zip(lefts, row, strict=False):
            grid.paste(image.convert("RGB"), (left, top))
    return grid


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


def _wrapped(text: str, width: int, max_lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of `text` at most `width` pixels wide, broken at spaces; a word or text that is too long ends in "..."."""
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
