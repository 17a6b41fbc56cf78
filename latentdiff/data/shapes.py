"""The shapes in which images are trained on: one for all, or aspect-ratio buckets; and what crops to them cut away.

A shape is (height, width) in pixels.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from latentdiff.config import DataConfig
from latentdiff.printable import images_of

MAX_RATIO = 2  # of the longer side of a bucket to the shorter one
MAX_AREA = 1.25  # of a bucket to the square
STEPS = 8  # about as many steps of the buckets' sides make up data.size: 64 pixels at 512
WORTH_BUCKETS = 0.05  # fraction of the pixels that squares must cut away for buckets to be the default

Shape = tuple[int, int]


def bucket_shapes(size: int, multiple: int) -> tuple[Shape, ...]:
    """Shapes of about size x size pixels with aspect ratios from 1:2 to 2:1, from wide to high; the square is one.

    Their sides are multiples of a step: the largest divisor of `size` that is a multiple of `multiple` (which divides
    `size`) and at most an eighth of `size`, or `multiple` itself. To each side belongs the one that comes nearest to
    the square's number of pixels.
    """
    assert size % multiple == 0
    fitting = [step for step in range(multiple, size // STEPS + 1, multiple) if size % step == 0]
    step = max(fitting, default=multiple)
    side = size // step
    shapes = set()
    for one in range(1, MAX_RATIO * side + 1):
        other = (2 * side**2 + one) // (2 * one)  # side**2 / one, rounded
        if max(one, other) <= MAX_RATIO * min(one, other) and one * other <= MAX_AREA * side**2:
            shapes |= {(one * step, other * step), (other * step, one * step)}
    return tuple(sorted(shapes))


def cut_away(original: Shape, shape: Shape) -> float:
    """The fraction of an image's pixels that is lost when it is resized to cover `shape` and cropped."""
    # From whole numbers, so that the same bucket is the nearest on every machine.
    sides = original[0] * shape[1], original[1] * shape[0]
    return 1 - min(sides) / max(sides)


@lru_cache(maxsize=2**16)
def nearest_shape(original: Shape, shapes: tuple[Shape, ...]) -> Shape:
    """The shape with the nearest aspect ratio (smallest distance of logarithms): what loses fewest pixels."""
    return min(shapes, key=lambda shape: cut_away(original, shape))


@dataclass(frozen=True)
class Layout:
    """The shapes that the images of a training are brought to, each image to the nearest.

    removed: buckets that had too few images for a batch, and how many. alternative: the buckets that could be instead.
    """

    shapes: tuple[Shape, ...]
    removed: tuple[tuple[Shape, int], ...] = ()
    alternative: tuple[Shape, ...] = field(default=(), compare=False)

    @property
    def smallest_side(self) -> int:
        """The shortest side of all shapes, pixels."""
        return min(min(shape) for shape in self.shapes)

    @property
    def largest(self) -> Shape:
        """The shape with most pixels."""
        return max(self.shapes, key=prod)

    def __str__(self) -> str:
        (height, width), *others = self.shapes
        if others:
            return f"{len(self.shapes)} buckets"
        return f"{height} px" if height == width else f"{height} x {width} px (height x width)"


def choose_layout(config: DataConfig, originals: Sequence[Shape], multiple: int, batch_size: int) -> Layout:
    """The shapes for training images of these original shapes.

    multiple: of pixels, that the networks need of a side. batch_size: images that a bucket must have at least, counted
    data.repeat times. Raises ValueError if there should be buckets and data.size is no such multiple.
    """
    found, one = Counter(originals), (config.shape,)
    if not isinstance(config.size, int):
        return Layout(one)
    fits = config.size % multiple == 0
    shapes = bucket_shapes(config.size, multiple) if fits else one
    buckets = _without_small_buckets(found, shapes, -(-batch_size // config.repeat))
    worth = _mean_cut(found, one) >= WORTH_BUCKETS
    if config.buckets is False or (config.buckets is None and not worth):
        return Layout(one, alternative=buckets.shapes)
    if not fits:
        raise ValueError(f"data.size is {config.size}, must be a multiple of {multiple}, the networks' downsampling")
    if config.buckets is None and len(buckets.shapes) == 1:
        # Images of one shape are no reason to train on another one than pipelines generate by default.
        return Layout(one, buckets.removed, alternative=buckets.shapes)
    return buckets


def _without_small_buckets(found: Counter[Shape], shapes: tuple[Shape, ...], least: int) -> Layout:
    """The shapes that images go to; those with fewer than `least` removed, the smallest first."""
    removed: list[tuple[Shape, int]] = []
    while True:
        counts: Counter[Shape] = Counter()
        for original, count in found.items():
            counts[nearest_shape(original, shapes)] += count
        shapes = tuple(sorted(counts))
        smallest = min(shapes, key=lambda shape: counts[shape])
        if len(shapes) == 1 or counts[smallest] >= least:
            return Layout(shapes, tuple(removed))
        removed.append((smallest, counts[smallest]))
        shapes = tuple(shape for shape in shapes if shape != smallest)


def _mean_cut(found: Counter[Shape], shapes: tuple[Shape, ...]) -> float:
    cuts = sum(count * cut_away(one, nearest_shape(one, shapes)) for one, count in found.items())
    return cuts / max(1, found.total())


def report(config: DataConfig, originals: Sequence[Shape], layout: Layout, name: Callable[[int], str]) -> list[str]:
    """Lines for the start of a run: the buckets, what crops cut away, and how many images are enlarged."""
    found = Counter(originals)
    lines = []
    shapes = [nearest_shape(original, layout.shapes) for original in originals]
    if layout.shapes != (config.shape,):
        counts = Counter(shapes)
        buckets = ", ".join(f"{text_of(shape)}: {counts[shape]}" for shape in layout.shapes)
        why = f"{_percent(_mean_cut(found, (config.shape,)))} of the pixels would be lost by squares"
        chosen = "data.buckets is true" if config.buckets else f"data.buckets is null, and {why}"
        lines.append(f"buckets (height x width: images): {buckets}; {chosen}")
    if layout.removed:
        buckets = ", ".join(f"{text_of(shape)}: {count}" for shape, count in layout.removed)
        lines.append(f"buckets with fewer images than a batch, whose images went to others: {buckets}")
    cuts = [cut_away(*both) for both in zip(originals, shapes, strict=True)]
    if max(cuts, default=0) >= 0.005:  # what would be written as 1 %
        mean, worst = _mean_cut(found, layout.shapes), max(range(len(cuts)), key=cuts.__getitem__)
        hint = _hint(layout) if mean >= WORTH_BUCKETS else ""
        lines.append(
            f"crops cut away {_percent(mean)} of the pixels on average, at most {_percent(cuts[worst])} "
            f"({name(worst)}){hint}"
        )
    factors = [max(h / own[0], w / own[1]) for own, (h, w) in zip(originals, shapes, strict=True)]
    if enlarged := sum(factor > 1 for factor in factors):
        worst = max(range(len(factors)), key=factors.__getitem__)
        lines.append(
            f"{images_of(enlarged)} of less than the training size, enlarged by {factors[worst]:.2g} at most "
            f"({name(worst)}, {text_of(originals[worst])} px); data.min_size leaves such images out"
        )
    return lines


def _hint(layout: Layout) -> str:
    """What would keep more of the images."""
    if layout.alternative in ((), layout.shapes):
        return ""
    shape, *others = layout.alternative
    return "; data.buckets=true keeps more" if others else f"; data.size={list(shape)} is nearer to their shape"


def text_of(shape: Shape) -> str:
    """A shape as text: height x width."""
    return f"{shape[0]} x {shape[1]}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
