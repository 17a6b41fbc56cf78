"""Line charts as SVG text, for a page that draws them without any other file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from latentdiff.figures.charts import Series, evenly_chosen, wants_log_scale

WIDTH, HEIGHT = 520, 260  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26  # margins
MAX_POINTS = 400  # of a line; more cannot be told apart
MARKED_POINTS = 60  # a line of at most so many points shows them


@dataclass(frozen=True)
class Line:
    """A curve over the optimiser steps."""

    name: str
    series: Series
    colour: str
    dashed: bool = False
    marked: bool = False  # its points are shown


def line_chart(
    title: str, lines: Sequence[Line], marks: Mapping[str, int] | None = None, log_allowed: bool = True
) -> str:
    """An <svg> element of lines over the steps, logarithmic if allowed and they span more than a factor of five.

    marks: steps that get a vertical line, by what they are. Every line must have a point.
    """
    assert lines and all(line.series for line in lines)
    steps = [step for line in lines for step in line.series]
    values = [list(line.series.values()) for line in lines]
    log = log_allowed and wants_log_scale(*values)
    low, high = min(map(min, values)), max(map(max, values))
    ticks = _log_ticks(low, high) if log else _linear_ticks(low, high)
    low, high = min(low, *ticks), max(high, *ticks)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in _linear_ticks(first, last):
        if first <= step <= last and step == int(step):
            anchor = "end" if x(step) > WIDTH - 40 else "middle"
            parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{int(step):,}</text>')
    for name, step in (marks or {}).items():
        if first <= step <= last:
            parts.append(f'<line class="mark" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">')
            parts.append(f"<title>{escape(name)}</title></line>")
    for line in lines:
        chosen = evenly_chosen(list(line.series.items()), MAX_POINTS)
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in chosen)
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dashes}/>')
        if line.marked and len(chosen) <= MARKED_POINTS:
            for step, value in chosen:
                about = escape(f"{line.name}, step {step:,}: {value:.4g}")
                parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{line.colour}">')
                parts.append(f"<title>{about}</title></circle>")
    return "".join([*parts, "</svg>"])


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    if high <= low:
        low, high = low - abs(low or 1) / 10, high + abs(high or 1) / 10
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    count = range(math.floor(low / width), math.ceil(high / width) + 1)
    return [float(f"{number * width:.10g}") for number in count]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten (powers alone over many) from just below `low` to just above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = [float(f"{factor * 10.0**power:.10g}") for power in powers for factor in factors]
    inner = [tick for tick in every if low <= tick <= high]
    below = [tick for tick in every if tick < low][-1:]
    above = [tick for tick in every if tick > high][:1]
    return [*below, *inner, *above]
