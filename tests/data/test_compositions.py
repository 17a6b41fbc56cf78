"""The compositional set: what is in it, what is held out, its captions and its images."""

import numpy as np
import pytest
from PIL import Image

from latentdiff.config import COMPOSITIONS, DataConfig
from latentdiff.data.captioned_images import open_images
from latentdiff.data.compositions import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    STYLES,
    Composition,
    CompositionSet,
    Figure,
    compositions,
    embedded_folder,
    held_out_colours,
    render,
)

SMALL = CompositionSet(("apple", "cat", "tulip"), pairs=160)
BLUE_APPLE = Composition("noto", (Figure("apple", "blue"),), "yellow")


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_every_combination_is_once_in_one_split():
    train, held_out = compositions(SMALL, "train"), compositions(SMALL, "held_out")
    # 3 objects x 2 styles x 7 backgrounds x (6 of 8 colours and the drawing's own, or the other 2), then the pairs
    assert (len(train), len(held_out)) == (3 * 2 * 7 * 7 + 160, 3 * 2 * 7 * 2 + 20)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert [len(one.figures) for one in train] == [1] * 294 + [2] * 160
    known = {figure for one in train for figure in one.figures}
    for one in held_out:
        assert any(figure.colour in held_out_colours(figure.object) for figure in one.figures)
        assert not known.issuperset(one.figures)
    # All that a held-out prompt is made of occurs in training.
    assert {figure.object for figure in known} == set(SMALL.objects)
    assert {figure.colour for figure in known} == {"", *COLOURS}
    assert {one.background for one in train} == set(BACKGROUNDS) and {one.style for one in train} == set(STYLES)
    sides = [[figure.is_held_out for figure in one.figures] for one in held_out if len(one.figures) == 2]
    assert sides == [[True, False], [False, True]] * 10
    assert all(one.figures[0].object != one.figures[1].object for one in [*train, *held_out] if len(one.figures) == 2)


def test_what_is_held_out_never_changes():
    """Models in the wild were trained without these: the choice is part of the set, for every size of it."""
    assert {name: held_out_colours(name) for name in ("apple", "cat", "rocket", "banana")} == {
        "apple": ("pink", "blue"),
        "cat": ("pink", "red"),
        "rocket": ("blue", "pink"),
        "banana": ("pink", "yellow"),
    }
    assert compositions(SMALL, "train")[-1] == compositions(CompositionSet(SMALL.objects, 160), "train")[-1]
    assert all(len(set(held_out_colours(name))) == 2 for name in OBJECTS)


def test_captions():
    assert BLUE_APPLE.is_held_out
    assert BLUE_APPLE.prompt == "noto style, blue apple on a yellow background"
    assert BLUE_APPLE.free_prompt == "a blue apple on a yellow background"
    own = Composition("fluent flat", (Figure("apple"),), "white")
    assert (own.prompt, own.free_prompt) == ("fluent flat style, apple", "an apple")
    pair = Composition("noto", (Figure("jeans", "orange"), Figure("cat", "orange")), "grey")
    assert pair.prompt == "noto style, orange jeans left of an orange cat on a grey background"
    assert pair.free_prompt == "orange jeans left of an orange cat on a grey background"
    wordings = {
        one.caption
        for one in compositions(SMALL, "train")
        if one.figures == (Figure("apple", "red"),) and one.background == "blue"
    }
    everything = [one.caption for one in compositions(SMALL, "train")]
    assert len(wordings) == 2 and len(set(everything)) > 0.8 * len(everything)
    for part in (", noto style", "a red apple on a", "noto style, red apple, ", " right of a", " left of a", " and a"):
        assert any(part in caption for caption in everything), part
    white = [one.caption for one in compositions(SMALL, "train") if one.background == "white"]
    assert 0.2 < sum(" white background" in caption for caption in white) / len(white) < 0.5


def test_an_image_is_the_drawing_on_its_background():
    """In its own colours on white: the embedded drawing, composed by Pillow."""
    image = render(Composition("noto", (Figure("rocket"),)), 128)
    drawing = Image.open(embedded_folder() / "noto" / "1f680.webp")
    white = Image.new("RGBA", drawing.size, "white")
    assert np.abs(array(image) - array(Image.alpha_composite(white, drawing).convert("RGB"))).max() <= 1
    coloured = array(render(BLUE_APPLE, 64))
    assert (coloured[0, 0] == BACKGROUNDS["yellow"]).all() and coloured.shape == (64, 64, 3)
    transparent = np.asarray(drawing.resize((64, 64), Image.Resampling.LANCZOS))[..., 3] == 0
    other = array(render(Composition("noto", (Figure("rocket", "green"),), "pink"), 64))
    assert transparent.sum() > 1000 and (other[transparent] == BACKGROUNDS["pink"]).all()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_tinted_drawing_has_shades_of_its_colour(colour):
    """Mixed with black or white, a colour keeps its hue: the order of its channels."""
    values = array(render(Composition("noto", (Figure("heart", colour),), "white"), 64)).reshape(-1, 3)
    drawn = values[(values != 255).any(axis=1)]
    order = np.argsort(COLOURS[colour])
    assert (np.diff(drawn[:, order], axis=1) >= -1).all()
    assert drawn.sum(axis=1).std() > 20  # it is shaded, not flat


def test_two_figures_are_side_by_side_at_half_size():
    pair = render(Composition("noto", (Figure("apple", "red"), Figure("cat", "blue")), "green"), 64)
    for half, figure in enumerate((Figure("apple", "red"), Figure("cat", "blue"))):
        alone = render(Composition("noto", (figure,), "green"), 32)
        assert np.array_equal(array(pair)[16:48, 32 * half : 32 * half + 32], array(alone))
    assert (array(pair)[:16] == BACKGROUNDS["green"]).all() and (array(pair)[48:] == BACKGROUNDS["green"]).all()


def config(**keys: object) -> DataConfig:
    return DataConfig(**{"holdout": 0, "source": COMPOSITIONS, "size": 16, "objects": ("apple", "cat")} | keys)


def test_as_a_data_source():
    images, held_out = open_images(config(validation_split="held_out", validation_limit=5), 3, 0, progress=False)
    expected = compositions(CompositionSet(("apple", "cat")), "train")
    assert images.captions == [one.caption for one in expected] and len(held_out) == 5
    assert np.array_equal(array(images.image(40)), array(render(expected[40], 16)))
    assert images.name(40) == f"{expected[40].prompt}.png"
    unheard = {one.caption for one in compositions(CompositionSet(("apple", "cat")), "held_out")}
    assert unheard.issuperset(held_out.captions)
    assert len(open_images(config(objects=None), 3, 0, progress=False)[0]) == 24 * 2 * 7 * 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objects": 65}, "data.objects is 65, but there are only 64 drawn objects"),
        ({"objects": ("apple", "unicorn")}, "data.objects unicorn not known; known are: house, crown"),
        ({"pairs": 10**6}, "data.pairs is 1000000, must be at most "),
        ({"split": "test"}, "has no split 'test', its splits are: train, held_out"),
    ],
)
def test_wrong_choices_are_one_line(keys, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        open_images(config(**keys), 3, 0, progress=False)
    assert message in str(error.value)


def test_the_choices_are_of_this_source_alone():
    for keys in ({"objects": 3}, {"pairs": 1}):
        with pytest.raises(
            ValueError, match="objects and pairs are of source embedded:compositions, but source is 'x'"
        ):
            DataConfig(source="x", size=16, **keys)
