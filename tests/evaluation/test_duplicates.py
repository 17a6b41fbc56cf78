"""Near-duplicates: what is found, what is not, and that the bands lose no pair."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import open_images
from latentdiff.evaluation import duplicates
from latentdiff.evaluation.duplicates import Fingerprint, fingerprint, near_groups
from latentdiff.images import to_images

Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    """The embedded drawings: 64 objects, each in two styles."""
    images, _ = open_images(DataConfig(holdout=0, source="embedded", size=128), 3, seed=0, progress=False)
    return to_images(images.first(len(images)))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image: Image.Image, pixels: int) -> Image.Image:
    return image.crop((pixels, pixels, image.width - pixels, image.height - pixels))


def test_different_drawings_are_no_near_duplicates(drawings):
    assert len(drawings) == 128 and near_groups([fingerprint(image) for image in drawings]) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda image: image.resize((64, 64), Image.Resampling.LANCZOS), 0.99),
        (lambda image: image.resize((300, 250), Image.Resampling.BICUBIC), 1.0),
        (lambda image: as_jpeg(image, 30), 1.0),
        (lambda image: cropped(image, 1), 0.95),
        (lambda image: ImageEnhance.Brightness(image).enhance(0.97), 0.9),
    ],
)
def test_changed_drawings_are_near_duplicates_of_their_originals_alone(drawings, change: Change, found):
    prints = [fingerprint(image) for image in [*drawings, *map(change, drawings)]]
    groups = near_groups(prints)
    assert all(b == a + 128 for a, b in groups)  # each is a pair
    assert len(groups) >= found * 128


def test_other_colours_of_the_same_outline_are_no_near_duplicates(drawings):
    red, green, blue = drawings[0].split()
    other = Image.merge("RGB", (blue, red, green))
    assert near_groups([fingerprint(drawings[0]), fingerprint(other)]) == []


def test_a_small_object_in_another_colour_is_no_near_duplicate():
    images, _ = open_images(DataConfig(holdout=0, source="embedded:compositions", size=64), 3, seed=0, progress=False)
    hammers = [i for i, caption in enumerate(images.captions) if "hammer" in caption]
    assert len(hammers) == 98
    prints = [fingerprint(image) for i in hammers for image in to_images(images.pixels(i)[None])]
    assert near_groups(prints) == []


def grey(bits: int, level: int = 100) -> Fingerprint:
    return Fingerprint(bits, bytes([level] * 192))


def test_every_pair_within_the_limits_is_found():
    """Against the comparison of all pairs."""
    random = np.random.default_rng(0)
    prints = []
    for _ in range(40):  # families of hashes that differ in a few bits
        start = int(random.integers(0, 2**63))
        for _ in range(5):
            flips = random.choice(64, random.integers(0, 8), replace=False)
            prints.append(grey(start ^ sum(1 << int(bit) for bit in flips), int(random.integers(95, 110))))
    linked = {
        (i, j)
        for i, one in enumerate(prints)
        for j, other in enumerate(prints[:i])
        if (one.bits ^ other.bits).bit_count() <= 6 and abs(one.colours[0] - other.colours[0]) <= 8
    }
    groups = near_groups(prints)
    label = {index: number for number, group in enumerate(groups) for index in group}
    assert len(linked) > 100 and all(label[i] == label[j] for i, j in linked)
    assert label.keys() == {index for pair in linked for index in pair}


def test_groups_are_linked_through_their_members():
    assert near_groups([grey(0), grey(2**40), grey(0b111111), grey(0b111111_111111)]) == [[0, 1, 2, 3]]
    assert near_groups([grey(0), grey(2**40 - 1), grey(0, 109)]) == []
    assert near_groups([grey(0), grey(0, 108), grey(0)]) == [[0, 1, 2]]
    assert near_groups([grey(0)]) == near_groups([]) == []


def test_many_plain_images_are_compared_with_the_nearest_in_brightness(monkeypatch):
    monkeypatch.setattr(duplicates, "WINDOW", 3)
    assert near_groups([grey(0, level) for level in range(200)]) == [list(range(200))]
