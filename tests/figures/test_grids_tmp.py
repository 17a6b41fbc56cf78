"""Grids tmp."""

from PIL import Image

from latentdiff.figures.grids import image_grid


def test_image_grid():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3)]
    grid = image_grid([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert grid.size == (3 * 4 + 2 * 2, 2 * 3 + 2)
    pixels = grid.load()
    for i, colour in enumerate(colours):
        left, top = (i % 3) * 6, (i // 3) * 5
        assert {pixels[x, y] for x in range(left, left + 4) for y in range(top, top + 3)} == {colour}
    white = [(x, y) for x in range(16) for y in range(8) if pixels[x, y] == (255, 255, 255)]
    assert len(white) == 16 * 8 - 5 * 4 * 3  # gaps and the free place
    grey = image_grid([Image.new("L", (2, 2), 7)], columns=1)
    assert grey.mode == "RGB" and grey.getpixel((1, 1)) == (7, 7, 7)


def test_grid_columns():
    dots = {n: image_grid([Image.new("RGB", (1, 1))] * n) for n in (1, 2, 4, 8, 9, 16, 100)}
    assert [(dot.width + 2) // 3 for dot in dots.values()] == [1, 2, 2, 3, 3, 4, 8]
