"""Grids of images, with and without labels."""

import numpy as np
import pytest
from PIL import Image

from latentdiff.figures.grids import captioned_grid, image_grid, labelled_grid, magnified


def test_image_grid_places_and_separates_images():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3)]
    grid = image_grid([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert grid.size == (3 * 4 + 2 * 2, 2 * 3 + 2)
    pixels = grid.load()
    for i, colour in enumerate(colours):
        left, top = (i % 3) * 6, (i // 3) * 5
        assert {pixels[x, y] for x in range(left, left + 4) for y in range(top, top + 3)} == {colour}
    white = [(x, y) for x in range(16) for y in range(8) if pixels[x, y] == (255, 255, 255)]
    assert len(white) == 16 * 8 - 5 * 4 * 3  # gaps and the empty cell
    grey = image_grid([Image.new("L", (2, 2), 7)], columns=1)
    assert grey.mode == "RGB" and grey.getpixel((1, 1)) == (7, 7, 7)


def test_image_grid_is_about_square():
    dots = {n: image_grid([Image.new("RGB", (1, 1))] * n) for n in (1, 2, 4, 8, 9, 16, 100)}
    assert [(dot.width + 2) // 3 for dot in dots.values()] == [1, 2, 2, 3, 3, 4, 8]


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (33, 25)) -> Image.Image:
    return Image.new("RGB", size, colour)


def box(table: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box of a colour: left, top, right, bottom; the whole box must have it."""
    rows, columns = np.nonzero((np.asarray(table) == colour).all(axis=-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top), f"{colour} is not a whole rectangle"
    return left, top, right, bottom


def cells(sizes: list[list[tuple[int, int]]]) -> list[list[Image.Image]]:
    return [[solid((60 + 50 * i, 10 + 60 * j, 200), size) for j, size in enumerate(row)] for i, row in enumerate(sizes)]


def has_ink(table: Image.Image, area: tuple[int, int, int, int]) -> bool:
    return np.asarray(table.crop(area)).min() < 100


def test_cells_have_their_positions():
    rows = cells([[(40, 30)] * 3] * 2)
    table = labelled_grid(rows, ["up", "down"], ["a", "b", "c"])
    boxes = [[box(table, image.getpixel((0, 0))) for image in row] for row in rows]
    left, top = boxes[0][0][:2]
    gap = 6
    for i, row in enumerate(boxes):
        for j, found in enumerate(row):
            x, y = left + j * (40 + gap), top + i * (30 + gap)
            assert found == (x, y, x + 40, y + 30)
    assert table.size == (left + 3 * 46, top + 2 * 36)
    for j in range(3):  # each label is in its column, above the images
        assert has_ink(table, (left + 46 * j, 0, left + 46 * j + 40, top))
    for i in range(2):
        assert has_ink(table, (0, top + 36 * i, left, top + 36 * i + 30))
    assert not has_ink(table, (0, 0, left, top))


def test_empty_labels_take_no_room():
    rows = cells([[(40, 30)] * 2])
    assert labelled_grid(rows, [""], ["", ""]).size == (6 + 2 * 46, 6 + 36)
    assert labelled_grid(rows, ["row"], ["", ""]).height == 6 + 36


def test_rows_and_columns_fit_their_largest_image():
    rows = cells([[(20, 50), (40, 10)], [(30, 20), (10, 20)]])
    table = labelled_grid(rows, ["", ""], ["", ""])
    assert [box(table, image.getpixel((0, 0))) for row in rows for image in row] == [
        (6, 6, 26, 56),
        (42, 6, 82, 16),
        (6, 62, 36, 82),
        (42, 62, 52, 82),
    ]
    assert table.size == (88, 88)


def test_long_labels_are_wrapped_and_cut():
    """The longest label takes three lines and stays in its column, even one word that is wider than it."""
    short = labelled_grid(cells([[(60, 60)] * 2]), ["x"], ["one", "two"])
    rows = cells([[(60, 60)] * 2])
    text = "a photograph of a very small red apple on a table " * 5
    table = labelled_grid(rows, [text], [text, "Rindfleischetikettierung"])
    (left, top, _, bottom), (other, *_) = (box(table, image.getpixel((0, 0))) for image in rows[0])
    line = (top - box(short, (60, 10, 200))[1]) / 2  # two lines more than above `short`
    assert 14 <= line <= 24
    assert 100 < left <= 160 + 2 * 6
    assert not has_ink(table, (left + 60, 0, other, top)) and not has_ink(table, (other + 60, 0, table.width, top))
    assert has_ink(table, (left, 0, left + 60, top)) and has_ink(table, (other, 0, other + 60, top))
    assert not has_ink(table, (0, 0, left, top)) and bottom + 6 == table.height


def test_label_is_whole_beside_a_low_image():
    rows = cells([[(16, 4)], [(16, 4)]])
    table = labelled_grid(rows, ["first", "second"], [""])
    tops = [box(table, row[0].getpixel((0, 0)))[1] for row in rows]
    assert tops[1] - tops[0] >= 14 + 6  # a line of text and a gap


FOUR = [solid((0, 0, 0))] * 4


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "message"),
    [
        ([], [], [], "at least one image"),
        ([[]], ["a"], [], "at least one image"),
        ([FOUR], ["a", "b"], ["1", "2", "3", "4"], "2 row labels for 1 rows"),
        ([FOUR, FOUR[:2]], ["a", "b"], ["1", "2", "3", "4"], "row 1 has 2 images for 4 column labels"),
    ],
)
def test_wrong_tables_are_refused(rows, row_labels, column_labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, row_labels, column_labels)


def test_captioned_grid_has_each_caption_under_its_images():
    colours = [[(10 * i, 200, 20 * j) for j in range(2)] for i in range(3)]
    cells_ = [[solid(colour) for colour in row] for row in colours]
    grid = captioned_grid(cells_, ["one", "two", ""], columns=2)
    boxes = [[box(grid, colour) for colour in row] for row in colours]
    for first, second in boxes:  # side by side
        assert second[0] == first[2] + 2 and second[1] == first[1]
    assert boxes[1][0][0] > boxes[0][1][2] and boxes[1][0][1] == boxes[0][0][1]
    assert boxes[2][0][0] == boxes[0][0][0] and boxes[2][0][1] > boxes[0][0][3]
    under = [(left, bottom, second[2], bottom + 14) for (left, _, _, bottom), second in boxes]
    assert [has_ink(grid, area) for area in under] == [True, True, False]
    with pytest.raises(ValueError, match="^1 captions for 3 cells of images, must be as many and at least one$"):
        captioned_grid(cells_, ["one"], columns=2)


def test_magnified_pixels_are_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(magnified(image, 13)), pixels.repeat(3, axis=0).repeat(3, axis=1))
    assert np.array_equal(np.asarray(magnified(image, 6)), pixels)
