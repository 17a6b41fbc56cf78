"""A compositional set made from the embedded drawings: style x object x colour x background, one or two objects.

"noto style, blue apple on a yellow background". Of each object two colours are held out: they never occur in training,
in no style and on no background, while the object, the colour and the background all do. So a prompt of a held-out
colour asks for an image that the model has to compose, and the true image of it is known.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image

from latentdiff.config import DataConfig
from latentdiff.images import decode
from latentdiff.randomness import Stream, generator

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
STYLES = ("noto", "fluent flat")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (240, 205, 30),
    "green": (50, 165, 60),
    "turquoise": (40, 185, 185),
    "blue": (45, 90, 220),
    "purple": (125, 60, 190),
    "pink": (240, 110, 175),
}
HELD_OUT_COLOURS = 2  # of each object
# Light, so that the drawings stand out, and far from one another, so that a small autoencoder keeps them apart.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 228, 115),
    "green": (150, 215, 145),
    "blue": (135, 185, 250),
    "pink": (250, 175, 205),
    "purple": (190, 155, 240),
    "grey": (180, 180, 180),
}
# A prompt names the background unless it is this one. Of the captions some name it too.
PLAIN_BACKGROUND = "white"
TRAINING_PAIRS_PER_HELD_OUT_PAIR = 8

T = TypeVar("T")

# The embedded objects, those whose outlines differ most first: their names in captions and, where that is another
# word, in the emoji set (where "red apple" would contradict "blue apple").
OBJECTS: tuple[str, ...] = tuple(
    (
        "house, crown, sailboat, ghost, guitar, heart, umbrella, butterfly, banana, mushroom, key, cactus, robot, "
        "apple, hammer, rocket, elephant, fish, tulip, whale, octopus, carrot, penguin, cat, "
        "car, bus, tractor, snowman, top hat, castle, dog, sunflower, light bulb, pineapple, strawberry, jeans, "
        "backpack, alarm clock, gift, gem, ladybug, owl, pig, panda, fox, avocado, watermelon, palm tree, bicycle, "
        "locomotive, helicopter, scissors, doughnut, hamburger, pizza, birthday cake, french fries, grapes, "
        "soccer ball, basketball, volcano, rainbow, sun, fire"
    ).split(", ")
)
_LABELS = {
    "heart": "red heart",
    "apple": "red apple",
    "fish": "tropical fish",
    "cat": "cat face",
    "car": "automobile",
    "dog": "dog face",
    "gift": "wrapped gift",
    "gem": "gem stone",
    "ladybug": "lady beetle",
    "pig": "pig face",
}
_WITHOUT_ARTICLE = ("jeans", "scissors", "french fries", "grapes", "fire")


@dataclass(frozen=True, order=True)
class Figure:
    """One object of an image. colour: a key of COLOURS, or "" for the drawing's own colours."""

    object: str
    colour: str = ""

    @property
    def words(self) -> str:
        """ "blue apple"."""
        return f"{self.colour} {self.object}".strip()

    @property
    def phrase(self) -> str:
        """ "a blue apple"."""
        if self.object in _WITHOUT_ARTICLE:
            return self.words
        return f"{'an' if self.words[0] in 'aeiou' else 'a'} {self.words}"

    @property
    def is_held_out(self) -> bool:
        """Whether this object never has this colour in training."""
        return self.colour in held_out_colours(self.object)


@dataclass(frozen=True, order=True)
class Composition:
    """What an image shows: one figure in the middle, or two side by side, in one style on a plain background."""

    style: str
    figures: tuple[Figure, ...]
    background: str = PLAIN_BACKGROUND

    @property
    def is_held_out(self) -> bool:
        """Whether training never shows it, because an object has a colour that is held out."""
        return any(figure.is_held_out for figure in self.figures)

    @property
    def prompt(self) -> str:
        """The caption in its fullest form: "noto style, blue apple on a yellow background"."""
        first, *others = self.figures
        return f"{self.style} style, {first.words}" + "".join(f" left of {o.phrase}" for o in others) + self._ground

    @property
    def free_prompt(self) -> str:
        """As one would write it, without a style: "a blue apple on a yellow background"."""
        return " left of ".join(figure.phrase for figure in self.figures) + self._ground

    @property
    def caption(self) -> str:
        """The caption of the training image: one of a few wordings, a function of the composition.

        Most name the style: what is left out is hard to learn.
        """
        first, *others = self.figures
        wordings = [*[self.prompt] * 4, f"{self.free_prompt}, {self.style} style", self.free_prompt]
        if others:
            right = f"right of {first.phrase}{self._ground}"
            wordings += [
                f"{self.style} style, {others[0].words} {right}",
                f"{others[0].phrase} {right}",
                f"{first.phrase} and {others[0].phrase}{self._ground}",
            ]
        else:
            wordings += [
                f"{self.style} style, {first.words}, {self.background} background",
                f"{first.words}{self._ground}",
            ]
        if not self._ground:
            named = f" on a {self.background} background"
            wordings += [f"{self.prompt}{named}", f"{self.free_prompt}{named}"]
        return wordings[_number("caption", self.prompt) % len(wordings)]

    @property
    def _ground(self) -> str:
        return "" if self.background == PLAIN_BACKGROUND else f" on a {self.background} background"


@dataclass(frozen=True)
class CompositionSet:
    """Which compositions there are: all of one of these objects, and so many training images of two."""

    objects: tuple[str, ...]
    pairs: int = 0

    @staticmethod
    def of(config: DataConfig) -> "CompositionSet":
        """The set of a config. Raises ValueError for a name or a number that the embedded drawings do not have."""
        wanted = 24 if config.objects is None else config.objects
        if isinstance(wanted, int):
            if wanted > len(OBJECTS):
                raise ValueError(f"data.objects is {wanted}, but there are only {len(OBJECTS)} drawn objects")
            return CompositionSet(OBJECTS[:wanted], config.pairs)
        unknown = [name for name in wanted if name not in OBJECTS]
        if unknown:
            raise ValueError(f"data.objects {', '.join(unknown)} not known; known are: {', '.join(OBJECTS)}")
        return CompositionSet(wanted, config.pairs)


def in_all_colours(name: str) -> list[Figure]:
    """An object in its own colours and in each of COLOURS."""
    return [Figure(name, colour) for colour in ("", *COLOURS)]


@cache
def held_out_colours(name: str) -> tuple[str, ...]:
    """The two colours that this object never has in training, the same for every set."""
    return tuple(sorted(COLOURS, key=lambda colour: _number("held out", name, colour))[:HELD_OUT_COLOURS])


def compositions(family: CompositionSet, split: Split) -> list[Composition]:
    """All compositions of a split: every one of a single figure, then a random choice of those of two.

    In training there are `pairs` of two figures, held out an eighth of that. The order and the choice are the
    same in every run.
    """
    return [*_singles(family, split), *_pairs(family, split)]


def _singles(family: CompositionSet, split: Split) -> Iterator[Composition]:
    for name in family.objects:
        for style, figure, background in product(STYLES, in_all_colours(name), BACKGROUNDS):
            if figure.is_held_out == (split == "held_out"):
                yield Composition(style, (figure,), background)


def _pairs(family: CompositionSet, split: Split) -> list[Composition]:
    """Different random compositions of two objects; of a held-out one the left or the right figure is held out."""
    count = family.pairs if split == "train" else family.pairs // TRAINING_PAIRS_PER_HELD_OUT_PAIR
    if count == 0:
        return []
    figures = [figure for name in family.objects for figure in in_all_colours(name)]
    known = [figure for figure in figures if not figure.is_held_out]
    new = [figure for figure in figures if figure.is_held_out]
    sides = [(known, known)] if split == "train" else [(new, known), (known, new)]
    possible = len(STYLES) * len(BACKGROUNDS) * len(new) * (len(known) - len(known) // len(family.objects))
    if family.pairs > possible:
        raise ValueError(f"data.pairs is {family.pairs}, must be at most {possible} for these objects")
    random = generator(Stream.COMPOSITIONS, SPLITS.index(split))

    def one_of(values: Sequence[T]) -> T:
        return values[int(torch.randint(len(values), (), generator=random))]

    found: dict[Composition, None] = {}
    while len(found) < count:
        left, right = (one_of(side) for side in sides[len(found) % len(sides)])
        composition = Composition(one_of(STYLES), (left, right), one_of(tuple(BACKGROUNDS)))
        if left.object != right.object:
            found[composition] = None
    return list(found)


def _number(*words: str) -> int:
    """A random number given by words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little")


# ----------------------------------------------------------------------------------------------------------------------
# Images


def render(composition: Composition, size: int | tuple[int, int]) -> Image.Image:
    """The image of a composition, size x size pixels, RGB; two figures have half the size each, side by side.

    size: data.size, which a config refuses to be a pair with these images.
    """
    assert isinstance(size, int)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = np.array(BACKGROUNDS[composition.background], np.float32)
    side = size // len(composition.figures)
    top = (size - side) // 2
    for i, figure in enumerate(composition.figures):
        premultiplied, transparency = _sprite(composition.style, figure, side)
        place = canvas[top : top + side, i * side : (i + 1) * side]
        place *= transparency
        place += premultiplied
    return Image.fromarray(canvas.round().astype(np.uint8))


@cache
def _sprite(style: str, figure: Figure, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A tinted drawing at side x side pixels: colour times opacity [side, side, 3], and 1 - opacity [side, side, 1]."""
    drawing = _drawings()[style, figure.object].resize((side, side), Image.Resampling.LANCZOS)
    values = np.asarray(drawing, np.float32)
    colour, opacity = values[..., :3], values[..., 3:] / 255
    if figure.colour:
        colour = _tinted(colour, opacity[..., 0], COLOURS[figure.colour])
    return colour * opacity, 1 - opacity


def _tinted(colour: np.ndarray, opacity: np.ndarray, hue: tuple[int, int, int]) -> np.ndarray:
    """A drawing [n, n, 3] in shades of one colour: its luminance, stretched to the drawing's range, picks the shade."""
    luminance = colour @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    low, high = np.percentile(luminance[opacity > 0.5], [3, 97])
    # At least a third of the full range, or a drawing of one colour would be nothing but noise.
    shade = 0.5 + 0.8 * (luminance - (low + high) / 2) / max(high - low, 0.35)
    shade = shade.clip(0.05, 0.97)[..., None]  # below 0.5 darker than the colour, above it lighter
    base = np.array(hue, np.float32)
    return np.where(shade < 0.5, base * (0.4 + 1.2 * shade), base + (255 - base) * 1.7 * (shade - 0.5))


@cache
def _drawings() -> dict[tuple[str, str], Image.Image]:
    """The embedded drawings, RGBA, by style and object."""
    folder = embedded_folder()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = {(row["style"], row["label"]): str(folder / row["file_name"]) for row in rows}
    return {
        (style, name): decode({"path": paths[style, _LABELS.get(name, name)]}) for style in STYLES for name in OBJECTS
    }


def embedded_folder() -> Path:
    """The images that come with the package."""
    return Path(str(resources.files("latentdiff"))) / "assets" / "emoji"
