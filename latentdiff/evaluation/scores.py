"""What an evaluation reports where the true images are known: rates with their intervals, and tables of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

Z_95 = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Rate:
    """So many of so many, with the 95 % interval of Wilson (1927)."""

    hits: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.total, self.hits / self.total
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 * sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.hits} / {self.total} ({low:.0%} .. {high:.0%})"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How images compare with the true images of what was asked for; a subclass adds its rates, the main one first."""

    copies: int  # the nearest of all true images is one that was trained on
    psnr: float  # against the true images, mean, dB

    def cells(self) -> dict[str, str]:
        """What a table says of it, by heading: the main rate with its interval, of the others the hits."""
        (main, rate), *others = ((name, value) for name, value in vars(self).items() if isinstance(value, Rate))
        hits = {name: str(value.hits) for name, value in others}
        return {main: str(rate), **hits, "copies": str(self.copies), "PSNR to the truth (dB)": f"{self.psnr:.1f}"}


def markdown_table(rows: Sequence[tuple[str, Mapping[str, str]]], corner: str = "") -> str:
    """Rows of a name and cells by heading; all have the same headings. corner: the heading of the names."""
    heading = (corner, *rows[0][1])
    lines = [heading, ("---",) * len(heading), *((name, *cells.values()) for name, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
